"""What becomes of positions that a sparse step leaves out: other ways than the gate's, to tell what its way costs.

They compute everything and save nothing: what they show is learning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

import regate
from regate.forward import Forward
from regate.scoring.visual import count_left

Elision = Literal["left out", "computed", "visible"]


def elided(way: Elision, model: Any, gate: regate.Gate) -> contextlib.AbstractContextManager[None]:
    """Inside, sparse steps of a gated model treat what they leave out this way."""
    if way == "computed":
        return everything_computed()
    return seen_as_keys(gate.adapter.decoder(model)) if way == "visible" else contextlib.nullcontext()


@contextlib.contextmanager
def everything_computed() -> Iterator[None]:
    """Inside, a kept label activates every position that is no padding."""
    with mock.patch("regate.scoring.decision.active_positions", lambda labels, kept, valid, **_: valid):
        yield


@contextlib.contextmanager
def seen_as_keys(decoder: Any) -> Iterator[None]:
    """Inside, a position left out stays as it was embedded through all layers, and the others see it as it is."""
    positions, active = Forward.positions, None

    def stand_still(forward: Forward, *args: Any, **kwargs: Any) -> Any:
        nonlocal active
        chosen = positions(forward, *args, **kwargs)
        if forward.decision.full or chosen is None:
            active = None
            return chosen
        active, forward._active = forward.decision.active, None  # everything is computed
        return None

    def standing(layer: Any) -> Any:
        """Its forward; no hook, for what hooks see must be whole, and the gate sees to it."""
        own = layer.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            after: Tensor = own(hidden_states, *args, **kwargs)
            if active is None or not torch.is_grad_enabled():  # nothing is left out, or it is looked at
                return after
            return torch.where(active[..., None], after, hidden_states)

        return forward

    for layer in decoder.layers:
        layer.forward = standing(layer)
    try:
        with mock.patch.object(Forward, "positions", torch.compiler.disable(stand_still)):
            yield
    finally:
        for layer in decoder.layers:
            del layer.forward


@contextlib.contextmanager
def visual_at_random(seed: int) -> Iterator[None]:
    """Inside, visual tokens are left out at random, as many as the gate would."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(embeddings: Tensor, visual: Tensor, keep: float) -> Tensor:
        draws = torch.rand(visual.shape, generator=generator).masked_fill(~visual, 2.0)
        return (draws.argsort(1).argsort(1) < count_left(visual.sum(1), keep)[:, None]).to(embeddings.device)

    with mock.patch("regate.scoring.decision.thinned", chosen):
        yield
