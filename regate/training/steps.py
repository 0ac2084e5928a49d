"""Counting optimizer steps, which is what the schedule counts: all micro-batches of one step share its decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from regate.training.hooks import call_weakly


class Steps:
    """The optimizer steps made on a module's parameters.

    Args:
        module: whose parameters.
        on_step: called once per step, however many optimizers make it.
        on_missed: called with the cause where a step was made and none of its forwards was gated; `step` is its number.

    Attributes:
        step: the step that forwards now contribute to, from 0.
    """

    def __init__(self, module: nn.Module, *, on_step: Callable[[], None], on_missed: Callable[[str], None]) -> None:
        self.step = 0
        self._module, self._on_step, self._on_missed = module, on_step, on_missed
        self._stepped: set[int] = set()  # optimizers that stepped since the last gated forward
        self._optimizer_known = False
        self._without_labels = 0  # training forwards since then
        self._hook = register_optimizer_step_post_hook(call_weakly(self._after_optimizer))

    @property
    def made(self) -> int:
        """Steps that are complete."""
        return self.step + bool(self._stepped)

    def restart(self, step: int) -> None:
        """Go on at `step`, whatever was before."""
        self.step = step
        self._stepped.clear()

    def gated_forward(self) -> None:
        """A forward with labels: the first after an optimizer step begins the next one."""
        self.restart(self.made)
        self._without_labels = 0

    def forward_without_labels(self) -> None:
        """A training forward that cannot be gated."""
        self._without_labels += 1

    def remove(self) -> None:
        self._hook.remove()

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(p) for p in self._module.parameters()}
        holds = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        self._optimizer_known |= holds
        if not holds and self._optimizer_known:
            return  # another model's; until one with our parameters is seen, it may hold master copies of them
        if holds and id(optimizer) in self._stepped:  # a second time, and no gated forward between
            self.restart(self.made)
            self._on_missed(self._cause())
        if not self._stepped:  # the first of the model's optimizers
            self._on_step()
        self._stepped.add(id(optimizer))

    def _cause(self) -> str:
        name = type(self._module).__name__
        if self._without_labels:
            return (
                f"{self._without_labels} training forward(s) of {name} got no `labels`. Pass them to the model; a "
                "trainer keeps them back for label smoothing or for a loss function of its own"
            )
        return (
            f"no training forward of {name} was called. What computes the loss must call the model itself, not its "
            "`forward` or its parts"
        )
