"""Which positions the decoder computes right now.

The rewritten graphs read the active positions when they run, not when they are built, so one compiled
artefact serves every choice. They are held in a context variable: nested, thread- and task-safe.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regate_patch.errors import ActiveIndexError


@dataclass(frozen=True)
class Active:
    """Active positions of one batch.

    Attributes:
        index: [B, K] int64, distinct positions in each row, ascending where `valid`; a row with fewer than K
            active positions is filled at its end with inactive ones, so that K is one number for the batch.
        valid: [B, K] bool, False on that filling. What is computed there is never seen and never kept.
        ran: the `Rewrite`s that ran on these positions, one entry per run.
    """

    index: Tensor
    valid: Tensor
    ran: list[Any] = field(default_factory=list, compare=False)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Active:
        """From `mask` [B, S] bool, True where a position is computed."""
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ActiveIndexError(f"an active mask must be [B, S] bool, got {list(mask.shape)} {mask.dtype}")
        count_B1 = mask.sum(1, keepdim=True)
        k = max(int(count_B1.max()), 1) if mask.numel() else 0
        if k == 0:
            raise ActiveIndexError(f"an active mask must have at least one position, got {list(mask.shape)}")
        # A stable sort of "inactive" puts active positions first, in order, then inactive ones as filling.
        index = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :k].contiguous()
        return cls(index, torch.arange(k, device=mask.device) < count_B1)

    @classmethod
    def from_index(cls, index: Tensor, length: int | None = None) -> Active:
        """From `index` [B, K] integer, ascending in each row; rows may end in -1 (nothing there).

        With -1 in it, `length` (the decoder's S) is needed to choose the filling.
        """
        if index.dim() != 2 or index.dtype.is_floating_point or index.dtype == torch.bool:
            raise ActiveIndexError(f"an active index must be [B, K] of integers, got {list(index.shape)} {index.dtype}")
        index = index.long()
        valid = index >= 0
        steps_up = (index[:, 1:] > index[:, :-1]) | ~valid[:, 1:]
        fills_end = valid[:, :-1] | ~valid[:, 1:]
        if not bool((steps_up & fills_end).all()):
            raise ActiveIndexError(
                "an active index must ascend in each row without repeats (causal order is kept by order), "
                "with -1 only at the end"
            )
        if bool(valid.all()):
            return cls(index.contiguous(), valid)
        if length is None:
            raise ActiveIndexError("an index with -1 needs `length`, the decoder's sequence length")
        mask = torch.zeros(index.shape[0], length + 1, dtype=torch.bool, device=index.device)
        mask.scatter_(1, torch.where(valid, index, length), True)
        return cls.from_mask(mask[:, :length])


_ACTIVE: contextvars.ContextVar[Active | None] = contextvars.ContextVar("regate_active", default=None)


def current() -> Active | None:
    """The active positions in force here, or None: then every decoder runs as it was."""
    return _ACTIVE.get()


@contextlib.contextmanager
def active(positions: Tensor | Active, *, length: int | None = None) -> Iterator[Active]:
    """Compute only these positions in every patched decoder called inside.

    Args:
        positions: [B, K] int64, ascending positions per row (`-1` at the end of rows that have fewer; then
            give `length`), or [B, S] bool, True where computed, or an `Active` made earlier.
        length: S, the decoder's sequence length.

    Raises:
        ActiveIndexError: wrong shape or dtype, positions that repeat or do not ascend.

    Example:
        >>> import torch
        >>> with active(torch.tensor([[0, 2], [1, 3]])) as chosen:
        ...     chosen.index.shape
        torch.Size([2, 2])
    """
    if isinstance(positions, Active):
        chosen = positions
    elif positions.dtype == torch.bool:
        chosen = Active.from_mask(positions)
    else:
        chosen = Active.from_index(positions, length)
    token = _ACTIVE.set(chosen)
    try:
        yield chosen
    finally:
        _ACTIVE.reset(token)
