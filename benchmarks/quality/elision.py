"""Controls: what a sparse step leaves out is computed all the same, or drawn at random."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from regate.scoring.visual import count_left


@contextlib.contextmanager
def everything_computed() -> Iterator[None]:
    """Inside, a kept label activates every position that is no padding."""
    with mock.patch("regate.scoring.decision.active_positions", lambda labels, kept, valid, **_: valid):
        yield


@contextlib.contextmanager
def visual_at_random(seed: int) -> Iterator[None]:
    """Inside, visual tokens are left out at random, as many as the gate would."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(embeddings: Tensor, visual: Tensor, keep: float) -> Tensor:
        draws = torch.rand(visual.shape, generator=generator).masked_fill(~visual, 2.0)
        return (draws.argsort(1).argsort(1) < count_left(visual.sum(1), keep)[:, None]).to(embeddings.device)

    with mock.patch("regate.scoring.decision.thinned", chosen):
        yield
