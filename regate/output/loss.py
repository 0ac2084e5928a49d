"""Losses per label, for difficulties and references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regate_patch import to_device

_CHUNK = 4096  # labels whose [*, V] logits exist at once


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
def label_losses(features: Tensor, places: Places, *, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`-log p(label)` of labels, from the positions that predict them.

    Args:
        features: [B, S, V] logits, or [B, S, D] hidden states with `head` mapping them to logits.
        places: of N labels.

    Returns:
        [N] float32 on the device of `features`.
    """
    places = places.to(features.device)
    if not len(places.row):
        return torch.zeros(0, device=features.device)
    losses = []
    for row, column, label in zip(*(x.split(_CHUNK) for x in (places.row, places.column, places.label)), strict=True):
        logits = features[row, column - 1]
        logits = head(logits) if head is not None else logits
        losses.append(F.cross_entropy(logits.float(), label, reduction="none"))
    return torch.cat(losses)
