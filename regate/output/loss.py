"""Losses per label, for difficulties and references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regate.output.logits import CHUNK
from regate.training.hooks import standing_in
from regate_patch import is_sharded, to_device

_FIRST = 512  # labels whose [*, V] logits exist at once before V is known: few enough for any V there is
_FEW_CALLS = 4096  # the same, where each call of the head makes ranks wait for one another


@dataclass(frozen=True)
class Places:
    """Where some labels stand, and what they are, in row-major order. On the CPU, nothing waits to count them.

    Attributes:
        shape: (B, S).
        row, column, label: int64 [N]; no label stands at column 0, for nothing predicts it.
    """

    shape: tuple[int, int]
    row: Tensor
    column: Tensor
    label: Tensor

    @classmethod
    def of(cls, labels: Tensor, wanted: Tensor) -> Places:
        """Of `labels` [B, S] int64, those `wanted` [B, S] bool."""
        row, column = wanted.nonzero(as_tuple=True)
        return cls((labels.shape[0], labels.shape[1]), row, column, labels[row, column])

    def to(self, device: torch.device) -> Places:
        """The same on `device`."""
        row, column, label = to_device(torch.stack([self.row, self.column, self.label]), device)
        return Places(self.shape, row, column, label)


@torch.no_grad()
def label_losses(features: Tensor, places: Places, *, head: nn.Module | None = None) -> Tensor:
    """`-log p(label)` of labels, from the positions that predict them.

    Args:
        features: [B, S, V] logits, or [B, S, D] hidden states with `head` mapping them to logits.
        places: of N labels.

    Returns:
        [N] float32 on the device of `features`.
    """
    places = places.to(features.device)
    if head is None:
        return _in_chunks(features, places, lambda logits: logits)
    if any(is_sharded(part) for part in head.children()):
        return _in_chunks(features, places, head, rows=_FEW_CALLS)
    if is_sharded(head):
        return _in_one_call(features, places, head)
    return _in_chunks(features, places, head)


def _in_one_call(features: Tensor, places: Places, head: nn.Module) -> Tensor:
    """The losses by a head that is split over ranks, which must call it equally often: so once, whatever N is.

    Its hooks make it whole around all chunks; they run where there are no labels, too.
    """
    losses, own = [], head.forward

    def take(features: Tensor) -> Tensor:
        losses.append(_in_chunks(features, places, own))
        return features[:0]

    with standing_in(head, take):
        head(features)
    return losses[0]


def _in_chunks(
    features: Tensor, places: Places, logits_of: Callable[[Tensor], Tensor], *, rows: int | None = None
) -> Tensor:
    """The losses, of `rows` labels at once; by default of as many as `CHUNK` allows, once the first have told V."""
    losses, n, begin = [], rows or _FIRST, 0
    while begin < len(places.row):
        row, column, label = (x[begin : begin + n] for x in (places.row, places.column, places.label))
        logits = logits_of(features[row, column - 1])
        losses.append(F.cross_entropy(logits.float(), label, reduction="none"))
        begin, n = begin + n, rows or max(CHUNK // logits.shape[-1], 1)
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float32, device=features.device)
