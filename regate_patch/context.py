"""Which positions the decoder computes right now.

The rewritten graphs read the active positions when they run, not when they are built, so one compiled
artefact serves every choice. They are held in a context variable: nested, thread- and task-safe.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from regate_patch.errors import ActiveIndexError
from regate_patch.transfer import to_device

Laid = tuple[Tensor, Tensor, Tensor, int, Tensor, Tensor]


@dataclass(frozen=True)
class Active:
    """Active positions of one batch.

    Attributes:
        index: [B, K] int64, distinct positions in each row, ascending where `valid`; a row with fewer than K
            active positions is filled at its end with inactive ones, so that K is one number for the batch.
        valid: [B, K] bool, False on that filling. What is computed there is never seen and never kept.
        read: which of them, counted from 0 to K - 1, somebody reads in the decoder's output; None is all. The output at
            others is then of no use. The first call in which a graph runs computes it all the same.
        length: more than any of these positions, and at most the decoder's S; 0 if nobody knows.
        counts: how many each row has, where a host knows it.
        samples: how many each sample has, row after row, where rows may hold several and a host knows it. A sample's
            position ids go on by one, and the next one's do not go on from there.
        visible: bool [B, S], positions that active ones may see, themselves among them: those that are not computed as
            they are in front of the first block. None hides what is not computed.
        ran: the `Rewrite`s that ran on these positions, one entry per run.
        laid: what `end_to_end` has found out, once for all graphs that ask.
        streams: where one call runs several graphs that see what is not computed, the stream in front of each of them.
        masks: where one call runs several graphs, what is proven of the masks that they make
            (`regate_patch.passes.causal.Proven`), and their versions then.
    """

    index: Tensor
    valid: Tensor
    read: Active | None = None
    length: int = 0
    counts: tuple[int, ...] | None = None
    samples: tuple[int, ...] | None = None
    visible: Tensor | None = None
    ran: list[Any] = field(default_factory=list, init=False, compare=False)  # of this one alone: `replace` begins anew
    laid: dict[bool, Laid] = field(default_factory=dict, init=False, compare=False, repr=False)
    streams: list[Tensor | None] = field(default_factory=list, init=False, compare=False, repr=False)
    masks: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary, init=False, compare=False, repr=False)

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`index`, `valid`, and the same of what is read."""
        if self.read is not None:
            return self.index, self.valid, self.read.index, self.read.valid
        everything = torch.arange(self.index.shape[1], device=self.index.device).repeat(len(self.index), 1)
        return self.index, self.valid, everything, self.valid.clone()  # one tensor given twice would be compiled for

    @property
    def longest(self) -> int:
        """K."""
        return self.index.shape[1]

    @property
    def of_rows(self) -> Tensor:
        """How many each row has, int64 [B] on the CPU."""
        return self.valid.sum(1).cpu() if self.counts is None else torch.tensor(self.counts, device="cpu")

    @property
    def empty(self) -> bool:
        """Is it known that there is none?"""
        return self.counts is not None and not any(self.counts)

    def end_to_end(self, *, apart: bool) -> Laid:
        """The T active positions of all rows, one after the other.

        Args:
            apart: samples of one row are to be told apart; else rows alone are.

        Returns:
            Whose they are [T], their index [T], where rows or samples begin [N + 1] int32, how many the largest has,
            which of the T are read [R], and how many of its row stand before each [T].
        """
        if apart not in self.laid:
            self.laid[apart] = self._lay(apart)
        return self.laid[apart]

    def _lay(self, apart: bool) -> Laid:
        rows, slots, first = _one_by_one(self)
        read = torch.arange(len(rows), device=rows.device)
        if self.read is not None:
            whose, which, _ = _one_by_one(self.read)
            read = first[whose] + self.read.index[whose, which]
        longest = self.longest
        if apart and self.samples is not None:
            ends = torch.tensor(self.samples, device="cpu").cumsum(0)
            first, longest = to_device(torch.nn.functional.pad(ends, (1, 0)), rows.device), max(self.samples)
        return rows, self.index[rows, slots], first.int(), longest, read, slots

    def reading(self, mask: Tensor, *, counts: Sequence[int] | None = None) -> Active:
        """These positions, of which only those in `mask` [B, S] bool are read; `counts` as in `from_mask`."""
        read = Active.from_mask(mask.gather(1, self.index) & self.valid, counts=counts)
        return replace(self, read=read)

    def to(self, device: torch.device) -> Active:
        """The same on `device`."""
        read = None if self.read is None else self.read.to(device)
        index, valid = to_device(self.index, device), to_device(self.valid, device)
        visible = None if self.visible is None else to_device(self.visible, device)
        return replace(self, index=index, valid=valid, read=read, visible=visible)

    @classmethod
    def from_mask(cls, mask: Tensor, *, counts: Sequence[int] | None = None) -> Active:
        """From `mask` [B, S] bool, True where a position is computed.

        `counts` is the number of them in each row, from a host that knows it; else the mask is waited for.
        """
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ActiveIndexError(f"an active mask must be [B, S] bool, got {list(mask.shape)} {mask.dtype}")
        of_rows = mask.sum(1)
        counts = of_rows.tolist() if counts is None else counts
        if not counts or not mask.shape[1]:
            raise ActiveIndexError(f"an active mask must have at least one position, got {list(mask.shape)}")
        k = max(*counts, 1)
        # A stable sort of "inactive" puts active positions first, in order, then inactive ones as filling.
        index = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :k].contiguous()
        valid = torch.arange(k, device=mask.device) < of_rows[:, None]
        return cls(index, valid, length=mask.shape[1], counts=tuple(counts))

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
            return cls(index.contiguous(), valid, length=int(index.max()) + 1 if index.numel() else 0)
        if length is None:
            raise ActiveIndexError("an index with -1 needs `length`, the decoder's sequence length")
        mask = torch.zeros(index.shape[0], length + 1, dtype=torch.bool, device=index.device)
        mask.scatter_(1, torch.where(valid, index, length), True)
        return cls.from_mask(mask[:, :length])


def _one_by_one(active: Active) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of each position that is valid, and how many there are before each row; not waited for where a
    host knows how many there are."""
    known, device = active.counts, active.index.device
    counts = active.valid.sum(1) if known is None else to_device(torch.tensor(known, device="cpu"), device)
    total = int(counts.sum()) if known is None else sum(known)
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    rows = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=total)
    return rows, torch.arange(total, device=device) - first[rows], first


Rule = Callable[..., Active]
_ACTIVE: contextvars.ContextVar[Active | Rule | None] = contextvars.ContextVar("regate_active", default=None)


def current() -> Active | Rule | None:
    """The active positions in force here, or None: then every decoder runs as it was."""
    return _ACTIVE.get()


@contextlib.contextmanager
def active(positions: Tensor | Active | Rule, *, length: int | None = None) -> Iterator[Active | Rule]:
    """Compute only these positions in every patched decoder called inside.

    Args:
        positions: [B, K] int64, ascending positions per row (`-1` at the end of rows that have fewer; then
            give `length`), or [B, S] bool, True where computed, or an `Active` made earlier, or a function that gives
            one, called with the decoder's arguments each time it runs.
        length: S, the decoder's sequence length.

    Raises:
        ActiveIndexError: wrong shape or dtype, positions that repeat or do not ascend.

    Example:
        >>> import torch
        >>> with active(torch.tensor([[0, 2], [1, 3]])) as chosen:
        ...     chosen.index.shape
        torch.Size([2, 2])
    """
    chosen: Active | Rule
    if isinstance(positions, Active) or not isinstance(positions, Tensor):
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
