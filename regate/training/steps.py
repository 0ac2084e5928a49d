"""Counting optimizer steps, which is what the schedule counts: all micro-batches of one step share its decision.

An update of the model's parameters is a step, whoever makes it. Optimizers of torch say so by themselves. Until one is
seen that holds parameters of this model, they may be updated by hand, inside the backward pass (LOMO) or through copies
(mixed precision): then a digest of trainable parameters, taken at each gated forward, says whether one was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from regate.training.hooks import call_weakly
from regate.training.sharding import local

_PARAMETERS, _VALUES = 8, 2**16  # how many enter a digest, and how much of each
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Steps:
    """The optimizer steps made on a module's parameters.

    Args:
        module: whose parameters.
        on_step: called once per step, however many optimizers make it.
        on_missed: called where a step was made and none of its forwards was gated, with the cause and with whether none
            ever was; `step` is its number.

    Attributes:
        step: the step that forwards now contribute to, from 0.
    """

    def __init__(
        self, module: nn.Module, *, on_step: Callable[[], None], on_missed: Callable[[str, bool], None]
    ) -> None:
        self.step = 0
        self._module, self._on_step, self._on_missed = module, on_step, on_missed
        self._stepped: set[int] = set()  # optimizers that stepped since the last gated forward
        self._early: set[int] = set()  # optimizers that stepped before the first of those
        self._optimizer_known = False  # was one seen that holds parameters of the module?
        self._ever_gated = False
        self._ungated = {"without labels": 0, "in eval mode": 0}  # forwards since the last gated one
        self._digest: tuple[list[tuple[int, torch.dtype]], Tensor] | None = None  # at the last forward
        self._hook = register_optimizer_step_post_hook(call_weakly(self._after_optimizer))

    @property
    def made(self) -> int:
        """Steps that are complete."""
        return self.step + bool(self._stepped or self._moved())

    def restart(self, step: int) -> None:
        """Go on at `step`, whatever was before."""
        self.step = step
        self._stepped.clear()
        self._digest = None

    def gated_forward(self) -> None:
        """A forward with labels: the first after an optimizer step begins the next one."""
        if self._moved():
            self._on_step()
        self.step = self.made
        self._stepped.clear()
        self._digest = None if self._optimizer_known else digest(self._module)
        self._ever_gated = True
        self._ungated = dict.fromkeys(self._ungated, 0)

    def forward_without_labels(self) -> None:
        """A training forward that cannot be gated."""
        self._not_gated("without labels")

    def forward_in_eval_mode(self) -> None:
        """A forward with labels and gradients whose module is not in training mode."""
        self._not_gated("in eval mode")

    def remove(self) -> None:
        self._hook.remove()

    def _not_gated(self, why: str) -> None:
        if any(self._ungated.values()) and self._moved():  # updated by what such forwards gave
            self._on_missed(self._cause(), not self._ever_gated)
        self._ungated[why] += 1
        if not self._optimizer_known:
            self._digest = digest(self._module)

    def _moved(self) -> bool:
        """Have parameters other values than at the last forward, and no optimizer of theirs is known?"""
        if self._optimizer_known or self._digest is None:
            return False
        now = digest(self._module)
        return now[0] == self._digest[0] and not torch.equal(now[1], self._digest[1])  # other parameters say nothing

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(p) for p in self._module.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return  # another model's, or of copies of our parameters: these tell by themselves
        self._optimizer_known, self._digest = True, None
        before = self._stepped if self._ever_gated else self._early
        again = id(optimizer) in before  # a second time, and no gated forward between
        if not self._ever_gated:  # the first does not count: states are made by it
            self._early.add(id(optimizer))
            self.step += again
            if again or any(self._ungated.values()):
                self._on_missed(self._cause(), True)
            return
        if again:
            self.step = self.made
            self._stepped.clear()
            self._on_missed(self._cause(), False)
        if not self._stepped:  # the first of the model's optimizers
            self._on_step()
        self._stepped.add(id(optimizer))

    def _cause(self) -> str:
        name = type(self._module).__name__
        if n := self._ungated["in eval mode"]:
            return (
                f"{n} forward(s) of {name} with labels and gradients ran in eval mode, and only training forwards are "
                "gated. Call model.train() before training (after evaluation, too)"
            )
        if n := self._ungated["without labels"]:
            return (
                f"{n} training forward(s) of {name} got no `labels`. Pass them to the model; a trainer keeps them back "
                "for label smoothing, for a loss function of its own, or because it trains on preferences or rewards"
            )
        return (
            f"no training forward of {name} was called. What computes the loss must call the model itself, not its "
            "`forward` or its parts"
        )


@torch.no_grad()
def digest(module: nn.Module) -> tuple[list[tuple[int, torch.dtype]], Tensor]:
    """Some trainable parameters, and a number for the values of each, [n] on the CPU; one wait for the device."""
    learning = [p for p in module.parameters() if p.requires_grad and local(p).numel()]
    stride = (
        max(len(learning) // _PARAMETERS, 1) | 1
    )  # odd: adapters' parameters come in pairs, and one may stand still
    some = learning[::stride][-_PARAMETERS:]
    numbers = []
    for parameter in some:
        values = local(parameter).detach().flatten()
        values = values[:: max(len(values) // _VALUES, 1)].contiguous()
        as_integers = values.view(_INTEGERS[values.element_size()]).long()
        numbers.append((as_integers * torch.arange(1, len(values) + 1, device=values.device)).sum())
    found = torch.stack([n.to(numbers[0].device) for n in numbers]).cpu() if numbers else torch.zeros(0)
    return [(id(p), p.dtype) for p in some], found
