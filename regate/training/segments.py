"""The samples of a batch, wherever they stand: a row each, or several in a row laid end to end (packing).

    segment   the positions of one sample, whose key, teacher's text, share of labels and difficulties are its own

Whatever is scored per sample sees a batch of one row a sample (`unpack`), and what was decided goes back to where the
samples stand (`pack`). Rows that hold one sample each are their own segments, and nothing is moved.

Signs of a sample's beginning, any of which may be in the call:
    position_ids    that fall back, or, without a padding mask, do not go on by one; of several ids per token (M-RoPE),
                    the lowest, where all are alike: a video's fall back, too, but its time is ahead there; of four, the
                    first, which is the text's
    cu_seq_lens_q, cu_seqlens    where samples begin among all positions, as flash attention's kernels are told; of one
                    row also in the place of the attention mask (InternVL)
    seq_idx and the like         a number per position, the same within a sample
    attention_mask               with numbers above 1, the same within a sample (LLaMA-Factory); or [B, 1, S, S], under
                                 which a sample's first position does not see the one before it
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_adapters import Batch, Layout, conventional
from model_adapters.flash import BOUNDARIES, boundaries
from regate.errors import PackedRowsError
from regate.labels import IGNORED

_NUMBERS = ("seq_idx", "segment_ids", "sequence_ids", "document_ids")
_TEXT_FIRST = 4  # rows of position ids whose first is the text's (transformers' Qwen-VL family)


def starts(batch: Batch, layout: Layout) -> Tensor | None:
    """[B, S] bool on the device, True where a sample begins within a row; None where no sign is in the call.

    Raises:
        PackedRowsError: boundaries that do not fit the batch.
    """
    shape = layout.valid.shape
    told = boundaries(batch, (shape[0], shape[1]))
    signs = [] if told is None else [_from_boundaries(*told, shape)]
    for name in (*_NUMBERS, "attention_mask"):
        numbers = batch.get(name)
        if told is not None and told[1] is numbers:
            continue
        if isinstance(numbers, Tensor) and numbers.shape == shape and not numbers.is_floating_point():
            if numbers.dtype != torch.bool:
                signs.append(numbers.diff() != 0)
    if (mask := conventional.square_mask(batch, shape[1])) is not None:
        signs.append(~conventional.sees(mask, -1).expand(shape[0], -1))
    ids = batch.get("position_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] == shape[1] and ids.dim() in (2, 3):
        signs.append(_from_position_ids(ids, layout, leaps=batch.get("attention_mask") is None))
    if not signs:
        return None
    between = torch.stack(signs).any(0) & layout.valid[:, 1:] & layout.valid[:, :-1]
    return torch.nn.functional.pad(between, (1, 0))


def check_boundaries(batch: Batch) -> None:
    """For a decoder whose attention cannot be told boundaries, while the gate runs it: do position ids tell them?

    Raises:
        PackedRowsError: they do not.
    """
    name = next((name for name in BOUNDARIES if isinstance(batch.get(name), Tensor)), None)
    if name is not None and batch.get("attention_mask") is None and batch.get("position_ids") is None:
        raise PackedRowsError(
            f"the call says by `{name}` where packed samples begin, but not by position ids that begin again: pass "
            "position_ids, too, as transformers' DataCollatorWithFlattening does"
        )


def _from_boundaries(name: str, first: Tensor, shape: torch.Size) -> Tensor:
    of_one_row = first.dim() == 2 and len(first) == shape[0] == 1
    if not (first.dim() == 1 or of_one_row) or first.is_floating_point():
        raise PackedRowsError(
            f"`{name}` {list(first.shape)} {first.dtype} should be the first positions of samples, [n + 1] (or, of one "
            "row, [1, n + 1]) of integers from 0 to the number of positions"
        )
    marks = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=first.device)
    marks[first.flatten().long().clamp(max=shape.numel())] = True
    return marks[:-1].view(shape)[:, 1:]


def _from_position_ids(ids: Tensor, layout: Layout, *, leaps: bool) -> Tensor:
    """`leaps`: text ids that do not go on by one begin a sample, too, as transformers' masks have it."""
    several = ids.dim() == 3
    if several and len(ids) == _TEXT_FIRST:
        ids, several = ids[0], False
    alike = None
    if several:
        ids, highest = ids.amin(0), ids.amax(0)
        alike = (ids == highest)[:, 1:]
    ids = ids.expand(layout.valid.shape)
    if leaps and not several:
        return ids.diff() != 1
    again = (ids[:, 1:] == 0) & (ids[:, :-1] == 0)  # after a sample of one token; an image may have one id throughout
    if alike is None:
        return (ids.diff() < 0) | again
    return ((ids.diff() < 0) | (again & ~layout.visual[:, 1:])) & alike


@dataclass(frozen=True)
class Segments:
    """Where N samples stand in a batch [B, S]; on the CPU.

    Attributes:
        shape: (B, S).
        places: int64 [N, L], `row * S + position` of each sample's positions, ascending; None where a row is a sample.
        inside: bool [N, L], False on what fills short samples.
    """

    shape: tuple[int, int]
    places: Tensor | None = None
    inside: Tensor | None = None

    @classmethod
    def of(cls, begins: Tensor | None, shape: tuple[int, int]) -> Segments:
        """From where samples begin within rows, bool [B, S]."""
        if begins is None or not bool(begins.any()):
            return cls(shape)
        begins = begins.clone()
        begins[:, 0] = True
        first = begins.flatten().nonzero().squeeze(1)
        length = torch.diff(first, append=torch.tensor([begins.numel()]))
        along = torch.arange(int(length.max()))
        inside = along < length[:, None]
        return cls(shape, torch.where(inside, first[:, None] + along, 0), inside)

    def __len__(self) -> int:
        return self.shape[0] if self.places is None else len(self.places)

    @property
    def lengths(self) -> list[int]:
        """Positions of each sample."""
        return [self.shape[1]] * self.shape[0] if self.inside is None else self.inside.sum(1).tolist()

    @property
    def owner(self) -> Tensor:
        """int64 [B, S], the sample of each position."""
        numbers = torch.arange(len(self))[:, None]
        return self.pack(numbers.expand(len(self), self.shape[1] if self.places is None else self.places.shape[1]))

    def unpack(self, x: Tensor, fill: Any = 0) -> Tensor:
        """[..., B, S] -> [..., N, L], on any device."""
        if self.places is None or self.inside is None:
            return x
        places, inside = self.places.to(x.device), self.inside.to(x.device)
        return x.expand(*x.shape[:-2], *self.shape).flatten(-2)[..., places].masked_fill(~inside, fill)

    def pack(self, x: Tensor) -> Tensor:
        """[N, L] -> [B, S]."""
        if self.places is None or self.inside is None:
            return x
        packed = x.new_zeros(self.shape[0] * self.shape[1])
        packed[self.places[self.inside]] = x[self.inside]
        return packed.view(self.shape)

    def unpack_layout(self, layout: Layout) -> Layout:
        """A row a sample."""
        if self.places is None:
            return layout
        return replace(
            layout,
            input_ids=self.unpack(layout.input_ids),
            labels=self.unpack(layout.labels, IGNORED),
            valid=self.unpack(layout.valid, False),
            visual=self.unpack(layout.visual, False),
        )
