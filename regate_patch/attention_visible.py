"""Attention of each row's active positions over all that its row shows, computed or not; rows one after the other.

On the CPU row by row, with as many products as a row has positions to attend to and to be attended (`attend_by_rows`).
Elsewhere under one mask, queries filled up to as many as the longest row has (`attend_filled`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library

from regate_patch.attention import differentiable, dtype_of

_aten = torch.ops.aten
_QUERIES = 256  # that are taken at once


def by_rows(query: Tensor) -> bool:
    """Which of the two is it on the query's device?"""
    return query.device.type == "cpu"


def attend_by_rows(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, counts: Tensor, visible: Tensor, scale: float | None
) -> Tensor:
    """Attention of T positions of B rows that follow one another, in causal order.

    Args:
        query: [1, H, T, D], in ascending order within a row.
        key, value: [B, G, S, D], H a multiple of G: each head of theirs serves H / G queries' heads in a row.
        places: [T] int64, where in its row each query stands.
        counts: [B] int64 on the CPU, how many queries each row has.
        visible: [B, S] bool, what may be seen; each query sees itself.
        scale: of the products; None is D ** -0.5.

    Returns:
        [1, H, T, D].
    """
    query, key, value = _alike(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = _attend(query, key, value, places, counts, visible, scale)[0]
    return result


def attend_filled(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, slots: Tensor, seen: Tensor, scale: float | None
) -> Tensor:
    """The same by any kernel, under what `may_see` gives for the `slots` [T] of rows `rows` [T]."""
    query, key, value = _alike(query, key, value)
    b, h, _, d = key.shape
    filled = query.new_zeros(b, seen.shape[2], h, d).index_put((rows, slots), query[0].transpose(0, 1))
    output = torch.nn.functional.scaled_dot_product_attention(
        filled.transpose(1, 2), key, value, attn_mask=seen, scale=scale
    )
    return output.transpose(1, 2)[rows, slots].transpose(0, 1)[None]


def may_see(rows: Tensor, places: Tensor, slots: Tensor, longest: int, visible: Tensor) -> Tensor:
    """A mask [B, 1, K, S] for queries that stand at `slots` [T], below K = `longest`, of rows `rows` [T].

    Fillings see everything, and nobody reads them. `places` and `visible` as in `attend_by_rows`.
    """
    b, s = visible.shape
    last = places.new_full((b, longest), s).index_put((rows, slots), places)[..., None]
    return ((torch.arange(s, device=places.device) <= last) & (visible[:, None] | (last == s)))[:, None]


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the type that attention is taken in, and with as many heads each: kernels under a mask share none."""
    query, key, value = (x.to(dtype_of(query)) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return query, key, value


def _parts(counts: Tensor, places: Tensor, visible: Tensor, dtype: torch.dtype) -> Iterator[tuple[Any, Any, Any]]:
    """Queries of a row, as many as are taken at once: which these are, which keys they need, what is added to scores.

    The first two index tensors [1, H, T, ..] and [B, H, S, ..]; the last, [1, 1, n, keys], is None where it says causal
    order alone. The kernel computes what a mask hides: few queries at a time, which need no later keys, are faster.
    """
    every, end = slice(None), 0
    for row, n in enumerate(counts.tolist()):
        begin, end = end, end + n
        if not n:
            continue
        if int(places[end - 1]) + 1 == n and bool(visible[row, :n].all()):
            yield (every, every, slice(begin, end)), (slice(row, row + 1), every, slice(n)), None
            continue
        for own in places[begin:end].split(_QUERIES):
            at, begin, seen = slice(begin, begin + len(own)), begin + len(own), int(own[-1]) + 1
            hidden = (torch.arange(seen, device=own.device) > own[:, None]) | ~visible[row, :seen]
            mask = hidden.to(dtype).masked_fill_(hidden, -torch.inf)[None, None]
            yield (every, every, at), (slice(row, row + 1), every, slice(seen)), mask


@library.custom_op("regate::attend_visible", mutates_args=(), device_types="cpu")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, counts: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of the softmax's sums [1, H, T]."""
    result, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_wide(query))
    for at, of, mask in _parts(counts, places, visible, query.dtype):
        result[at], sums[at] = _aten._scaled_dot_product_flash_attention_for_cpu(
            query[at],
            key[of],
            value[of],
            0.0,
            mask is None,
            attn_mask=mask,
            scale=scale,
        )
    return result, sums


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, counts: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_wide(query))


def _wide(query: Tensor) -> torch.dtype:
    return query.dtype if query.dtype == torch.float64 else torch.float32


@library.custom_op("regate::attend_visible_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, places: Tensor, counts: Tensor, visible: Tensor,
    output: Tensor, sums: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    by_query, by_key, by_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for at, of, mask in _parts(counts, places, visible, query.dtype):
        by_query[at], of_key, of_value = (
            _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[at], query[at], key[of], value[of], output[at],
                sums[at], 0.0, mask is None, attn_mask=mask, scale=scale,
            )
        )  # fmt: skip
        by_key[of] += of_key
        by_value[of] += of_value
    return by_query, by_key, by_value


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, places: Tensor, counts: Tensor, visible: Tensor,
    output: Tensor, sums: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _remember(ctx: Any, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        query, key, value, places, counts, visible, *_others = ctx.saved_tensors

        def parts(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Any, ...]]:
            found = _parts(counts, places, visible, query.dtype)
            return ((query[at], key[of], value[of], mask) for at, of, mask in found)

        return (*differentiable(grad, (query, key, value), parts, ctx.scale), *[None] * 4)
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale), *[None] * 4)


_attend.register_autograd(_differentiate, setup_context=_remember)
