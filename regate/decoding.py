"""A gated model's decoder while the model runs: asked what it is to compute when it is called."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import regate_patch
from model_adapters import Layout
from regate.errors import ConfigError
from regate.output import router
from regate.output.head import embeddings, is_aside
from regate.parts import Parts
from regate.scoring.decision import Decision
from regate.training.hooks import followable_peft, without_cache
from regate_patch import to_device


@dataclass
class Decoding:
    """One run of the decoder.

    Attributes:
        parts: the gate's.
        call: the arguments of the model's call.
        layout: of the batch, [B, S].
        decision: what is kept and computed; once visual tokens are chosen, without those that are left out.
        owner: int64 [B, S] on the CPU, the sample of each position.
        balanced: does the call add a router's loss?
        tail: the decoder's end runs at predictors of kept labels alone, unless such a loss reads it.
        visible: are positions that are left out seen, but for padding?
        entered: was it to run on less than everything?
        active: what it ran on; None before it was called.
    """

    parts: Parts
    call: Mapping[str, Any]
    layout: Layout
    decision: Decision
    owner: Tensor
    balanced: bool
    tail: bool
    visible: bool = False
    entered: bool = field(init=False, default=False)
    active: regate_patch.Active | None = field(init=False, default=None)

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """Inside, the decoder computes the decision's positions."""
        self.entered = True
        parts, called_so = self.parts, bool(self.parts.without_cache(self.call))
        with contextlib.ExitStack() as scope:
            scope.enter_context(parts.adapter.followable(parts.model, parts.decoder))
            scope.enter_context(followable_peft())
            scope.enter_context(without_cache(parts.decoder, called_so=called_so))
            if self.balanced:
                scope.enter_context(router.balanced_over(parts.target, parts.decoder, self._computed))
            scope.enter_context(regate_patch.active(self._positions))
            yield

    def _computed(self) -> Tensor:
        return to_device(self.decision.active, self.call["labels"].device)

    @torch.compiler.disable
    def _positions(self, *args: Any, **kwargs: Any) -> regate_patch.Active | None:
        """What the decoder computes, now that it is called; None where that is no part of the training.

        Raises:
            ConfigError: visual tokens are to be left out, but the decoder is not called with embeddings.
        """
        if is_aside(args, kwargs, tuple(self.layout.labels.shape)):
            return None
        start, share = time.perf_counter(), self.parts.config.visual_keep
        if share < 1 and bool(self.layout.visual.any()):  # also on full steps: sooner than after warm-up
            found = embeddings(args, kwargs)
            if found is None or found.shape[:2] != self.layout.visual.shape:
                raise ConfigError(
                    f"visual_keep={share} needs the embeddings of visual tokens, and "
                    f"{type(self.parts.decoder).__name__} is not called with such; set visual_keep=1"
                )
            self.decision = self.decision.thin(found, share)
        device = next(x.device for x in (*kwargs.values(), *args) if isinstance(x, Tensor))
        tail = self.tail and not self.balanced
        self.active = self.decision.positions(device, read=tail, owner=self.owner, visible=self.visible)
        self.parts.counters.gate_seconds += time.perf_counter() - start
        return self.active
