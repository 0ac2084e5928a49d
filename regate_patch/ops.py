"""The operations that the rewriter inserts. Plain torch, differentiable, shape-polymorphic.

Shapes: B batch, S all positions, K computed positions, D any other axis. `index` is [B, K] int64 and `valid`
[B, K] bool as in `regate_patch.context.Active`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _along(index: Tensor, x: Tensor, dim: int, batch_dim: int) -> Tensor:
    """`index` as a `torch.gather` index for `x` along `dim`: an expanded view, nothing is copied."""
    shape = [1] * x.dim()
    shape[batch_dim], shape[dim] = index.shape
    sizes = list(x.shape)
    sizes[dim] = index.shape[1]
    return _rows(index, dim, batch_dim).reshape(shape).expand(sizes)


def _rows(per_row: Tensor, dim: int, batch_dim: int) -> Tensor:
    """[B, K] in the order in which `batch_dim` and `dim` stand."""
    return per_row if batch_dim < dim else per_row.t()


def gather_tokens(x: Tensor, index: Tensor, dims: tuple[int, ...], batch_dim: int, rank: int) -> Tensor:
    """`x` restricted to the active positions along each axis of `dims`.

    A value shared by all rows (size 1 on the batch axis, or fewer axes than `rank`) becomes one per row,
    because every row computes positions of its own. `dims` and `batch_dim` count axes at `rank`.
    """
    while x.dim() < rank:
        x = x.unsqueeze(0)
    if x.shape[batch_dim] != index.shape[0]:
        sizes = [-1] * x.dim()
        sizes[batch_dim] = index.shape[0]
        x = x.expand(sizes)
    for dim in dims:
        if index.shape[0] == 1:  # whole slices are moved, several times as fast on a CPU
            x = x.index_select(dim, index[0])
        else:
            x = torch.gather(x, dim, _along(index, x, dim, batch_dim))
    return x


def scatter_tokens(
    x: Tensor, index: Tensor, valid: Tensor, y: Tensor, x_at_index: Tensor, dim: int, batch_dim: int
) -> Tensor:
    """`x` with `y` at the active positions along `dim`; where not `valid`, `x` stays as it was."""
    shape = [1] * y.dim()
    shape[batch_dim], shape[dim] = valid.shape
    mask = _rows(valid, dim, batch_dim).reshape(shape)
    new = torch.where(mask, y, x_at_index)
    if index.shape[0] == 1:
        return x.index_copy(dim, index[0], new)
    return torch.scatter(x, dim, _along(index, x, dim, batch_dim), new)


def scatter_on_zeros(y: Tensor, index: Tensor, valid: Tensor, length: int, dim: int = 1, batch_dim: int = 0) -> Tensor:
    """[.., B, .., K, ..] as [.., B, .., S, ..]: `y` at the active positions along `dim`, zero elsewhere."""
    sizes = list(y.shape)
    sizes[dim] = length
    nothing = torch.zeros_like(y)
    return scatter_tokens(y.new_zeros(sizes), index, valid, y, nothing, dim, batch_dim)


def scatter_flat_on_zeros(y: Tensor, index: Tensor, valid: Tensor, length: int) -> Tensor:
    """[B*K, ...] as [B*S, ...], as `scatter_on_zeros`: for values per token that a router lays out in one list."""
    rows = y.reshape(*index.shape, *y.shape[1:])
    return scatter_on_zeros(rows, index, valid, length).flatten(0, 1)


def in_one_row(rows: Tensor, places: Tensor, length: int) -> Tensor:
    """Positions `places` [T] of rows `rows` [T] as [1, T] of one row, in which the others follow the first."""
    return (rows * length + places)[None]


def all_true(index: Tensor) -> Tensor:
    """`valid` of an index that has no filling."""
    return torch.ones_like(index, dtype=torch.bool)


def one_row(x: Tensor, rows: int, dim: int, batch_dim: int, rank: int) -> Tensor:
    """[.., B, .., S, ..] as [.., 1, .., B * S, ..]: the batch is one row. Axes are counted at `rank`.

    A value shared by all rows is repeated for each.
    """
    while x.dim() < rank:
        x = x.unsqueeze(0)
    sizes = [-1] * rank
    sizes[batch_dim] = rows
    x = x.expand(sizes)
    before = dim - 1 if batch_dim < dim else dim
    return x.movedim(batch_dim, before).flatten(before, before + 1).unsqueeze(batch_dim)


def in_rows(x: Tensor, rows: int, dim: int, batch_dim: int) -> Tensor:
    """The opposite of `one_row`."""
    before = dim - 1 if batch_dim < dim else dim
    return x.squeeze(batch_dim).unflatten(before, (rows, -1)).movedim(before, batch_dim)


def put_in_rows(x: Tensor, rows: Tensor, places: Tensor, y: Tensor) -> Tensor:
    """`x` [B, G, S, D] with `y` [1, G, T, D] at `places` [T] of rows `rows` [T]."""
    return x.transpose(1, 2).index_put((rows, places), y[0].transpose(0, 1)).transpose(1, 2)


def select_tokens(x: Tensor, mask: Tensor, index: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Rows of `x` along `dim`, one per True in `mask` [B, S], that belong to active positions.

    For features that a model lays out by `mask` (such as deepstack features of visual tokens, [N, D]).
    """
    active = torch.zeros_like(mask).scatter(1, index, valid)
    order = mask.flatten().cumsum(0) - 1  # the row of `x` that belongs to a position, where there is one
    return x.index_select(dim, order[(active & mask).flatten()])


def masked_scatter_tokens(x: Tensor, mask: Tensor, source: Tensor, index: Tensor) -> Tensor:
    """`x.masked_scatter(mask, source)` on active positions, `mask` [B, S, ...] and `source` at full length.

    `source` lists values for the mask's tokens in order; those of inactive ones are passed over.
    """
    full = torch.broadcast_to(mask, (*mask.shape[:2], *x.shape[2:]))
    placed = torch.zeros(full.shape, dtype=x.dtype, device=x.device).masked_scatter(full, source)
    rank = x.dim()
    return torch.where(gather_tokens(full, index, (1,), 0, rank), gather_tokens(placed, index, (1,), 0, rank), x)


def only_valid(mask: Tensor, valid: Tensor) -> Tensor:
    """A gathered boolean [B, K, ...] token mask, False on the filling."""
    return mask & valid.reshape(valid.shape + (1,) * (mask.dim() - 2))


def _restricted(mask: Tensor | None, seen: Tensor, idle: Tensor) -> Tensor:
    """An attention mask, or scores, that hides everything but what is `seen`, too; nothing from `idle` queries."""
    if mask is None:
        return seen | idle
    if mask.dtype == torch.bool:
        return (mask & seen) | idle
    hidden = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.where(idle, torch.zeros_like(hidden), hidden)


def hide_filling(mask: Tensor | None, valid: Tensor, rank: int, sinks: int = 0) -> Tensor:
    """An attention mask (or scores) [B, ..., Q or 1, K + sinks] under which no real query sees a key of the filling.

    The filling's own queries see everything: nobody reads them, and no row of the softmax is left empty. `sinks`
    columns after the keys belong to no position (learned attention sinks). Without a mask there are `rank` axes.
    """
    middle = (1,) * ((rank if mask is None else mask.dim()) - 2)
    keys = valid.reshape(valid.shape[:1] + middle + valid.shape[1:])
    idle = ~keys.transpose(-1, -2)
    keys = torch.nn.functional.pad(keys, (0, sinks), value=True) if sinks else keys
    return _restricted(mask, keys, idle)


def hide_invisible(
    mask: Tensor | None, visible: Tensor, index: Tensor, valid: Tensor, causal: bool, rank: int
) -> Tensor:
    """An attention mask [B, .., K, S] of `rank` axes under which active queries see what is visible, and no position
    later than themselves where `causal`.

    Args:
        mask: [B or 1, .., K or 1, S], bool or added to scores: what else it hides; None for nothing.
        visible: [B, S] bool.
        index, valid: [B, K]. The filling's queries see everything: nobody reads them.
        causal: is the kernel's own order to be put into the mask?
        rank: of the query.
    """
    seen = visible[:, None, :]
    if causal:
        seen = seen & (torch.arange(visible.shape[1], device=index.device) <= index[..., None])
    seen, idle = (x.reshape(x.shape[:1] + (1,) * (rank - 3) + x.shape[1:]) for x in (seen, ~valid[..., None]))
    return _restricted(mask, seen, idle)


def choose_no_filling(hidden: Tensor, valid: Tensor) -> Tensor:
    """A gathered [B, ..., K, K] mask that is True where a key is hidden, True for every key of the filling too."""
    keys = valid.reshape(valid.shape[:1] + (1,) * (hidden.dim() - 2) + valid.shape[1:])
    return hidden | ~keys


def repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, G, S, D] as [B, H, S, D]: for each head of `query` [B, H, K, D] its own."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def write(target: Tensor, key: Any, value: Any) -> Tensor:
    """`target[key] = value`, as an expression whose value is the written tensor."""
    target[key] = value
    return target


def after(value: Tensor, written: Tensor) -> Tensor:
    """`value`, read after `written` (a view of it) has been written."""
    return value
