"""Controls: what a sparse step leaves out is computed all the same, or chosen in another way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.quality.tasks import Batch, arguments
from model_adapters import find_adapter
from regate.labels import count_of

Worth = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def everything_computed() -> Iterator[None]:
    """Inside, a kept label activates every position that is no padding."""
    with mock.patch("regate.scoring.decision.active_positions", lambda labels, kept, valid, **_: valid):
        yield


@contextlib.contextmanager
def without_full_turns() -> Iterator[None]:
    """Inside, no sample of a sparse step keeps all of its labels."""
    with mock.patch("regate.scoring.turns.Turns.of", return_value=None):
        yield


@contextlib.contextmanager
def visual_by(worth: Worth) -> Iterator[None]:
    """Inside, as many visual tokens are left out as the gate would, those that are worth least."""

    def chosen(embeddings: Tensor, visual: Tensor, keep: float) -> Tensor:
        return worthiest(worth(visual), visual, keep).to(embeddings.device)

    with mock.patch("regate.scoring.decision.thinned", chosen):
        yield


def worthiest(worth: Tensor, visual: Tensor, keep: float) -> Tensor:
    """Of each row's n `visual` tokens (bool [B, S]) the `ceil(keep * n)` that are worth most (float [B, S])."""
    least = (-worth).masked_fill(~visual, float("inf"))
    return least.argsort(1).argsort(1) < count_of(visual.sum(1), keep)[:, None]


def at_random(seed: int) -> Worth:
    """Other ones in each call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda visual: torch.rand(visual.shape, generator=generator)


class Gradients:
    """Of the batch that was looked at.

    Attributes:
        embeddings: [B, S, D], what the decoder was given.
        norms: float [B, S] on the CPU, of the loss's gradient at each position's embedding.
    """

    embeddings: Tensor
    norms: Tensor

    def look(self, model: Any, batch: Batch) -> Gradients:
        """By a pass that no gate touches, for it is none of training."""
        given: list[Tensor] = []
        decoder = find_adapter(model).decoder(model)
        hook = decoder.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        training = model.training
        model.eval()
        try:
            loss = model(**arguments(batch), use_cache=False).loss
        finally:
            hook.remove()
            model.train(training)
        (self.embeddings,) = given
        (gradient,) = torch.autograd.grad(loss, given)
        self.norms = gradient.float().norm(dim=-1).cpu()
        return self

    def __call__(self, visual: Tensor) -> Tensor:
        return self.norms
