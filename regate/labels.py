"""Labels [B, S]: -100 where a position is unsupervised; position j predicts the label at j + 1."""

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
