"""In how many rows the teacher reads samples: one each, or, where its attention takes a single row, all end to end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regate_patch import Active


def end_to_end(
    ids: Tensor, positions: Tensor | None, computed: Tensor, read: Tensor
) -> tuple[Tensor, Tensor, Tensor, Active]:
    """What a decoder is given that is told where samples begin by boundaries in the place of the mask.

    Args:
        ids: int64 [N, L].
        positions: int64 [N, L] or [n, N, L]; None counts from each row's beginning.
        computed, read: bool [N, L], on the CPU.

    Returns:
        ids [1, N * L], boundaries int32 [1, N + 1], positions [1, N * L] or [n, 1, N * L], and what is computed.
    """
    rows, length = ids.shape
    first = torch.arange(rows + 1, dtype=torch.int32, device=ids.device)[None] * length
    if positions is None:
        positions = torch.arange(length, device=ids.device).repeat(rows, 1)
    active = Active.from_mask(computed.view(1, -1)).reading(read.view(1, -1))
    active = replace(active, samples=tuple(computed.sum(1).tolist()))
    return (
        ids.view(1, -1),
        first,
        positions.expand(*positions.shape[:-2], rows, length).flatten(-2)[..., None, :],
        active,
    )
