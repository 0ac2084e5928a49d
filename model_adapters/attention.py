"""Attention kernels that cannot be followed on part of the positions, and what stands in for them in gated forwards.

Flash attention's callers branch on data (is anything padded, do position ids restart), and flex attention's block masks
are made for one sequence length. Each computes the same function as `scaled_dot_product_attention` or the softmax that
transformers writes out, of the same queries and the same mask in another form. So while a gated forward runs, the
language model's configs name one of those, for its layers and for whoever makes their masks. Once no padding is left in
the active positions, the engine finds the mask to be causal order alone, and SDPA takes torch's own flash kernel.

Outside, and where a step runs the decoder as it is, the user's choice stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from model_adapters.conventional import way_to
from model_adapters.replaced import replaced

_IMPLEMENTATION = "_attn_implementation_internal"  # of transformers' configs, behind `_attn_implementation`


def stand_in(decoder: nn.Module) -> str | None:
    """The implementation that computes what `decoder`'s does and can be followed; None where its own can be."""
    config = getattr(decoder, "config", None)
    own = getattr(config, _IMPLEMENTATION, None)
    if own is None or not ("flash" in own or "flex" in own):
        return None
    softcap = getattr(config, "attn_logit_softcapping", None)  # which SDPA has not
    return "sdpa" if getattr(decoder, "_supports_sdpa", True) and softcap is None else "eager"


@contextlib.contextmanager
def followable_attention(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder of `model`, or this copy of it, computes its attention by what can be followed."""
    name = stand_in(decoder)
    if name is None:
        yield
        return
    with contextlib.ExitStack() as scope:
        for config in _configs(model, decoder):  # past the setter, which would change encoders, too
            scope.enter_context(replaced(config, **{_IMPLEMENTATION: name}))
        yield


def _configs(model: nn.Module, decoder: nn.Module) -> list[Any]:
    """Those that layers of `decoder` read, and the modules around it, which may make their masks."""
    around = way_to(model, decoder)[:-1]
    configs = (getattr(module, "config", None) for module in (*around, *decoder.modules()))
    return list({id(config): config for config in configs if getattr(config, _IMPLEMENTATION, None)}.values())
