"""What hangs on a gated model: which of its forwards are gated, and what an optimizer step entails.

Only training forwards with labels are touched; evaluation and generation run as they were. What happens in one that is
gated is told in `forward.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

import regate_patch
from model_adapters.signatures import by_name
from regate.errors import NotGatedError, UnknownArchitectureError
from regate.forward import Forward
from regate.parts import Parts
from regate.proof.reads import changes_call
from regate.ranks import rank
from regate.scoring.decision import Decision
from regate.training.counters import Stopwatch
from regate.training.hooks import Hook, is_inside, is_recomputed, owners
from regate.training.sharding import refuse_opaque
from regate.training.steps import Steps, some_values

if TYPE_CHECKING:
    from regate.gate import Gate

OF_ANOTHER_RUN = (
    "the store at {path} holds difficulties of {n} samples, learnt in another run, and this run goes by them until it "
    "has its own. gate.load continues a run; gate.store.clear('difficulty') forgets what others learnt"
)
GOT_WORSE = (
    "the labels that sparse steps leave out got worse: their mean loss rose by more than {rise} above the lowest that "
    "it had been (Config.guard). Steps are full until half of that is gone, for {cycle} steps at most"
)
CHANGED_SINCE = (
    "the language model's weights were changed after the gate was applied and before training: its teacher is a copy "
    "of those of then. Load weights first, or apply the gate again"
)
NESTED = (
    "{name} calls itself within a training forward, and with gradients: labels would be chosen from twice. Let it call "
    "its `forward` for what belongs to the same loss, use torch.no_grad() where no gradients are needed, or add up the "
    "losses of two calls outside"
)
RECOMPUTED = (
    "the whole forward of {name} is checkpointed, and runs once more in the backward pass, where other labels would be "
    "kept than before. Checkpoint its layers instead (model.gradient_checkpointing_enable()), or the whole with "
    "use_reentrant=True"
)
NOTHING_TO_LEARN = (
    "{n} training forwards in a row had no label to learn from: all were -100. Usually the template or the collator "
    "has masked the answers, too, or rows are cut off before the answer begins (max_length)"
)
_UNLABELLED = 8  # training forwards in a row


class Attached:
    """A gate's hooks on its model.

    Args:
        gate: whose hooks they are, by which `regate.gate_of` finds it.
        parts: what forwards work with.
        learns_from_copy: is the teacher a copy of the language model as it is now?
        on_unsupported: "raise" where training goes past the gate, or "warn".

    Attributes:
        last: what was decided in the last gated forward; None before the first.
        steps: the optimizer steps made.
        watch: how long they took.
    """

    def __init__(
        self, gate: Gate, parts: Parts, *, learns_from_copy: bool, on_unsupported: regate_patch.OnUnsupported
    ) -> None:
        self.gate, self._parts, self._on_unsupported = gate, parts, on_unsupported
        self.last: Decision | None = None
        self.watch = Stopwatch()
        self.steps = Steps(parts.model, parts.target, on_step=self._on_step, on_missed=self._on_missed, note=parts.note)
        self._forward: Forward | None = None  # the one that is running
        self._gating = False  # is one running, or about to?
        self._unlabelled = 0  # forwards in a row whose labels were all -100
        self._copied = some_values(parts.decoder) if learns_from_copy else None
        self._looked = False  # at what the model has become since, once
        self._hooks = [
            parts.target.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            parts.target.register_forward_hook(Hook(self._after), prepend=True, with_kwargs=True, always_call=True),
            parts.decoder.register_forward_hook(Hook(self._after_decoder), with_kwargs=True),
        ]

    def forget_copy(self) -> None:
        """The teacher no longer is one: nothing need be what was copied."""
        self._copied = None

    def remove(self) -> None:
        """Take them off."""
        self._drop()
        self.steps.remove()
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._gating and is_inside(module):
            if torch.is_grad_enabled():
                self._refuse(RECOMPUTED if is_recomputed() else NESTED)
            return None  # without gradients: of another batch, or one more view of this one
        parts = self._parts
        self._drop()  # what is left of a forward that was interrupted between its hooks
        batch = by_name(parts.target, args, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "sample_ids"}  # ours, not the model's
        if not torch.is_grad_enabled():
            return args, kwargs
        if not module.training:
            if batch.get("labels") is not None:
                self.steps.forward_in_eval_mode()
            return args, kwargs
        parts.scorer.meet_teacher(self.steps.step)  # on every rank, whatever its batch
        parts.pace.wait(embedded=batch.get("input_ids") is None)  # an own wrapper's encoder ran before
        late = changes_call(module, self._hooks[0].id)
        if batch.get("labels") is None or late is not None:
            if late is None:
                self.steps.forward_without_labels()
            else:
                self._go_last(late)
            parts.pace.wait()
            parts.readers.due(None, batch)
            return args, kwargs
        if is_recomputed():
            self._refuse(RECOMPUTED)
        self._gating = True
        self.steps.gated_forward()
        if not self._looked:  # sharding comes after `apply`, before the first step
            refuse_opaque(module, parts.decoder)
            self._look_around()
            self._looked = True
        if self._can_gate():
            self._forward = Forward.begin(parts, batch, step=self.steps.step)
            self._unlabelled = 0 if self._forward is not None else self._unlabelled + 1
            if self._unlabelled == _UNLABELLED:
                parts.note(NOTHING_TO_LEARN.format(n=_UNLABELLED))
        if self._forward is None:
            self._gating = False
            parts.counters.forwards_ungated += 1
            return args, kwargs
        self.last = self._forward.decision
        return (), self._forward.arguments()

    def _can_gate(self) -> bool:
        """Else `on_unsupported` is "warn", and the decoder runs dense; transforms of `torch.func` know no value."""
        handle = self._parts.handle
        if self._on_unsupported == "warn" or torch._C._are_functorch_transforms_active():
            return handle.captures()
        return True

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._gating and is_inside(module):
            return None
        forward, self._forward, self._gating = self._forward, None, False
        if forward is None:
            return None
        try:
            if output is None:  # the forward raised
                return None
            if forward.outgrown(output):
                forward, output = self._anew(forward)
            output = forward.finish(output)
        finally:
            forward.close()
        self.last = forward.decision
        self._parts.counters.count_step(self.steps.step, full=self.last.full)
        return output

    def _anew(self, forward: Forward) -> tuple[Forward, Any]:
        """Run a forward again with more computed, in place of the one that has just run."""
        self._gating = True
        self._forward = forward = forward.again()
        try:
            return forward, self._parts.target.forward(**forward.arguments())
        except BaseException:
            forward.close()
            raise
        finally:
            self._forward, self._gating = None, False

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return None if self._forward is None else self._forward.decoded(args, kwargs, output)

    def _on_step(self) -> None:
        parts, config, step, guard = self._parts, self._parts.config, self.steps.step, self._parts.scorer.guard
        self.watch.step(full=parts.is_full(step))
        parts.scorer.exchange.tick(step)
        parts.counters.steps_guarded += guard.open and not config.is_full(step)
        if guard.step(sparse_next=not config.is_full(step + 1)):
            parts.note(GOT_WORSE.format(rise=config.guard, cycle=config.cycle))

    def _on_missed(self, cause: str, never: bool) -> None:
        """An optimizer step was made of forwards that were not gated; `never`: none was so far."""
        full = self._parts.is_full(self.steps.step)
        if full and not never:
            return
        self._parts.counters.steps_missed += not full
        wanted = "no forward has been gated so far" if never else f"step {self.steps.step} should be sparse"
        missed = f"{wanted}, but parameters were updated: {cause}."
        if self._on_unsupported == "raise":
            raise NotGatedError(missed)
        self._parts.note(missed)

    def _look_around(self) -> None:
        """Before the first forward: whose memory is in the store, and is the teacher still what it copied?"""
        parts, store = self._parts, self._parts.scorer.store
        if self._copied is not None and self.steps.step == 0:
            now = some_values(parts.decoder)
            if now[0] == self._copied[0] and not torch.equal(now[1].cpu(), self._copied[1].cpu()):
                parts.note(CHANGED_SINCE)
        self._copied = None
        parts.scorer.exchange.claim()
        fresh = parts.counters.labels_seen == 0  # else a state was loaded, and its memory with it
        if fresh and not store.temporary and rank() == 0 and (n := store.count("difficulty")):
            parts.note(OF_ANOTHER_RUN.format(path=store.path, n=n))

    def _go_last(self, late: str) -> None:
        """A hook behind ours may change the batch: from the next forward on it comes first; this one is not gated."""
        self._parts.note(f"{late} since the gate was applied: the forward in which it was first seen ran ungated")
        hooks, own = self._parts.target._forward_pre_hooks, self._hooks[0].id
        hooks[own] = hooks.pop(own)
        self.steps.gated_forward()
        self._parts.counters.forwards_ungated += 1

    def _refuse(self, why: str) -> NoReturn:
        raise UnknownArchitectureError(why.format(name=type(self._parts.target).__name__))

    def _drop(self) -> None:
        self._gating = False
        if self._forward is not None:
            self._forward.close()
            self._forward = None


def gate_on(module: nn.Module) -> Gate | None:
    """The gate whose hooks hang on this module."""
    return next((owner.gate for owner in owners(module) if isinstance(owner, Attached)), None)
