"""Counting optimizer steps, which is what the schedule counts: all micro-batches of one step share its decision.

An update of the model's parameters is a step, whoever makes it. Optimizers of torch say so by themselves. Others do
not: parameters may be updated by hand, inside the backward pass (LOMO) or through copies (mixed precision). So some
values of trainable parameters are kept at each gated forward, and at the next they tell whether an update was made that
no optimizer said.

Where an optimizer says its steps, such changes may be parts of one: sharpness-aware minimisation moves parameters there
and back, variational methods draw weights for each forward. So what was counted for them is taken back when it steps
again, and from then on as many in a row, one at least, count only once one more follows and it is still silent. Values
that are those of the step's first forward again, at a later one or when an optimizer steps, have been there and back,
and what was counted on the way is taken back, too. What changes while an optimizer steps, between calls of its closure,
is of that step.

Values that are loaded (`load_state_dict`) are no update, nor is the step by which
`torch.distributed.checkpoint.state_dict` makes an optimizer's states.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from model_adapters.walk import every_part
from regate.training.hooks import Hook, call_weakly
from regate.training.sharding import local

Optimizers = weakref.WeakSet[torch.optim.Optimizer]
_PARAMETERS, _VALUES = 8, 2**16  # how many are kept, and how many values of each
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TAKEN_BACK = 64  # steps at most; where more were counted, parameters were updated by hand before
_STEP = torch.optim.Optimizer.__module__, "wrapper"  # whose frame runs `step` and its hooks
_QUIET = 128  # gated forwards before a note that no step was seen: micro-batches may be many

UNSEEN = (
    "no optimizer step was seen in {n} gated forwards, so all of them were of step {step}. Steps of torch's "
    "optimizers are seen, and most other changes of parameters; if yours are updated in another way, tell the gate "
    "after each update: gate.step += 1. If a step has more micro-batches than that, all is well"
)
BESIDE = (
    "{optimizer} steps without a gated forward, as for a loss of its own, beside an optimizer that steps after gated "
    "ones: the latter's steps alone are counted"
)
AGAIN = (
    "{cause}. {optimizer} stepped twice with no gated forward between; if that is meant, regate.apply(model, "
    "on_unsupported='warn') goes on"
)


class Steps:
    """The optimizer steps made on a model's parameters.

    Args:
        model: whose parameters, those around its language model among them.
        module: inside it, the one whose forwards are gated.
        on_step: called once per step, however many optimizers make it.
        on_missed: called where a step was made and none of its forwards was gated, with the cause and with whether none
            ever was; `step` is its number.
        note: tells the user something, once.

    Attributes:
        step: the step that forwards now contribute to, from 0.
        just_set: was it set, by hand or by what was loaded, and has no gated forward run since?
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        *,
        on_step: Callable[[], None],
        on_missed: Callable[[str, bool], None],
        note: Callable[[str], None],
    ) -> None:
        self.step, self.just_set = 0, False
        self._model, self._module, self._on_step, self._on_missed = model, module, on_step, on_missed
        self._note = note
        self._unseen: int | None = 0  # gated forwards while no step was seen; None once one was, or that was noted
        self._stepping = Optimizers()  # those whose `step` is running, or ended in an error
        self._stepped: set[weakref.ref[torch.optim.Optimizer]] = set()  # since the last gated forward; some are gone
        self._early = Optimizers()  # those that stepped before the first of those
        self._first = Optimizers()  # those that stepped first after one
        self._optimizer_known = False  # was one seen that holds parameters of the module?
        self._ever_gated = False
        self._ungated = {"without labels": 0, "in eval mode": 0}  # forwards since the last gated one
        self._values: Kept | None = None  # at the last forward; None once an optimizer has changed them
        self._moved_before = False  # they had changed when others were loaded
        self._unsaid = 0  # changes in a row that no optimizer said
        self._patience = 1  # as many may be parts of a step of an optimizer that is known
        self._home: Kept | None = None  # the values at the first forward since an optimizer said a step
        self._counted = 0  # steps that changes since then were taken for
        self._hooks = [
            register_optimizer_step_pre_hook(call_weakly(self._before_optimizer)),
            register_optimizer_step_post_hook(call_weakly(self._after_optimizer)),
        ]
        for of_all in self._hooks:
            weakref.finalize(self, of_all.remove)
        for loaded in {model, module}:
            self._hooks.append(loaded.register_load_state_dict_pre_hook(Hook(self._before_loading)))
            self._hooks.append(loaded.register_load_state_dict_post_hook(Hook(self._after_loading)))

    @property
    def made(self) -> int:
        """Steps that are complete."""
        return self.step + (1 if self._stepped else self._said_by_values(self._moved()))

    def restart(self, step: int) -> None:
        """Go on at `step`, whatever was before."""
        self.step, self.just_set, self._unseen = step, True, None
        self._stepped.clear()
        self._forget()
        self._leave()

    def gated_forward(self) -> None:
        """A forward with labels: the first after an optimizer step begins the next one."""
        self.just_set = False
        if self._stepping and not _within_a_step():
            self._stepping.clear()
        if self._stepped:
            self.step += 1
            self._leave()
        elif not self._stepping and (moved := self._moved()) and not self._back():
            for _ in range(self._said_by_values(moved)):
                self._on_step()
                self._unseen = None
                self.step += 1
                self._counted += 1
            self._unsaid += 1
        self._stepped.clear()
        self._forget()
        self._values = some_values(self._model)
        self._home = self._values if self._home is None else self._home
        self._ever_gated = True
        self._ungated = dict.fromkeys(self._ungated, 0)
        self._say_if_unseen()

    def forward_without_labels(self) -> None:
        """A training forward that cannot be gated."""
        self._not_gated("without labels")

    def forward_in_eval_mode(self) -> None:
        """A forward with labels and gradients whose module is not in training mode."""
        self._not_gated("in eval mode")

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _not_gated(self, why: str) -> None:
        if self._optimizer_known:  # it says its updates
            self._ungated[why] += 1
            return
        if any(self._ungated.values()) and self._moved():  # updated by what such forwards gave
            self._on_missed(self._cause(), not self._ever_gated)
        self._ungated[why] += 1
        self._forget()
        self._values = some_values(self._model)

    def _say_if_unseen(self) -> None:
        if self._unseen == _QUIET:
            self._note(UNSEEN.format(n=_QUIET, step=self.step))
            self._unseen = None
        if self._unseen is not None:
            self._unseen += 1

    def _said_by_values(self, moved: bool) -> int:
        """The steps that a change since the last forward tells of, where no optimizer said one."""
        if not moved:
            return 0
        patience = self._patience if self._optimizer_known else 0
        if self._unsaid < patience:
            return 0
        return patience + 1 if self._unsaid == patience else 1  # those before it counted for nothing

    def _moved(self) -> bool:
        """Have parameters other values than at the last forward, and no optimizer of theirs said so?"""
        if self._values is None or self._moved_before:
            return self._moved_before
        now = some_values(self._model)
        return now[0] == self._values[0] and not _equal(now, self._values)  # other parameters say nothing

    def _back(self) -> bool:
        """Are values what they were at home? Then they have not been updated since."""
        if self._home is None or not _equal(self._home, some_values(self._model)):
            return False
        self.step -= self._counted
        self._unsaid = self._counted = 0
        return True

    def _leave(self) -> None:
        """The next forward is at home."""
        self._home, self._unsaid, self._counted = None, 0, 0

    def _forget(self) -> None:
        self._values, self._moved_before = None, False

    def _before_loading(self, module: nn.Module, state: Any, prefix: str, *others: Any) -> None:
        if not prefix:  # else a part of what is being loaded
            self._moved_before = self._moved()

    def _after_loading(self, *args: Any) -> None:
        if self._values is not None:
            self._values = some_values(self._model)
        self._home, self._counted = None, 0

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._unsaid and not self._stepping and self._own(optimizer) and not self._back():
            self._take_back()
        self._stepping.add(optimizer)

    def _take_back(self) -> None:
        """What changed since an optimizer stepped was on the way to the step that is made now."""
        if self._optimizer_known and self._counted <= _TAKEN_BACK:
            self.step -= self._counted
            self._patience = max(self._patience, self._unsaid)
        self._unsaid = self._counted = 0

    def _own(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The model's parameters among its own; none if it is another model's, or of copies, which are seen to move."""
        own = {id(p) for part in every_part(self._model) for p in part._parameters.values()}
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]

    def _named(self, optimizer: torch.optim.Optimizer) -> str:
        own = {id(p) for p in self._own(optimizer)}
        first, *others = [name for name, p in self._model.named_parameters() if id(p) in own] or ["none of the model's"]
        return f"{type(optimizer).__name__} (of {first} and {len(others)} others)"

    def _frozen(self) -> bool:
        return not any(p.requires_grad for p in self._model.parameters())

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepping.discard(optimizer)
        own = self._own(optimizer)
        # Of a model that is frozen, what learns is around it and unknown: whoever steps, it is a step.
        if not (own or self._frozen()) or _makes_states():
            return
        if own and all(p.grad is None for p in own) and not self._moved():
            return  # it had nothing to step on
        self._optimizer_known = True
        self._forget()
        self._unseen = None
        # A second time, and no gated forward between?
        again = weakref.ref(optimizer) in self._stepped if self._ever_gated else optimizer in self._early
        if not self._ever_gated:  # the first does not count: states are made by it
            self._early.add(optimizer)
            self.step += again
            if own and (again or any(self._ungated.values())):
                self._on_missed(self._cause(), True)
            return
        if again and self._first and optimizer not in self._first and not any(self._ungated.values()):
            self._note(BESIDE.format(optimizer=self._named(optimizer)))
            return
        if again and own:
            self.step = self.made
            self._stepped.clear()
            self._on_missed(AGAIN.format(cause=self._cause(), optimizer=self._named(optimizer)), False)
        if not self._stepped:  # the first of the model's optimizers
            self._first.add(optimizer)
            self._on_step()
        self._stepped.add(weakref.ref(optimizer))

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


def _within_a_step() -> bool:
    """Is an optimizer's `step` running, whose closure calls the model?"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) != _STEP:
        frame = frame.f_back
    return frame is not None


def _makes_states() -> bool:
    """Was the optimizer stepped, by zero, to make its states? `torch.distributed.checkpoint.state_dict` does so."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame.f_code.co_name == "_init_optim_state"


Kept = tuple[list[tuple[int, str, torch.dtype, int]], Tensor]  # of which module which parameter; its values


def _equal(some: Kept, others: Kept) -> bool:
    return some[0] == others[0] and torch.equal(some[1], others[1])


@torch.no_grad()
def some_values(module: nn.Module) -> Kept:
    """Which parameters, and a copy of some of their values as integers [N]; nothing is waited for.

    They are of trainable parameters that this rank holds a part of.
    """
    learning = [
        (id(part), name, p)
        for part in every_part(module)
        for name, p in part._parameters.items()
        if p is not None and p.requires_grad and local(p).numel()
    ]
    stride = max(len(learning) // _PARAMETERS, 1) | 1  # odd: of adapters' pairs one may stand still
    some = learning[::stride][-_PARAMETERS:]
    found: list[Tensor] = []
    for _, _, parameter in some:
        values = local(parameter).detach().flatten()
        values = values[:: max(len(values) // _VALUES, 1)].contiguous()
        found.append(values.view(_INTEGERS[values.element_size()]).to(found[0].device if found else values.device))
    names = [(part, name, p.dtype, len(values)) for (part, name, p), values in zip(some, found, strict=True)]
    return names, torch.cat(found) if found else torch.zeros(0, dtype=torch.uint8, device="cpu")
