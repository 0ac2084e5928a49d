"""A 4-bit copy of a decoder through bitsandbytes, for teachers that must not cost a second model's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from model_adapters.replaced import replaced
from regate.errors import ConfigError


def to_4bit(module: nn.Module) -> nn.Module:
    """Replace the linear layers of `module` by 4-bit (NF4) ones, in place; inference only.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ConfigError("teacher='4bit' needs bitsandbytes: pip install 'regate[bnb]'") from error
    for name, child in module.named_children():
        if type(child) is not nn.Linear:
            to_4bit(child)
            continue
        dtype = child.weight.dtype if child.weight.dtype.is_floating_point else torch.float32
        small = bnb.nn.Linear4bit(
            child.in_features, child.out_features, child.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        small.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        small.bias = child.bias
        setattr(module, name, small.to(child.weight.device))  # the move quantises
    return module


@contextlib.contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from repacking 4-bit weights.

    On CPUs with bfloat16 instructions it does so in place at the first call in eval mode, which cannot be captured, and
    which fails for weights narrower than a block (`bitsandbytes.nn.Linear4bit.forward`).
    """
    with contextlib.ExitStack() as scope:
        for part in module.modules():
            if getattr(part, "support_avx512bf16_for_cpu", False):
                scope.enter_context(replaced(part, support_avx512bf16_for_cpu=False))
        yield
