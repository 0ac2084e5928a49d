"""Causal attention over samples laid end to end, each of which sees itself alone.

On CUDA in half precision `torch.nn.attention.varlen`; on the CPU torch's flash kernel, sample by sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, library
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

_aten = torch.ops.aten
_AMPERE, _WIDEST = (8, 0), 256  # devices and heads for which flash attention has kernels
_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11


def serves(query: Tensor, value: Tensor) -> bool:
    """Is there a kernel for heads like these? On CUDA it is flash attention's, and none that SDPA falls back on."""
    width = query.shape[-1]
    if query.device.type != "cuda":
        return width == value.shape[-1] and query.device.type in ("cpu", "meta")
    half = dtype_of(query) in (torch.float16, torch.bfloat16)
    new_enough = torch.cuda.get_device_capability(query.device) >= _AMPERE
    return half and new_enough and width == value.shape[-1] and width % 8 == 0 and width <= _WIDEST


def dtype_of(query: Tensor) -> torch.dtype:
    """In which attention is taken: under autocast, as `scaled_dot_product_attention` takes it."""
    device = query.device.type
    casts = query.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else query.dtype


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
    """Attention of N samples that follow one another along T.

    Args:
        query: [1, H, T, D].
        key, value: [1, G, T, D], H a multiple of G: each head of theirs serves H / G queries' heads in a row.
        starts: [N + 1] int32, where samples begin, and T.
        longest: of the samples.
        scale: of the products; None is D ** -0.5.

    Returns:
        [1, H, T, D].
    """
    query, key, value = (x.to(dtype_of(query)) for x in (query, key, value))
    options: dict[str, Any] = {}
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cuda" and _TAKES_GROUPS:
        options = {"enable_gqa": True}
    elif grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if query.device.type != "cuda":
        result: Tensor = _attend(query, key, value, starts, query.shape[-1] ** -0.5 if scale is None else scale)[0]
        return result
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), **options)
    assert isinstance(output, Tensor)
    return output.transpose(0, 1)[None]


def differentiable(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    parts: Callable[[Tensor, Tensor, Tensor], Iterable[tuple[Any, ...]]],
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients that are to be differentiated themselves (`create_graph=True`), which no kernel's backward can be.

    Args:
        grad: by the result, [1, H, T, D].
        inputs: query, key and value.
        parts: what of these makes one part of the result along T after the other, and the mask of each; None is causal.
        scale: of the products.
    """
    views = [x.view_as(x) for x in inputs]  # none of which another was made of, as a value may be of its key
    with sdpa_kernel(SDPBackend.MATH):
        found = [
            scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
            for q, k, v, mask in parts(*views)
        ]
    if not found:
        return tuple(torch.zeros_like(x) for x in inputs)
    needed = [x for x in views if x.requires_grad]
    grads = iter(torch.autograd.grad(torch.cat(found, 2), needed, grad, create_graph=True))
    return tuple(next(grads) if x.requires_grad else None for x in inputs)


def _samples(starts: Tensor, *along: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each sample's part of tensors [1, H, T, ...]."""
    lengths = [length for length in starts.diff().tolist() if length]
    return zip(*(x.split(lengths, 2) for x in along), strict=True)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Parts [1, H, t, D] one behind the other, [1, H, T, D], laid out as the kernel lays out each.

    A position's heads lie together, so that nothing is copied where a model puts them side by side.
    """
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def _heads_inside(like: Tensor) -> Tensor:
    """An empty tensor of this shape, laid out like that."""
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


# Compilers keep what they made by an operator's name: one whose results are laid out otherwise has another name.
@library.custom_op("regate::attend_laid", mutates_args=(), device_types="cpu")
def _attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of the softmax's sums [1, H, T]."""
    parts = [
        _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        for q, k, v in _samples(starts, query, key, value)
    ]
    if not parts:
        return _heads_inside(query), query.new_empty(query.shape[:3])
    return _joined(part[0] for part in parts), torch.cat([part[1] for part in parts], 2).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    return _heads_inside(query), query.new_empty(query.shape[:3], dtype=wide)


@library.custom_op("regate::attend_laid_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    parts = [
        _aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, s, 0.0, True, scale=scale)
        for g, q, k, v, o, s in _samples(starts, grad, query, key, value, output, sums)
    ]
    if not parts:
        return _heads_inside(query), _heads_inside(key), _heads_inside(value)
    by_query, by_key, by_value = (_joined(grads) for grads in zip(*parts, strict=True))
    return by_query, by_key, by_value


@_attend_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_inside(query), _heads_inside(key), _heads_inside(value)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)  # type: ignore[arg-type]
    ctx.scale = scale  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, starts, output, sums = ctx.saved_tensors  # type: ignore[attr-defined]
    scale: float = ctx.scale  # type: ignore[attr-defined]
    if torch.is_grad_enabled():

        def parts(*inputs: Tensor) -> Iterator[tuple[Any, ...]]:
            return ((*qkv, None) for qkv in _samples(starts, *inputs))

        return (*differentiable(grad, (query, key, value), parts, scale), None, None)
    return (*_attend_backward(grad, query, key, value, output, sums, starts, scale), None, None)


_attend.register_autograd(_backward, setup_context=_remember)
