"""Labels [B, S], -100 where a position is unsupervised; position j predicts the label at j + 1. Shares of them."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def predicted(labels: Tensor) -> Tensor:
    """[B, S] bool: labels that some position predicts: supervised and not the first of the row."""
    labelled = labels != IGNORED
    labelled[:, 0] = False
    return labelled


def predictors(labels: Tensor) -> Tensor:
    """[B, S] bool: the positions that predict these labels, bool [B, S]."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1))


def up_to_last(marked: Tensor) -> Tensor:
    """[B, S] bool: the positions up to each row's last one in `marked`, bool [B, S]; none where it has none."""
    return marked.flip(1).cummax(1).values.flip(1)


def count_of(n: Tensor | int, share: float) -> Tensor:
    """`ceil(share * n)` int64 for whole numbers n of any shape; where floats make a hair more of 0.7 * 10, 7."""
    n = n if isinstance(n, Tensor) else torch.tensor(n, device="cpu")
    return torch.ceil(n.double() * share - 1e-6).long()
