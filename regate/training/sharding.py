"""Models that are split over ranks: what holds of them, and which ways of splitting are refused by name.

DDP keeps a model whole. FSDP2 and DeepSpeed ZeRO-3 keep a part on each rank and gather a layer where it runs, so that
every rank must run the same layers in the same order: what depends on a rank's own batch is decided together.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model_adapters.checkpointing import within_checkpoints
from regate.errors import UnsupportedShardingError
from regate_patch import is_sharded


def gather_by_layer(decoder: nn.Module) -> None:
    """Should DeepSpeed come to split this decoder, let it gather a decoder layer at a time, not each linear in it.

    That is `deepspeed.utils.set_z3_leaf_modules`, of which DeepSpeed takes note when it makes its engine. Without
    DeepSpeed nobody reads it.
    """
    for layer in layers(decoder):
        if not _hooks_inside(layer):
            layer._z3_leaf = True  # type: ignore[assignment]


def forget_layers(decoder: nn.Module) -> None:
    """Undo `gather_by_layer`, unless DeepSpeed has acted on it."""
    for layer in layers(decoder):
        if not any(hasattr(parameter, "ds_z3_leaf_module") for parameter in layer.parameters()):
            layer.__dict__.pop("_z3_leaf", None)


def layers(decoder: nn.Module) -> Iterator[nn.Module]:
    """The members of a decoder's outermost module lists."""
    for child in decoder.children():
        yield from child if isinstance(child, nn.ModuleList) else layers(child)


def refuse_opaque(model: nn.Module, decoder: nn.Module) -> None:
    """DDP, FSDP2 and ZeRO-3 are fine; what hides parameters from a layer's own forward, or splits a row, is not.

    Raises:
        UnsupportedShardingError: FSDP1, nn.DataParallel, a device_map over several devices, ZeRO-3 that gathers less
            than a decoder layer at a time, FSDP2 inside activation checkpoints that are not around layers of
            transformers, quantised weights that are split, or tensor, context or sequence parallelism.
    """
    _refuse_parallel(model, decoder)
    if getattr(model, "_is_replica", False):
        raise UnsupportedShardingError(
            "nn.DataParallel (Trainer's choice for one process that sees several GPUs) runs copies of the model in "
            "threads; start one process per GPU with torchrun or accelerate launch, or show it a single GPU"
        )
    if any(hasattr(part, "_hf_hook") for part in model.modules() if part is not model):
        raise UnsupportedShardingError(
            "device_map spreads the model over devices: accelerate's hooks move each layer's inputs, and a captured "
            "decoder would bypass them; keep the whole model on one device per process (device_map={'': device}), and "
            "where it does not fit, split it with FSDP2 or DeepSpeed ZeRO-3"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedShardingError(
            "FSDP1 gathers parameters in ways that a captured decoder would bypass; use FSDP2 (`fsdp_version: 2` in "
            "accelerate's config, or `torch.distributed.fsdp.fully_shard`), DeepSpeed ZeRO-3 or DDP"
        )
    if any(_is_from(type(part), "torch.distributed.fsdp") for part in within_checkpoints(decoder)):
        raise UnsupportedShardingError(
            "FSDP2's hooks stand inside activation checkpoints (torch's checkpoint_wrapper, accelerate's "
            "`activation_checkpointing`) around parts that are no layers of transformers, and cannot be captured: let "
            "the model checkpoint its layers' forward by itself, with FSDP2's hooks outside"
        )
    cut = next((layer for layer in layers(decoder) if _hooks_inside(layer)), None)
    if cut is not None:
        name = type(cut).__name__
        raise UnsupportedShardingError(
            f"DeepSpeed ZeRO-3 gathers {name} a linear at a time, by hooks that cannot be captured; call regate.apply "
            "before deepspeed.initialize, accelerator.prepare or Trainer.train, or let it gather whole layers: "
            f'"zero_optimization": {{"leaf_module": {{"classes": ["{name}"]}}}} in its config (DeepSpeed 0.18 or newer)'
        )


def _refuse_parallel(model: nn.Module, decoder: nn.Module) -> None:
    """Ways of giving ranks a part of each layer, or of each row."""
    state: Any = sys.modules.get("accelerate.state")
    asked: Any = state and state.AcceleratorState._shared_state.get("parallelism_config")
    functions: Any = sys.modules.get("transformers.modeling_utils")
    ulysses = functions and any(
        _is_from(function, "deepspeed.runtime.sequence_parallel")
        for function in functions.ALL_ATTENTION_FUNCTIONS.values()
    )
    found = {
        "tensor parallelism": _in_pieces(model) or (getattr(asked, "tp_size", None) or 1) > 1,
        "context parallelism": _is_from(F.scaled_dot_product_attention, "torch.distributed.tensor.experimental")
        or (getattr(asked, "cp_size", None) or 1) > 1,
        "sequence parallelism (Ulysses)": ulysses or (getattr(asked, "sp_size", None) or 1) > 1,
    }
    if kinds := [kind for kind, there in found.items() if there]:
        raise UnsupportedShardingError(
            f"{' and '.join(kinds)}: a rank holds a part of each layer or of each row, and which positions of a row "
            "are computed is decided by ranks that hold all of it; use as many ranks for data instead, with parameters "
            "split by FSDP2 or DeepSpeed ZeRO-3 (accelerate: ParallelismConfig(dp_shard_size=...) alone)"
        )
    quantised = next((m for m in decoder.modules() if _is_from(type(m), "bitsandbytes")), None)
    if quantised is not None and is_sharded(decoder):
        raise UnsupportedShardingError(
            f"{type(quantised).__name__} under FSDP2 or DeepSpeed ZeRO-3 makes its weights whole again inside each "
            "linear, which cuts a decoder layer into graphs that cannot be followed; train QLoRA under DDP, or split "
            "the base model in bfloat16 and train LoRA on it"
        )


def _in_pieces(model: nn.Module) -> bool:
    """Does each rank compute with a part of some weight?"""
    gathered = is_sharded(model)

    def in_pieces(parameter: nn.Parameter) -> bool:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        return sum(not placement.is_replicate() for placement in placements) > gathered  # FSDP2 gathers one of them

    return any(
        (getattr(part, "_tp_size", None) or 1) > 1 or _is_from(type(part), "deepspeed.module_inject")
        for part in model.modules()
    ) or any(map(in_pieces, model.parameters()))


def _is_from(thing: Any, package: str) -> bool:
    """Is a class's or a function's code from this package?"""
    return (getattr(thing, "__module__", None) or "").startswith(package)


def _hooks_inside(layer: nn.Module) -> bool:
    """Do hooks of DeepSpeed stand in the layer?"""
    return any(
        _is_from(hook, "deepspeed.runtime.zero.")
        for part in layer.modules()
        if part is not layer
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    )


def refuse_sharded(model: nn.Module) -> None:
    """A teacher is copied from whole parameters.

    Raises:
        UnsupportedShardingError: FSDP2 or ZeRO-3 has split them already.
    """
    if is_sharded(model):
        raise UnsupportedShardingError(
            "the teacher cannot be copied from a model that FSDP2 or DeepSpeed ZeRO-3 has split: call regate.apply "
            "before fully_shard, deepspeed.initialize or accelerator.prepare, or pass teacher='first', 'precomputed' "
            "or None. Where from_pretrained splits it (HfDeepSpeedConfig, Trainer with ZeRO-3), it never was whole"
        )


def local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, unless FSDP2 or ZeRO-3 has split it."""
    part = getattr(parameter, "ds_tensor", None)
    if isinstance(part, Tensor):
        return part
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape that a parameter has when it is gathered."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextlib.contextmanager
def held_whole(module: nn.Module) -> Iterator[None]:
    """Inside, what ZeRO-3 has split of a module is whole, and calls of the module are unknown to DeepSpeed.

    Every rank must come here, but may call the module as often as its own batch asks for.
    """
    if not any(hasattr(p, "ds_id") for p in module.parameters()):
        yield
        return
    with gathered(module.parameters()), _without_hooks(module):
        yield


def gathered(parameters: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Inside, those that ZeRO-3 has split are whole. Every rank must come here."""
    split: list[Any] = [p for p in parameters if hasattr(p, "ds_id")]
    return sys.modules["deepspeed"].zero.GatheredParameters(split) if split else contextlib.nullcontext()


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, DeepSpeed hears nothing of calls of the module: it holds their order to be the same on all ranks."""
    standing = [hooks for part in module.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks)]
    before = [dict(hooks) for hooks in standing]
    for hooks in standing:
        for key in [key for key, hook in hooks.items() if _is_from(hook, "deepspeed.")]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, all_of_them in zip(standing, before, strict=True):
            hooks.clear()
            hooks.update(all_of_them)
