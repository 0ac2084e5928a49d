"""Losses per label, for difficulties and references."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 4096  # labels whose [*, V] logits exist at once


@torch.no_grad()
def label_losses(
    features: Tensor, labels: Tensor, wanted: Tensor, *, head: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`-log p(label)` of the wanted labels, from the positions that predict them.

    Args:
        features: [B, S, V] logits, or [B, S, D] hidden states with `head` mapping them to logits.
        labels: [B, S] int64.
        wanted: [B, S] bool, False at position 0 of each row.

    Returns:
        [N] float32, for `wanted` in row-major order.
    """
    row, column = wanted.nonzero(as_tuple=True)
    if not len(row):
        return torch.zeros(0, device=features.device)
    losses = []
    for at in torch.arange(len(row), device=row.device).split(_CHUNK):
        logits = features[row[at], column[at] - 1]
        logits = head(logits) if head is not None else logits
        losses.append(F.cross_entropy(logits.float(), labels[row[at], column[at]], reduction="none"))
    return torch.cat(losses)
