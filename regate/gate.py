"""The gate, as users hold it: lets a model learn, on sparse steps, from the important labels only.

It makes and holds what lives long. What hangs on the model is told in `attached.py`, what happens in one training
forward in `forward.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import regate_patch
from model_adapters import Batch, ModelAdapter
from regate.attached import Attached
from regate.config import Config
from regate.errors import ConfigError, GateNotAppliedError, UnsupportedShardingError
from regate.insight.report import Report
from regate.memory.keys import NO_IDS
from regate.memory.sharing import Exchange
from regate.memory.store import Store
from regate.pace.pace import Pace
from regate.parts import Parts
from regate.scoring.ahead import teach_all
from regate.scoring.decision import Decision
from regate.scoring.scorer import Samples, Scorer
from regate.scoring.turns import Turns
from regate.state import RunState
from regate.teaching.choice import TeacherChoice, teacher_of
from regate.teaching.teacher import Teacher
from regate.training.calls import OuterCall, inner_call
from regate.training.counters import Counters
from regate.training.hooks import call_weakly
from regate.training.sharding import forget_layers, gather_by_layer, refuse_opaque
from regate_patch import is_sharded

log = logging.getLogger("regate")
NOT_DEALT_OUT = (
    "FSDP is to deal out what one rank alone has read (cpu_ram_efficient_loading), and the teacher's weights are the "
    "model's: nothing can be asked of it before accelerator.prepare, or fully_shard, has split the model"
)
NO_COPY = (
    "teacher='auto' keeps no copy of a model that is split over ranks, or will be when one rank has read it, or whose "
    "copy would leave too little memory: the model itself gives reference losses before its first step. A Trainer sees "
    "to it; in a loop of your own, call gate.precompute over the training set first, and after the model is split. "
    "teacher='copy' keeps a copy of a model that every rank has"
)

TRAINED = (
    "the gate that this one replaces has made {n} optimizer steps, and the teacher is the model as it is now, trained: "
    "it no longer says what could be guessed before training. Pass the model as it was then, loaded once more: "
    "regate.apply(model, config, teacher=untrained)"
)
HIDDEN = (
    "visual_keep={share} with elided='hidden': nothing sees the visual tokens that sparse steps leave out, which cost "
    "quality where it was tried (docs/evidence.md). With elided='visible' they stay to be seen"
)
NO_BATCHES = (
    "gate.precompute takes what yields batches, each a mapping with the keyword arguments of the model's forward, such "
    "as a DataLoader or a list of them; got {got}"
)


class Gate:
    """Made by `regate.apply`; see there.

    Attributes:
        model: as it was given to `apply`.
        first: is the model its own teacher until its first optimizer step, so that reference losses of the whole
            training set must be computed before? A Trainer does it (`regate/trainer.py`).
    """

    _all: ClassVar[weakref.WeakSet[Gate]] = weakref.WeakSet()

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        adapter: ModelAdapter,
        backend: regate_patch.Backend,
        teacher: TeacherChoice,
        store: Store,
        on_unsupported: regate_patch.OnUnsupported,
    ) -> None:
        self.model, self.adapter, self._config = model, adapter, config
        self._backend, self._automatic = backend, teacher == "auto"
        self._notes: list[str] = []
        self._removed = False
        target, decoder = adapter.causal_lm(model), adapter.decoder(model)
        taught_by = teacher_of(model, adapter, config, teacher, backend=backend, on_unsupported=on_unsupported)
        with contextlib.ExitStack() as undone:  # if this is refused, by the store or the engine, or fails
            if taught_by is not None:
                undone.callback(taught_by.close)
            self.counters, self.exchange = Counters(), Exchange(store)
            self.scorer = Scorer(
                config,
                exchange=self.exchange,
                counters=self.counters,
                teacher=taught_by,
                lazily=teacher != "precomputed" and (taught_by is None or taught_by.lasts),
            )
            self.exchange.beside = self.scorer.guard if config.guard is not None else None
            self.store = store  # refuses losses of another teacher; only then is the model touched
            handle = regate_patch.patch(
                decoder,
                backend=backend,
                on_unsupported=on_unsupported,
                padding_elided=True,
                visible=config.shows,
                disable=config.disable,
            )
            undone.callback(handle.remove)
            self.turns = Turns(config, self.exchange)
            self.first = taught_by is not None and (teacher == "first" or (self._automatic and not self.scorer.lazily))
            if self.first and self._automatic:
                self.note(NO_COPY)
            outer, pace = OuterCall(model, target), Pace(model, decoder, adapter, self.counters)
            undone.callback(outer.remove)
            undone.callback(pace.remove)
            self._parts = Parts(
                model=model, target=target, decoder=decoder, outer=outer, pace=pace, adapter=adapter, config=config,
                handle=handle, scorer=self.scorer, turns=self.turns, counters=self.counters,
                note=call_weakly(self.note),
            )  # fmt: skip
            if config.visual_keep < 1 and config.elided == "hidden":
                self.note(HIDDEN.format(share=config.visual_keep))
            undone.callback(forget_layers, decoder)
            gather_by_layer(decoder)
            copies = taught_by is not None and taught_by.is_copy
            self._attached = Attached(self, self._parts, learns_from_copy=copies, on_unsupported=on_unsupported)
            self._state = RunState(self._attached.steps, self._parts)
            self._all.add(self)
            undone.pop_all()

    @property
    def _teacher(self) -> Teacher | None:
        return self.scorer.teacher

    @property
    def last(self) -> Decision | None:
        """What was decided in the last gated forward; None before the first."""
        return self._attached.last

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
            "a gate keeps the settings it was made with. Another one can take its place: "
            "new = regate.apply(model, config, store=gate.store, teacher=untrained), then new.step = gate.step. "
            "`untrained` is the model as it was before training, loaded once more; before the first step, and with "
            "PEFT, leave teacher out"
        )

    @property
    def step(self) -> int:
        """The optimizer step that the latest training forward contributes to, from 0; set it to move the schedule.

        After `optimizer.step()` it is still that one, until the next forward begins another.

        Raises:
            ConfigError: on setting, it is no number of steps.
        """
        return self._attached.steps.step

    @step.setter
    def step(self, step: int) -> None:
        if not isinstance(step, int) or step < 0:
            raise ConfigError(f"gate.step counts optimizer steps from 0, got {step!r}")
        self._attached.steps.restart(step)

    @property
    def store(self) -> Store:
        """Reference losses and difficulties; another one may take its place between steps.

        Raises:
            ConfigError: on setting, it is no `Store`.
            StoreMismatchError: on setting, its reference losses are another teacher's.
            StoreInUseError: on setting, a run of another process learns into it.
        """
        return self.exchange.store

    @store.setter
    def store(self, store: Store) -> None:
        if not isinstance(store, Store):
            raise ConfigError(f"gate.store must be a regate.Store, got {store!r}; regate.Store(path) opens one")
        self.scorer.use(store)

    def note(self, note: str) -> None:
        """Tell the user something, once; the report says it again."""
        if note not in self._notes:
            self._notes.append(note)
            log.warning(note)

    def replaces(self, other: Gate) -> None:
        """Tell the user if the teacher is what the model has learnt under another gate, which was taken off."""
        made, teacher = other._attached.steps.made, self._teacher
        own = teacher is not None and (teacher.is_copy or not teacher.lasts)
        if own and made and self.scorer.taught_by != other.scorer.taught_by:
            self.note(TRAINED.format(n=made))

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
            GateNotAppliedError: the gate has no teacher, or was removed.
            LabelsError: a batch has no `labels`, or see `on_host`.
            StoreMismatchError: the store's are another teacher's.
            StoreError: reference losses are missing, and the model that would give them was trained meanwhile.
            ConfigError: it yields no batches of that kind; or this rank has no batch, but others have.
            UnsupportedShardingError: see `inner_call`; or ranks still lack the weights that would answer.
        """
        self._check_applied()
        _refuse_single(dataloader)
        device = next(self._parts.target.parameters()).device
        refuse_opaque(self._parts.target, self._parts.decoder)

        def read(batch: Batch) -> Samples:
            if not isinstance(batch, Mapping):
                raise ConfigError(NO_BATCHES.format(got=f"one that yields {type(batch).__name__}"))
            batch = {k: _moved(v, device) for k, v in batch.items() if k != "sample_ids"}
            call = inner_call(self.model, self._parts.target, batch)
            with torch.no_grad():  # some embed their batch to read it
                return self._parts.read({**call, "sample_ids": NO_IDS})[1]  # images need not be told apart

        self._meet_teacher()
        split = split or (self._teacher is not None and self._teacher.together)
        teach_all(self.scorer, dataloader, read, steps=self._attached.steps.made, progress=progress, split=split)
        return self.report()

    def teach_first(self) -> None:
        """Give up the copy of the language model: until its first step the model is its own teacher.

        Of teacher="auto" alone, and before the first step.
        """
        if self._teacher is None or self._teacher.source != "copy" or not self._automatic or self._attached.steps.made:
            return
        self._teacher.close()
        self.scorer.teacher = Teacher(self.model, self.adapter, backend=self._backend, source="live")
        self.scorer.lazily, self.first = False, True
        self._attached.forget_copy()

    def choose(self, batch: Batch, *, full: bool = False) -> Tensor:
        """The labels [B, S] bool that a sparse (or full) step would keep of this batch now; trains nothing.

        Raises:
            GateNotAppliedError: the gate was removed, and its teacher with it.
            RegateError: the batch cannot be gated.
        """
        self._check_applied()
        self.flush()
        with torch.no_grad():
            layout, samples = self._parts.read(batch)
        if full:
            return samples.segments.pack(samples.candidates)
        self._meet_teacher()
        whole = self._parts.turns_of(layout, samples)
        self.scorer.prepare(samples, full=False, whole=whole, running=False)
        return samples.segments.pack(self._parts.keep(layout, samples, whole))

    def _check_applied(self) -> None:
        if self._removed:
            raise GateNotAppliedError(
                f"this gate was taken off {type(self.model).__name__}, and its teacher with it; what it learnt is in "
                "its store and its state_dict(). regate.apply(model) makes another"
            )

    def _meet_teacher(self) -> None:
        if self._teacher is not None and self._teacher.waits and not is_sharded(self.model):
            raise UnsupportedShardingError(NOT_DEALT_OUT)
        self.scorer.meet_teacher(self.step)

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
            **self._attached.watch.medians(),
        }
        notes = [*self._notes, *filter(None, [self.scorer.recurrence.reason()])]
        notes += [
            f"the decoder runs dense{'' if cause == statistics.failed else ' where that is so'}: {cause}"
            for cause in statistics.causes
        ]
        config, step = self.config, self.step
        warming_up = config.leaves_out and step < config.warmup and not self.counters.steps_sparse
        return Report(self.counters, found, notes, warmup=config.warmup if warming_up else None)

    def state_dict(self) -> dict[str, Any]:
        """Schedule position, prior, counters and difficulties; tensors and plain numbers only.

        Reference losses, too, where they cannot be made again and the store goes with the process. With several ranks
        it is of what this one knows by now; `save` collects what all know.
        """
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the store's difficulties become those of then.

        With several ranks, every rank must call it.

        Raises:
            GateNotAppliedError: the gate was removed.
            CheckpointError: it is no state of a gate, or a damaged one; nothing was changed.
            StoreError: the run had reference losses that the store lacks, and the model is no longer what made them.
            StoreMismatchError: the run had another teacher than this gate.
            StoreInUseError: a run of another process learns into the store.
        """
        self._check_applied()
        self._state.load_state_dict(state)

    def save(self, folder: str | os.PathLike[str], *, on_each_node: bool = False) -> None:
        """Write `state_dict` into a checkpoint's folder, atomically. With several ranks, every rank must call it.

        Args:
            folder: made if missing.
            on_each_node: the folder is another one on each node, and each gets all that a rank of it needs.

        Raises:
            RankError: another rank is gone.
        """
        self._state.save(folder, on_each_node=on_each_node)

    @property
    def just_loaded(self) -> bool:
        """Was a state loaded, and has no step been made since?"""
        return self._state.just_loaded

    @classmethod
    def waiting(cls) -> list[Gate]:
        """Those on models that were not trained yet."""
        return [gate for gate in cls._all if not gate._removed and gate.last is None]

    @property
    def made(self) -> int:
        """Optimizer steps of the schedule that are complete."""
        return self._attached.steps.made

    def was_set_to(self, step: int) -> bool:
        """Was the schedule moved there by hand, or by what was loaded, and has no forward run since?"""
        return self._attached.steps.just_set and self.step == step

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from what `save` wrote, with as many ranks as there are now, every one of which must call it.

        Raises:
            GateNotAppliedError: the gate was removed.
            CheckpointError: the folder holds no state of a gate, or it cannot be read; nothing was changed.
        """
        self._check_applied()
        self._state.load(folder)

    def remove(self) -> None:
        """Take the gate off; the model is as it was before `apply`."""
        self._removed = True
        self._attached.remove()
        self._parts.outer.remove()
        self._parts.pace.remove()
        self._parts.handle.remove()
        forget_layers(self._parts.decoder)
        if self._teacher is not None:
            self._teacher.close()
            self.scorer.teacher = None  # it may fill the memory that another one needs
        try:
            self.flush()
        finally:
            self.exchange.let_go()


def _refuse_single(dataloader: Any) -> None:
    """What yields batches; a single one would yield the names of its entries."""
    if isinstance(dataloader, Mapping) or not (hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")):
        raise ConfigError(NO_BATCHES.format(got=type(dataloader).__name__))


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, (list, tuple)) and any(isinstance(entry, Tensor) for entry in x):
        return [_moved(entry, device) for entry in x]
    return x.to(device) if isinstance(x, Tensor) else x
