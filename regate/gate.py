"""The gate: hangs on a model's forward, and on sparse steps lets it learn from the important labels only.

It holds settings and what lives long; what happens in one training forward is told in `forward.py`. Only training
forwards with labels are touched; evaluation and generation run as they were.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

import regate_patch
from model_adapters import Batch, ModelAdapter
from model_adapters.conventional import signature
from regate.config import Config
from regate.errors import ConfigError, NotGatedError, UnknownArchitectureError
from regate.forward import Forward
from regate.insight.report import Report
from regate.memory import checkpoint
from regate.memory.keys import NO_IDS
from regate.memory.sharing import Exchange
from regate.memory.store import Store
from regate.pace.pace import Pace
from regate.parts import Parts
from regate.proof.reads import changes_call
from regate.scoring.ahead import teach_all
from regate.scoring.decision import Decision
from regate.scoring.scorer import Samples, Scorer
from regate.scoring.turns import Turns
from regate.state import RunState
from regate.teaching.choice import TeacherChoice, teacher_of
from regate.teaching.teacher import Teacher
from regate.training.calls import OuterCall, inner_call
from regate.training.counters import Counters, Stopwatch
from regate.training.hooks import Hook, call_weakly, is_inside, is_recomputed
from regate.training.sharding import forget_layers, gather_by_layer, refuse_opaque
from regate.training.steps import Steps, some_values

log = logging.getLogger("regate")
NO_COPY = (
    "teacher='auto' keeps no copy of a model that is split over ranks, or whose copy would leave too little memory: "
    "the model itself gives reference losses before its first step. A Trainer sees to it; in a loop of your own, call "
    "gate.precompute over the training set first. teacher='copy' keeps a copy nevertheless"
)
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
OnUnsupported = Literal["raise", "warn"]


class Gate:
    """Made by `regate.apply`; see there.

    Attributes:
        model: as it was given to `apply`.
        first: is the model its own teacher until its first optimizer step, so that reference losses of the whole
            training set must be computed before? A Trainer does it (`regate/trainer.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        adapter: ModelAdapter,
        backend: regate_patch.Backend,
        teacher: TeacherChoice,
        store: Store,
        on_unsupported: OnUnsupported,
    ) -> None:
        self._config, self.adapter = config, adapter
        self.counters, self.watch = Counters(), Stopwatch()
        self.last: Decision | None = None
        self.exchange = Exchange(store)
        self.on_unsupported = on_unsupported
        self._forward: Forward | None = None  # the one that is running
        self._gating = False  # is one running, or about to?
        self._notes: list[str] = []
        self.model = model
        target, decoder = adapter.causal_lm(model), adapter.decoder(model)
        self._teacher = teacher_of(model, adapter, config, teacher, backend=backend, on_unsupported=on_unsupported)
        handle = regate_patch.patch(
            decoder,
            backend=backend,
            on_unsupported=on_unsupported,
            padding_elided=True,
            visible=config.elided == "visible" and config.keep * config.visual_keep < 1,
            disable=config.disable,
        )
        copied = self._teacher is not None and self._teacher.source in ("copy", "4bit")
        self._copied = some_values(decoder) if copied else None
        self.scorer = Scorer(
            config,
            exchange=self.exchange,
            counters=self.counters,
            teacher=self._teacher,
            lazily=teacher != "precomputed" and (self._teacher is None or self._teacher.lasts),
        )
        self.exchange.beside = self.scorer.guard if config.guard is not None else None
        self.store = store
        self.turns = Turns(config, self.exchange)
        self._backend, self._automatic = backend, teacher == "auto"
        self.first = self._teacher is not None and (teacher == "first" or (self._automatic and not self.scorer.lazily))
        if self.first and self._automatic:
            self.note(NO_COPY)
        self._parts = Parts(
            model,
            target,
            decoder,
            OuterCall(model, target),
            Pace(model, decoder, adapter, self.counters),
            adapter,
            config,
            handle,
            self.scorer,
            self.turns,
            self.counters,
            note=call_weakly(self.note),
        )
        self._steps = Steps(model, target, on_step=self._on_step, on_missed=self._on_missed)
        self._state = RunState(self._steps, self.scorer, self.turns)
        gather_by_layer(decoder)
        self._hooks = [
            target.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            target.register_forward_hook(Hook(self._after), prepend=True, with_kwargs=True, always_call=True),
            decoder.register_forward_hook(Hook(self._after_decoder), with_kwargs=True),
        ]

    @property
    def config(self) -> Config:
        """The settings, which are those of `apply`.

        Raises:
            ConfigError: on setting.
        """
        return self._config

    @config.setter
    def config(self, config: Config) -> None:
        raise ConfigError(
            "a gate keeps the settings it was made with; regate.apply(model, config, store=gate.store) makes one with "
            "others, which goes on where its `step` is set"
        )

    @property
    def step(self) -> int:
        """The optimizer step that training forwards now contribute to, from 0; set it to move the schedule.

        Raises:
            ConfigError: on setting, it is no number of steps.
        """
        return self._steps.step

    @step.setter
    def step(self, step: int) -> None:
        if not isinstance(step, int) or step < 0:
            raise ConfigError(f"gate.step counts optimizer steps from 0, got {step!r}")
        self._steps.restart(step)

    @property
    def store(self) -> Store:
        """Reference losses and difficulties; another one may take its place between steps.

        Raises:
            StoreMismatchError: on setting, its reference losses are another teacher's.
        """
        return self.exchange.store

    @store.setter
    def store(self, store: Store) -> None:
        self.scorer.use(store)

    # -- hooks ----------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._gating and is_inside(module):
            if torch.is_grad_enabled():
                self._refuse(RECOMPUTED if is_recomputed() else NESTED)
            return None  # without gradients: of another batch, or one more view of this one
        self._drop()  # what is left of a forward that was interrupted between its hooks
        batch = self._by_name(args, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "sample_ids"}  # ours, not the model's
        if not torch.is_grad_enabled():
            return args, kwargs
        if not module.training:
            if batch.get("labels") is not None:
                self._steps.forward_in_eval_mode()
            return args, kwargs
        self._parts.pace.wait(embedded=batch.get("input_ids") is None)  # an own wrapper's encoder ran before
        late = changes_call(module, self._hooks[0].id)
        if batch.get("labels") is None or late is not None:
            if late is None:
                self._steps.forward_without_labels()
            else:
                self._go_last(late)
            self._parts.pace.wait()
            self._parts.ready_to_prove(False)
            return args, kwargs
        if is_recomputed():
            self._refuse(RECOMPUTED)
        self._gating = True
        self._steps.gated_forward()
        if self.counters.labels_seen == 0:  # sharding comes after `apply`, before the first step
            refuse_opaque(module, self._parts.decoder)
            self._look_around()
        if self._parts.handle.statistics.failed is None:  # else on_unsupported="warn": the decoder runs dense
            self._forward = Forward.begin(self._parts, batch, step=self.step)
        if self._forward is None:
            self._gating = False
            self.counters.forwards_ungated += 1
            return args, kwargs
        self.last = self._forward.decision
        return (), self._forward.arguments()

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
        self.counters.count_step(self.step, full=self.last.full)
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
        self.watch.step(full=self._parts.is_full(self.step))
        self.exchange.tick()
        guard = self.scorer.guard
        self.counters.steps_guarded += guard.open and not self.config.is_full(self.step)
        if guard.step(sparse_next=not self.config.is_full(self.step + 1)):
            self.note(GOT_WORSE.format(rise=self.config.guard, cycle=self.config.cycle))

    def _on_missed(self, cause: str, never: bool) -> None:
        """An optimizer step was made of forwards that were not gated; `never`: none was so far."""
        full = self._parts.is_full(self.step)
        if full and not never:
            return
        self.counters.steps_missed += not full
        wanted = "no forward has been gated so far" if never else f"step {self.step} should be sparse"
        missed = f"{wanted}, but parameters were updated: {cause}."
        if self.on_unsupported == "raise":
            raise NotGatedError(missed)
        self.note(missed)

    def _look_around(self) -> None:
        """Before the first forward of a run: whose memory is in the store, and is the teacher still what it copied?"""
        if self._copied is not None and self.step == 0:
            now = some_values(self._parts.decoder)
            if now[0] == self._copied[0] and not torch.equal(now[1].cpu(), self._copied[1].cpu()):
                self.note(CHANGED_SINCE)
        self._copied = None
        if not self.store.temporary and checkpoint.rank() == 0 and (n := self.store.count("difficulty")):
            self.note(OF_ANOTHER_RUN.format(path=self.store.path, n=n))

    def _go_last(self, late: str) -> None:
        """A hook behind ours may change the batch: from the next forward on it comes first; this one is not gated."""
        self.note(f"{late} since the gate was applied: the forward in which it was first seen ran ungated")
        hooks, own = self._parts.target._forward_pre_hooks, self._hooks[0].id
        hooks[own] = hooks.pop(own)
        self._steps.gated_forward()
        self.counters.forwards_ungated += 1

    def _refuse(self, why: str) -> NoReturn:
        raise UnknownArchitectureError(why.format(name=type(self._parts.target).__name__))

    def _drop(self) -> None:
        self._gating = False
        if self._forward is not None:
            self._forward.close()
            self._forward = None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return (dict(signature(self._parts.target).bind_partial(*args).arguments) if args else {}) | kwargs

    def note(self, note: str) -> None:
        """Tell the user something, once; the report says it again."""
        if note not in self._notes:
            self._notes.append(note)
            log.warning(note)

    # -- what users call --------------------------------------------------------------------------------

    def precompute(self, dataloader: Iterable[Batch], *, progress: bool = True, split: bool = False) -> Report:
        """Reference losses for every sample of `dataloader`, before training.

        Resumable: what is in the store is not computed again, and each batch is stored as it is done.

        Args:
            dataloader: yields the keyword arguments of the model's forward; tensors, also in lists, are moved to its
                device. An own wrapper that embeds its batch for a language model inside runs up to that one's call.
            progress: show a progress bar.
            split: every rank calls this with a part of its own of the samples, and in the end has those of all. A model
                that FSDP2 has split needs it, and then it goes without saying.

        Raises:
            GateNotAppliedError: the gate has no teacher.
            StoreError: reference losses are missing, and the model that would give them was trained meanwhile.
            ConfigError: this rank has no batch, but others have.
            UnsupportedShardingError: see `inner_call`.
        """
        device = next(self._parts.target.parameters()).device
        refuse_opaque(self._parts.target, self._parts.decoder)

        def read(batch: Batch) -> Samples:
            batch = {k: _moved(v, device) for k, v in batch.items() if k != "sample_ids"}
            call = inner_call(self.model, self._parts.target, batch)
            return self._parts.read({**call, "sample_ids": NO_IDS})[1]  # images need not be told apart

        split = split or (self._teacher is not None and self._teacher.together)
        teach_all(self.scorer, dataloader, read, steps=self._steps.made, progress=progress, split=split)
        return self.report()

    def teach_first(self) -> None:
        """Give up the copy of the language model: until its first step the model is its own teacher.

        Of teacher="auto" alone, and before the first step.
        """
        if self._teacher is None or self._teacher.source != "copy" or not self._automatic or self._steps.made:
            return
        self._teacher.close()
        self._teacher = Teacher(self.model, self.adapter, backend=self._backend, source="live")
        self.scorer.teacher, self.scorer.lazily, self.first = self._teacher, False, True

    def choose(self, batch: Batch, *, full: bool = False) -> Tensor:
        """The labels [B, S] bool that a sparse (or full) step would keep of this batch now; trains nothing."""
        self.flush()
        layout, samples = self._parts.read(batch)
        if full:
            return samples.segments.pack(samples.candidates)
        whole = self._parts.turns_of(layout, samples)
        self.scorer.prepare(samples, full=False, whole=whole)
        return samples.segments.pack(self.scorer.keep(samples, whole=whole))

    def flush(self) -> None:
        """Write the difficulties of earlier forwards to the store; the forward after the next one would, too."""
        self.scorer.flush()

    def report(self) -> Report:
        """What was matched and what it gained; a mapping of plain numbers whose text is readable."""
        statistics = self._parts.handle.statistics
        found = {
            "attention_blocks": statistics.attention,
            "mlp_blocks": statistics.mlp,
            "graphs": len(statistics.graphs) + statistics.other_graphs,
            "recompiles": statistics.recompiles,
            "samples_found_again": self.scorer.recurrence.share if self.scorer.recurrence.telling else 0.0,
            **self.watch.medians(),
        }
        notes = [*self._notes, *filter(None, [self.scorer.recurrence.reason()])]
        if statistics.failed is not None:
            notes.append(f"the decoder runs dense: {statistics.failed}")
        return Report(self.counters, found, notes)

    def state_dict(self) -> dict[str, Any]:
        """Schedule position, prior, counters and difficulties; tensors and plain numbers only.

        Reference losses, too, where they cannot be made again and the store goes with the process.
        """
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the store's difficulties become those of then.

        Raises:
            StoreError: the run had reference losses that the store lacks, and the model is no longer what made them.
            StoreMismatchError: the run had another teacher than this gate.
        """
        self._state.load_state_dict(state)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `state_dict` into a checkpoint's folder, atomically. With several ranks, every rank must call it.

        Raises:
            RankError: another rank is gone.
        """
        self._state.save(folder)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from what `save` wrote, with as many ranks as there are now.

        Raises:
            CheckpointError: the folder holds no state of a gate, or it cannot be read.
        """
        self._state.load(folder)

    def remove(self) -> None:
        """Take the gate off; the model is as it was before `apply`."""
        self._drop()
        self.flush()
        self._parts.outer.remove()
        self._parts.pace.remove()
        self._steps.remove()
        for hook in self._hooks:
            hook.remove()
        self._parts.handle.remove()
        forget_layers(self._parts.decoder)
        if self._teacher is not None:
            self._teacher.close()


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, (list, tuple)) and any(isinstance(entry, Tensor) for entry in x):
        return [_moved(entry, device) for entry in x]
    return x.to(device) if isinstance(x, Tensor) else x
