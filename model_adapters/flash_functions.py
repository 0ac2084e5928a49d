"""What computes the same as flash attention's functions, of the same arguments, by operations that can be followed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_adapters.errors import AdapterError

_KINDS = ("", "_qkvpacked", "_kvpacked")
_IN_ROWS = {f"flash_attn{kind}_func" for kind in _KINDS}  # [B, S, H, D]
_END_TO_END = {f"flash_attn_{name}{kind}_func" for kind in _KINDS for name in ("varlen", "unpadded")}  # [B * S, H, D]
NAMES = _IN_ROWS | _END_TO_END
_FOLLOWED = {"q", "k", "v", "qkv", "kv", "causal", "window_size", "softmax_scale", "softcap", "dropout_p"}
_FOLLOWED |= {f"{name}{of}" for name in ("cu_seqlens", "max_seqlen") for of in ("", "_q", "_k")}  # told beside the call
_OF_THE_KERNEL = {"deterministic", "num_splits", "pack_gqa", "sm_margin", "zero_tensors"}  # how, not what it computes


@dataclass
class Told:
    """What attention is told beside the decoder's call.

    Attributes:
        x: [B, S, ...], what the decoder is called with.
        places: int64 [B, S], the place of each position within its sample.
        packed: do rows hold several samples?
    """

    x: Tensor
    places: Tensor
    packed: bool = False


NOTHING = torch.zeros(0)
TOLD = Told(NOTHING, NOTHING)


@functools.cache
def followed_by(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """What computes the same as one of flash attention's functions, by operations that can be followed."""
    own_name = function.__name__
    parameters = inspect.signature(function).parameters
    names, defaults = tuple(parameters), {name: parameter.default for name, parameter in parameters.items()}
    end_to_end, packed = own_name in _END_TO_END, next((kind for kind in _KINDS[1:] if kind in own_name), "")

    def followed(*args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, argument in given.items():
            if not (name in _FOLLOWED or name in _OF_THE_KERNEL or _is_off(argument, defaults.get(name))):
                raise AdapterError(
                    f"{own_name} is called with `{name}`, which cannot be followed: call it without, or let this "
                    "decoder's attention be torch's scaled_dot_product_attention"
                )
        if packed == "_qkvpacked":
            q, k, v = given["qkv"].unbind(-3)
        elif packed == "_kvpacked":
            q, (k, v) = given["q"], given["kv"].unbind(-3)
        else:
            q, k, v = given["q"], given["k"], given["v"]
        if end_to_end:
            q, k, v = (x[None] if len(TOLD.x) == 1 else x.unflatten(0, TOLD.x.shape[:2]) for x in (q, k, v))
        output = _attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            causal=given.get("causal", False), window=given.get("window_size") or (-1, -1),
            scale=given.get("softmax_scale"), softcap=given.get("softcap") or 0.0,
            dropout=given.get("dropout_p") or 0.0,
        ).transpose(1, 2)  # fmt: skip
        return output.flatten(0, 1) if end_to_end else output

    return followed


def _is_off(argument: Any, default: Any) -> bool:
    """Does an argument say no more than if it were not given? Functions of other releases have others."""
    if argument is None or argument is False:
        return True
    return not isinstance(argument, Tensor) and bool(argument == default)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool, window: tuple[int | None, int | None], scale: float | None, softcap: float, dropout: float,
) -> Tensor:  # fmt: skip
    """[B, H, S, D]; keys and values may have fewer heads."""
    left, right = (-1 if side is None or side < 0 else side for side in window)
    places = TOLD.places
    torch._check(places.shape[0] == q.shape[0])  # to the compiler they are numbers that have nothing to do
    torch._check(places.shape[1] == q.shape[2])  # with one another, until it is told
    plain = causal and left < 0 and not TOLD.packed
    mask = None if plain else _visible(places, causal=causal, left=left, right=right)
    if k.shape[1] != q.shape[1] and (mask is not None or softcap):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if softcap:
        return _capped(q, k, v, _visible(places, causal=causal, left=left, right=right), scale, softcap, dropout)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout, is_causal=plain, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def _visible(places: Tensor, *, causal: bool, left: int, right: int) -> Tensor:
    """Bool [B or 1, 1, S, S], True where a query sees a key."""
    along = torch.arange(places.shape[1], device=places.device)
    distance = along[:, None] - along[None, :]
    visible = distance >= (0 if causal else -right if right >= 0 else -places.shape[1])
    if left >= 0:
        visible = visible & (distance <= left)
    visible = visible[None, None]
    if TOLD.packed:
        sample = (torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        visible = visible & (sample[:, None, :, None] == sample[:, None, None, :])
    return visible


def _capped(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, softcap: float, dropout: float
) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.matmul(F.dropout(weights, dropout), v)
