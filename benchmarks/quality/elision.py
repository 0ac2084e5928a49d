"""Controls: what a sparse step leaves out is computed all the same, or chosen in another way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.tasks import Batch, arguments
from model_adapters import find_adapter
from regate.labels import count_of
from regate.scoring.scorer import Samples, Scorer

Worth = Callable[[Tensor, Tensor], Tensor]  # of visual tokens, from embeddings [B, S, D] and where they are, [B, S]


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
        return worthiest(worth(embeddings, visual), visual, keep).to(embeddings.device)

    with mock.patch("regate.scoring.decision.thinned", chosen):
        yield


def worthiest(worth: Tensor, visual: Tensor, keep: float) -> Tensor:
    """Of each row's n `visual` tokens (bool [B, S]) the `ceil(keep * n)` that are worth most (float [B, S])."""
    least = (-worth).masked_fill(~visual, float("inf"))
    return least.argsort(1).argsort(1) < count_of(visual.sum(1), keep)[:, None]


def at_random(seed: int) -> Worth:
    """Other ones in each call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, visual: torch.rand(visual.shape, generator=generator)


def by_change(per_frame: int | None) -> Worth:
    """Of clips with so many visual tokens a frame: how unlike is each to the one at its place in the frame before, or
    in the frame after, where that is less like it?

    Of what is no whole frame, such as an end, nothing is worth keeping.
    """
    if per_frame is None:
        raise ValueError("only clips have frames that change: of this task nothing is known of them")

    def worth(embeddings: Tensor, visual: Tensor) -> Tensor:
        found = torch.zeros(visual.shape)
        for row, (own, there) in enumerate(zip(embeddings, visual, strict=True)):
            places = there.nonzero().squeeze(1)
            places = places[: len(places) // per_frame * per_frame]
            if not len(places):
                continue
            frames = F.normalize(own[places.to(own.device)].float(), dim=-1).unflatten(0, (-1, per_frame))
            change = 1 - (frames[1:] * frames[:-1]).sum(-1).cpu()
            found[row, places] = torch.maximum(F.pad(change, (0, 0, 1, 0)), F.pad(change, (0, 0, 0, 1))).flatten()
        return found

    return worth


@contextlib.contextmanager
def led_by_references() -> Iterator[None]:
    """Inside, samples whose kept labels need the image more keep more of their visual tokens, as many on average.

    A sample's share is `visual_keep` times the mean reference loss of its kept labels, over that of the batch's
    samples that are not full, and at most all. Rows are samples.
    """
    need = torch.ones(())
    own = Scorer.keep

    def keep(scorer: Scorer, samples: Samples, *, whole: Tensor | None = None, **options: Any) -> Tensor:
        nonlocal need
        kept = own(scorer, samples, whole=whole, **options)
        records = scorer.store.get("reference", samples.text)
        chosen = [of[there] for of, there in zip(kept, samples.candidates, strict=True)]
        losses = [  # a full sample may have none, and keeps all
            torch.ones(()) if x is None else torch.from_numpy(x)[there].mean()
            for x, there in zip(records, chosen, strict=True)
        ]
        need = torch.stack(losses).double()
        others = need if whole is None or bool(whole.all()) else need[~whole]
        need = need / others.mean()
        return kept

    def count(n: Tensor, share: float) -> Tensor:
        return torch.minimum(n, count_of(n, need * share))

    with (
        mock.patch.object(Scorer, "keep", keep),
        mock.patch("regate.scoring.decision.count_of", count),
        mock.patch("regate.scoring.visual.count_of", count),
    ):
        yield


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

    def __call__(self, embeddings: Tensor, visual: Tensor) -> Tensor:
        return self.norms
