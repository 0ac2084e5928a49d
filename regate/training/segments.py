"""The samples of a batch, wherever they stand: a row each, or several in a row laid end to end (packing).

    segment   the positions of one sample, whose key, teacher's text, share of labels and difficulties are its own

Whatever is scored per sample sees a batch of one row a sample (`unpack`), and what was decided goes back to where the
samples stand (`pack`). Rows that hold one sample each are their own segments, and nothing is moved.

Signs of a sample's beginning, any of which may be in the call:
    position_ids    that fall back, or, without a padding mask, do not go on by one; of several ids per token (M-RoPE),
                    the lowest, where all are alike: a video's fall back, too, but its time is ahead there; of four, the
                    first, which is the text's
    cu_seqlens and the like      where samples begin among all positions, as flash attention's kernels are told; of one
                    row also in the place of the attention mask (InternVL)
    seq_lens and the like        how long they are, one after the other
    seq_idx and the like         a number per position, the same within a sample
    attention_mask               with numbers above 1, the same within a sample (LLaMA-Factory); or [B, 1, S, S], under
                                 which a sample's first position does not see the one before it

Padding may stand between samples, whatever is said of it there: so a position is held against the last one before it
that is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_adapters import Batch, Layout, conventional
from model_adapters.flash import BOUNDARIES, boundaries, is_boundaries
from regate.errors import PackedRowsError
from regate.labels import IGNORED

_NUMBERS = re.compile(r"^(seq|sequence|segment|document|doc)_?(ids?|idx|index)$")
_LENGTHS = re.compile(r"^(seq|sequence|segment|document|doc|sample)_?(lens?|lengths?)$")
_TEXT_FIRST = 4  # rows of position ids whose first is the text's (transformers' Qwen-VL family)


def starts(batch: Batch, layout: Layout) -> Tensor | None:
    """[B, S] bool on the device, True where a sample begins within a row; None where no sign is in the call.

    Raises:
        PackedRowsError: boundaries that do not fit the batch.
    """
    before = _last_before(layout.valid)
    at = before.clamp(min=0)
    signs = []
    for numbers in (*_samples_of(batch, layout), *_numbers(batch, layout)):
        signs.append(numbers != numbers.gather(1, at))
    if (mask := conventional.square_mask(batch, at.shape[1])) is not None:
        signs.append(~conventional.sees(mask, at))
    ids = batch.get("position_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] == at.shape[1] and ids.dim() in (2, 3):
        signs.append(_from_position_ids(ids, layout, before, leaps=batch.get("attention_mask") is None))
    return torch.stack(signs).any(0) & layout.valid & (before >= 0) if signs else None


def check_boundaries(batch: Batch) -> None:
    """For a decoder whose attention cannot be told boundaries, while the gate runs it: do position ids tell them?

    Raises:
        PackedRowsError: they do not.
    """
    name = next((name for name in BOUNDARIES if batch.get(name) is not None), None)
    if name is not None and batch.get("attention_mask") is None and batch.get("position_ids") is None:
        raise PackedRowsError(
            f"the call says by `{name}` where packed samples begin, but not by position ids that begin again: pass "
            "position_ids, too, as transformers' DataCollatorWithFlattening does"
        )


def _last_before(valid: Tensor) -> Tensor:
    """int64 [B, S], the last position before each that is no padding; -1 where there is none."""
    along = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    return torch.nn.functional.pad(torch.where(valid, along, -1).cummax(1).values, (1, -1), value=-1)


def _samples_of(batch: Batch, layout: Layout) -> Iterator[Tensor]:
    """The sample of each position, int64 [B, S], by each entry that says where samples begin, or how long they are."""
    shape, device = layout.valid.shape, layout.valid.device
    listed = {name: _tensor(name, batch[name], device) for name in BOUNDARIES if batch.get(name) is not None}
    told = boundaries({**batch, **listed}, (shape[0], shape[1]))
    if told is not None:
        yield _numbered(f"`{told[0]}`", told[1], layout)
    for name, x in batch.items():
        if not _LENGTHS.search(name) or x is None or isinstance(x, str):
            continue
        lengths = _tensor(name, x, device)
        if lengths.numel() > 1 and tuple(lengths.shape) not in ((shape[0],), (shape[0], 1)):  # else of whole rows
            yield _numbered(f"`{name}`, added up,", torch.nn.functional.pad(lengths.cumsum(-1), (1, 0)), layout)


def _numbered(title: str, first: Tensor, layout: Layout) -> Tensor:
    """The sample of each position, int64 [B, S], from the first positions of samples [n + 1] or [1, n + 1]."""
    valid = layout.valid
    rows, length = valid.shape
    of_one_row = first.dim() == 2 and len(first) == rows == 1
    if not (first.dim() == 1 or of_one_row) or first.is_floating_point():
        raise PackedRowsError(
            f"{title} {list(first.shape)} {first.dtype} should be the first positions of samples, [n + 1] (or, of one "
            "row, [1, n + 1]) of integers from 0 to the number of positions"
        )
    places = first.flatten().tolist()
    while places and places[-1] <= 0:  # filled up with 0 or -1
        places.pop()
    end = places[-1] if places else 0
    across = not {row * length for row in range(1, rows) if row * length < end}.issubset(places)
    unpadded = end < valid.numel() and not bool(valid.flatten()[:end].all()) and end == int(valid.sum())
    if places != sorted(places) or end > valid.numel() or across or unpadded:
        raise PackedRowsError(
            f"{title} {places} does not lie on this batch [{rows}, {length}], {int(valid.sum())} positions of which "
            f"are no padding: where samples begin must ascend from 0 to {valid.numel()}, be counted with padding, and "
            "begin anew with each row; count so, or leave it out of a call whose rows hold one sample each"
        )
    marks = torch.zeros(valid.numel() + 1, dtype=torch.int64, device=valid.device)
    marks[torch.tensor(places, dtype=torch.int64, device=valid.device)] = 1
    return marks[:-1].cumsum(0).view(rows, length)


def _numbers(batch: Batch, layout: Layout) -> Iterator[Tensor]:
    """Each entry [B, S] of a number per position, the same within a sample."""
    rows, length = layout.valid.shape
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == layout.valid.shape and not is_boundaries(mask, (rows, length)):
        if not mask.is_floating_point() and mask.dtype != torch.bool:
            yield mask
    for name, x in batch.items():
        if not _NUMBERS.search(name) or x is None or _are_names(x):
            continue
        numbers = _tensor(name, x, layout.valid.device)
        if rows == 1 and numbers.shape == (length,):
            numbers = numbers[None]
        if numbers.shape == (rows, length):
            yield numbers
        elif numbers.numel() > 1 and tuple(numbers.shape) not in ((rows,), (rows, 1)):  # else one of each row
            raise PackedRowsError(
                f"`{name}` {list(numbers.shape)} seems to tell packed samples apart, but has no number for each of the "
                f"decoder's positions [{rows}, {length}]; pass it so, or under another name if it is something else"
            )


def _are_names(x: Any) -> bool:
    """Of documents, not of positions."""
    return isinstance(x, str) or (isinstance(x, list | tuple) and any(isinstance(entry, str) for entry in x))


def _tensor(name: str, x: Any, device: torch.device) -> Tensor:
    """What a call has as a tensor, a list or an array."""
    try:
        return torch.as_tensor(x, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PackedRowsError(
            f"`{name}` should tell where packed samples are, but no tensor can be made of it ({error}); pass a tensor "
            "of integers"
        ) from error


def _from_position_ids(ids: Tensor, layout: Layout, before: Tensor, *, leaps: bool) -> Tensor:
    """`leaps`: text ids that do not go on by one begin a sample, too, as transformers' masks have it."""
    several, at = ids.dim() == 3, before.clamp(min=0)
    if several and len(ids) == _TEXT_FIRST:
        ids, several = ids[0], False
    alike = None
    if several:
        ids, highest = ids.amin(0), ids.amax(0)
        alike = (ids == highest).expand(at.shape)
    ids = ids.expand(at.shape)
    last = ids.gather(1, at)
    again = (ids == 0) & (last == 0)  # after a sample of one token; an image may have one id throughout
    if leaps and not several:
        beside = before == torch.arange(at.shape[1], device=at.device) - 1
        return (ids < last) | again | (beside & (ids - last != 1))
    if alike is None:
        return (ids < last) | again
    return ((ids < last) | (again & ~layout.visual)) & alike


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
        numbers = torch.arange(len(self), device="cpu")[:, None]
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
