"""Which weights a teacher's answers come from, and whether there is room for a copy of them."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_fsdp_enabled

from model_adapters import ModelAdapter
from regate.errors import ConfigError
from regate.ranks import highest, ranks
from regate.training.sharding import gathered
from regate_patch import is_sharded

NO_COPIES = (
    "{name} cannot be copied for a teacher: {error}. Pruning, weight_norm and spectral_norm of torch.nn.utils keep "
    "computed weights on their modules: torch.nn.utils.parametrizations has others, and prune.remove makes pruning "
    "permanent. Or keep no copy: with teacher='first' the model itself is the teacher before its first step, and "
    "teacher=None scores by difficulty alone"
)
_FOR_ACTIVATIONS = 0.1  # of a device's memory


def halve_on_cuda(parts: Sequence[nn.Module]) -> None:
    """Parameters to bfloat16; buffers stay, for rotary frequencies in bfloat16 are wrong at far positions."""
    for parameter in (p for part in parts for p in part.parameters()):
        if parameter.is_cuda and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def copied(parts: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """A copy of each, of which none calls what it was copied from.

    A function that stands in for a module's forward (a compiled one, a wrapper that logs) cannot be copied, and has the
    original's module in it; the copy has the forward of its class instead.

    Raises:
        ConfigError: a module holds what cannot be copied.
    """
    try:
        parts = copy.deepcopy(parts)  # of all together, so that tied weights stay tied
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        raise ConfigError(NO_COPIES.format(name=type(parts[1]).__name__, error=error)) from error
    for module in (m for part in parts for m in part.modules()):
        if isinstance(vars(module).get("forward"), types.FunctionType):
            del module.forward
    return parts


def sampled(parameter: Tensor) -> Tensor:
    """Some values, float32 on the CPU; of a parameter that is split over ranks, those of the whole: all must ask."""
    with gathered([parameter]):
        whole: Any = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        flat = whole.detach().reshape(-1)
        return flat[:: max(flat.numel() // 64, 1)][:64].float().cpu().clone()  # not a view of what may change


def answering(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module that answer while adapters are off, by the names that they have without PEFT."""
    base = getattr(module, "base_layer", None) if hasattr(module, "adapter_layer_names") else None
    original = getattr(module, "original_module", None)  # under `modules_to_save`
    for inside in (base, original):
        if isinstance(inside, nn.Module):
            yield from answering(inside, prefix)
            return
    for name, parameter in module.named_parameters(prefix, recurse=False):
        yield name, parameter
    for name, child in module.named_children():
        yield from answering(child, f"{prefix}.{name}" if prefix else name)


def adapted(model: nn.Module) -> list[Any]:
    """The PEFT models, each of which can switch its adapters off, that it is, wraps or has among its parts."""
    return [module for module in model.modules() if hasattr(module, "disable_adapter")]


def carries_adapters(peft: nn.Module) -> bool:
    """Has a PEFT model layers with adapters, or copies of whole modules, still?"""
    return any(hasattr(module, "adapter_layer_names") for module in peft.modules())


def uses_peft(model: nn.Module, adapter: ModelAdapter) -> bool:
    """Does the model carry adapters that can be switched off, over a language model that does not learn?"""
    if not adapted(model):
        return False
    parts = (adapter.embeddings(model), adapter.decoder(model), adapter.head(model))
    return not any(p.requires_grad for part in parts for _, p in answering(part))


def split_root(model: nn.Module, inner: nn.Module) -> Any:
    """The outermost module around `inner` that FSDP2 has split, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule) and any(part is inner for part in module.modules()):
            return module
    return None


def lacks_weights(model: nn.Module) -> bool:
    """Has some rank no weights of the model yet, for from_pretrained reads them on one alone, and FSDP deals them out?

    Where that was asked for, every rank must come here. What the others have until then differs between releases of
    transformers: parameters on "meta", zeros, or all weights; so ranks compare what they have.
    """
    if not is_fsdp_enabled() or ranks() == 1 or is_sharded(model):
        return False
    digest = blake2b(digest_size=7)
    for parameter in model.parameters():
        digest.update(b"meta" if parameter.is_meta else sampled(parameter).numpy().tobytes())
    number = int.from_bytes(digest.digest())
    return highest(number) != -highest(-number)


def is_tight(model: nn.Module, adapter: ModelAdapter) -> bool:
    """Would a copy of the language model, in bfloat16, leave the GPU too little to train the model?

    Each parameter that learns needs a gradient and two moments of an optimizer, and a tenth of the memory is left for
    activations. A model that is still on the CPU is taken to move to the current GPU.
    """
    if not torch.cuda.is_available():
        return False
    parameters = list(model.parameters())
    device = parameters[0].device
    free, total = torch.cuda.mem_get_info(device if device.type == "cuda" else None)
    copied = {p: 2 * p.numel() for part in (adapter.embeddings, adapter.decoder, adapter.head)
              for p in part(model).parameters()}  # fmt: skip
    needed = sum(copied.values())
    for p in parameters:
        needed += p.numel() * p.element_size() * ((3 if p.requires_grad else 0) + (p.device.type != "cuda"))
    return free < needed + _FOR_ACTIVATIONS * total
