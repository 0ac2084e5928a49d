"""The gate: hangs on a model's forward, and on sparse steps lets it learn from the important labels only.

One training forward, in order:
    before   fetch the batch's layout, and the losses of the forward before; full or sparse? score labels, keep the
             best; mask the others' labels; decide which positions the decoder needs. The only wait for the device
    during   the engine elides the other positions (`regate_patch.active`)
    after    take the student's losses at kept labels, without waiting for them; store the difficulties that the last
             forward's made, while the device computes
Only training forwards with labels are touched; evaluation and generation run as they were.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import regate_patch
from model_adapters import AdapterError, Batch, Layout, ModelAdapter
from model_adapters.base import labels_alone
from model_adapters.conventional import text_config
from regate.config import Config
from regate.errors import ConfigError, NotGatedError, UnknownArchitectureError
from regate.insight.report import Report
from regate.labels import IGNORED, predicted
from regate.memory import checkpoint
from regate.memory.sharing import Exchange
from regate.memory.store import Store
from regate.output import router
from regate.output.head import Reading, ShortHead, hidden_states
from regate.output.loss import Places
from regate.output.outputs import kept_losses, rescale, without_logits
from regate.scoring import keys
from regate.scoring import teacher as teachers
from regate.scoring.decision import Decision
from regate.scoring.scorer import Samples, Scorer
from regate.training import batches
from regate.training.calls import OuterCall
from regate.training.counters import Counters, Stopwatch
from regate.training.hooks import Hook
from regate.training.sharding import refuse_opaque
from regate.training.steps import Steps
from regate_patch import to_device

log = logging.getLogger("regate")
OnUnsupported = Literal["raise", "warn"]


class Gate:
    """Made by `regate.apply`; see there."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        adapter: ModelAdapter,
        backend: regate_patch.Backend,
        teacher: teachers.TeacherChoice,
        store: Store,
        on_unsupported: OnUnsupported,
    ) -> None:
        self.config, self.adapter = config, adapter
        self.counters = Counters()
        self.last: Decision | None = None
        self.watch = Stopwatch()
        self.exchange = Exchange(store)
        self.on_unsupported = on_unsupported
        self._counted_step = -1
        self._notes: list[str] = []
        self._decoded: Any = None  # the decoder's output in this forward
        self._reading: Reading | None = None
        self._read = False  # are predictors of kept labels all that is read of the decoder's output?
        self._scope: contextlib.ExitStack | None = None
        self._active: regate_patch.Active | None = None  # what the decoder ran on in this forward
        self._model = model
        self._target = adapter.causal_lm(model)
        self._outer = OuterCall(model, self._target)
        self._decoder = adapter.decoder(model)
        self._head = adapter.head(model)
        self._short_head = ShortHead(self._target, self._decoder, self._head, wanted=config.logits == "kept")
        self._vocabulary = getattr(text_config(self._target), "vocab_size", None) or _rows_of(self._head)
        self._handle = regate_patch.patch(
            self._decoder, backend=backend, on_unsupported=on_unsupported, padding_elided=True
        )
        self._teacher = teachers.teacher_of(
            model, adapter, config, teacher, backend=backend, on_unsupported=on_unsupported
        )
        self.store = store
        self.scorer = Scorer(
            config,
            exchange=self.exchange,
            counters=self.counters,
            teacher=self._teacher,
            lazily=teacher != "precomputed",
            vocabulary=self._vocabulary,
        )
        self._steps = Steps(self._target, on_step=self._on_step, on_missed=self._on_missed)
        self._signature = inspect.signature(self._target.forward)
        self._hooks = [
            self._target.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            self._target.register_forward_hook(Hook(self._after), with_kwargs=True, always_call=True),
            self._decoder.register_forward_hook(Hook(self._after_decoder)),
        ]

    @property
    def step(self) -> int:
        """The optimizer step that training forwards now contribute to, from 0; set it to move the schedule."""
        return self._steps.step

    @step.setter
    def step(self, step: int) -> None:
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
        if self._teacher is not None:
            store.bind(self._teacher.fingerprint())
        self.exchange.store = store

    # -- hooks ----------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._close_scope()  # left open only if a forward was interrupted between its hooks
        batch = self._by_name(args, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "sample_ids"}  # ours, not the model's
        if not (module.training and torch.is_grad_enabled()):
            return args, kwargs
        if batch.get("labels") is None:
            self._steps.forward_without_labels()
            return args, kwargs
        self._steps.gated_forward()
        if self.counters.labels_seen == 0:  # sharding comes after `apply`, before the first step
            refuse_opaque(module)
        if self._handle.statistics.failed is not None:  # on_unsupported="warn": the decoder runs dense
            self.counters.forwards_ungated += 1
            return args, kwargs
        start = time.perf_counter()
        taught = self.counters.teacher_seconds
        layout = self._layout(batch)
        samples = self._samples(batch, layout)
        if not bool(samples.candidates.any()):
            self.counters.forwards_ungated += 1
            return args, kwargs
        self.scorer.collect()
        full = self.config.is_full(self.step)
        kept = self._choose(batch, layout, samples, full)
        balanced = router.is_balanced(self._target, batch)
        # on full steps the router loss reads positions that no label needs
        self.last = Decision.of(layout, kept, self.config, full=full, everything=full and balanced)
        self._waiting = samples
        device = batch["labels"].device
        changed = dict(layout.call or batch)
        changed.pop("sample_ids", None)
        if not full:
            labels = to_device(self.last.labels_left, device)
            changed |= self.adapter.with_labels(self._model, changed, labels)
            if changed.get("num_items_in_batch") is not None:  # the trainer's count of all labels
                changed["num_items_in_batch"] = changed["num_items_in_batch"] * self.last.share
        if "use_cache" in self._signature.parameters or hasattr(module, "config"):
            changed["use_cache"] = False  # keys of positions that were not computed cannot be cached
        self._scope = contextlib.ExitStack()
        self._scope.enter_context(self.adapter.capturable(self._model))
        if balanced:
            self._scope.enter_context(router.balanced_over(self._target, self._decoder, self._computed))
        if self._short_head.allowed is None:
            self._try_short_head(changed, layout.labels, kept)
        if self._short_head.allowed:
            self._reading = Reading.of(layout.labels, kept)
            changed["labels"] = to_device(self._reading.labels, device)
            self._scope.enter_context(self._short_head.chunks())
        if self._reading is None:
            self._places = Places.of(layout.labels, kept)
        else:
            self._places = Places.of(self._reading.labels, self._reading.labels != IGNORED)
        self._read = self._reading is not None and not balanced
        self._scope.enter_context(regate_patch.active(self._positions))
        self.counters.gate_seconds += time.perf_counter() - start - (self.counters.teacher_seconds - taught)
        return (), changed

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        decoded, self._decoded = self._decoded, None
        reading, self._reading = self._reading, None
        if self._scope is None:
            return None
        self._close_scope()
        active, self._active = self._active, None
        if output is None:  # the forward raised
            return None
        assert self.last is not None
        if (active is None or not active.ran) and self._handle.statistics.failed is None:
            raise regate_patch.NotElidedError(
                f"{type(module).__name__} ran a training forward without calling its decoder "
                f"{type(self._decoder).__name__}; register an adapter whose `decoder` is the module it calls"
            )
        start = time.perf_counter()
        if self.step != self._counted_step:
            self._counted_step = self.step
            self.counters.count_step(full=self.last.full)
        self.counters.add(self.last.sums)
        if active is not None:  # else on_unsupported="warn", and the decoder cannot be rewritten
            projected = self.last.labels.shape[1] if reading is None else reading.index.shape[1]
            self.counters.count_flops(
                self._handle.statistics, self._head, active, length=self.last.labels.shape[1], projected=projected
            )
        hidden = None if decoded is None else hidden_states(decoded)
        known = None if reading is None else self._short_head.losses
        losses = kept_losses(output, self._places, known=known, hidden_states=hidden, head=self._head)
        self.scorer.write()
        self.scorer.observe(self._waiting, self.last.labels, self.last.kept, losses)
        if reading is None and not self.last.full:
            output = rescale(output, self._waiting.candidates, self.last.share)
        if reading is not None:
            output = without_logits(output)
        self.counters.gate_seconds += time.perf_counter() - start
        return output

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._scope is None:
            return None
        self._decoded = output if self._reading is None else self._reading.shorten(output)
        return self._decoded

    @torch.compiler.disable
    def _positions(self, *args: Any, **kwargs: Any) -> regate_patch.Active:
        """What the decoder computes, now that it is called."""
        assert self.last is not None
        start = time.perf_counter()
        if self.last.spare is not None:
            embeddings = _embeddings(args, kwargs)
            if embeddings is None or embeddings.shape[:2] != self.last.spare.shape:
                raise ConfigError(
                    f"visual_keep={self.config.visual_keep} needs the embeddings of visual tokens, and "
                    f"{type(self._decoder).__name__} is not called with such; set visual_keep=1"
                )
            self.last = self.last.thin(embeddings, self.config.visual_keep)
        self._active = self.last.positions(_device(args, kwargs), read=self._read)
        self.counters.gate_seconds += time.perf_counter() - start
        return self._active

    def _computed(self) -> Tensor:
        assert self.last is not None
        return to_device(self.last.active, next(self._head.parameters()).device)

    def _try_short_head(self, call: dict[str, Any], labels: Tensor, kept: Tensor) -> None:
        """In the first gated forward."""
        if self.adapter.with_labels is not labels_alone or call.get("fused_lm_head"):
            self._short_head.allowed = False  # labels are laid out otherwise, or the head does so by itself
            return
        with regate_patch.active(self._positions):
            problem = self._short_head.try_out(call, labels, kept)
        self._decoded = self._active = None
        if problem is not None:
            self._note(problem)

    def _on_step(self) -> None:
        self.watch.step(full=self.config.is_full(self.step))
        self.exchange.tick()

    def _on_missed(self, cause: str) -> None:
        """An optimizer step was made of forwards that were not gated."""
        if self.config.is_full(self.step):
            return
        self.counters.steps_missed += 1
        if self.on_unsupported == "raise":
            raise NotGatedError(
                f"step {self.step} should be sparse, but its parameters were updated without gating: {cause}."
            )
        self._note(f"a step should be sparse, but its parameters were updated without gating: {cause}.")

    def _close_scope(self) -> None:
        if self._scope is not None:
            self._scope.close()
            self._scope = None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        batch = dict(self._signature.bind_partial(*args).arguments)
        return batch | kwargs

    # -- reading the batch, scoring -------------------------------------------------------------------

    def _layout(self, batch: Batch) -> Layout:
        try:
            layout = self.adapter.layout(self._model, batch)
        except AdapterError as error:
            raise UnknownArchitectureError(str(error)) from error
        return batches.on_host(batch, layout, vocabulary=self._vocabulary)

    def _samples(self, batch: Batch, layout: Layout) -> Samples:
        text = keys.text_keys(layout)
        batch = self._outer.arguments | dict(batch)
        sample_ids = batch.get("sample_ids")
        visual = None if sample_ids is not None else keys.visual_keys(self._model, self.adapter, batch, layout)
        if visual is None and sample_ids is None:
            self._note(keys.UNKNOWN_IMAGES)
        return Samples(text, keys.sample_keys(text, visual, sample_ids), predicted(layout.labels))

    def _choose(self, batch: Batch, layout: Layout, samples: Samples, full: bool) -> Tensor:
        """The labels kept, bool [B, S]."""
        return samples.candidates if full else self.scorer.keep(batch, layout, samples, step=self.step)

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)
            log.warning(note)

    # -- what users call --------------------------------------------------------------------------------

    def precompute(self, dataloader: Iterable[Batch], *, progress: bool = True) -> Report:
        """Reference losses for every sample of `dataloader`, before training.

        Resumable: what is in the store is not computed again, and each batch is stored as it is done.

        Args:
            dataloader: yields the keyword arguments of the model's forward; tensors are moved to its device.
            progress: show a progress bar.
        """
        device = next(self._target.parameters()).device
        for batch in tqdm(dataloader, desc="reference losses", unit="batch", disable=not progress):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            layout = self._layout(batch)
            self.scorer.teach(batch, layout, keys.text_keys(layout))
        return self.report()

    def choose(self, batch: Batch, *, full: bool = False) -> Tensor:
        """The labels [B, S] bool that a sparse (or full) step would keep of this batch now; trains nothing."""
        self.flush()
        layout = self._layout(batch)
        return self._choose(batch, layout, self._samples(batch, layout), full)

    def flush(self) -> None:
        """Write the difficulties of earlier forwards to the store; the forward after the next one would, too."""
        self.scorer.flush()

    def report(self) -> Report:
        """What was matched and what it gained; a mapping of plain numbers whose text is readable."""
        statistics = self._handle.statistics
        found = {
            "attention_blocks": statistics.attention,
            "mlp_blocks": statistics.mlp,
            "graphs": len(statistics.graphs) + statistics.other_graphs,
            "recompiles": statistics.recompiles,
            "samples_found_again": self.scorer.recurrence.share if self.scorer.recurrence.telling else 0.0,
            **self.watch.medians(),
        }
        notes = [*self._notes, *filter(None, [self.scorer.recurrence.reason()])]
        if self._handle.statistics.failed is not None:
            notes.append(f"the decoder runs dense: {self._handle.statistics.failed}")
        return Report(self.counters, found, notes)

    def state_dict(self) -> dict[str, Any]:
        """Schedule position, prior, counters and difficulties; tensors and plain numbers only."""
        self.flush()
        return {
            "step": self._steps.made,
            "counters": asdict(self.counters),
            "prior": self.scorer.prior.state_dict(),
            "difficulty": checkpoint.pack(self.store.items("difficulty")),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the store's difficulties become those of then."""
        self.scorer.forget()
        self._steps.restart(state["step"])
        self.counters.load(state["counters"])
        self._counted_step = self.step - 1
        self.scorer.prior.load_state_dict(state["prior"])
        self.store.clear("difficulty")
        self.store.put("difficulty", dict(checkpoint.unpack(state["difficulty"])))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `state_dict` into a checkpoint's folder, atomically. With several ranks, every rank must call it.

        Raises:
            RankError: another rank is gone.
        """
        self.flush()
        self.exchange.finish()
        state = self.state_dict()
        if checkpoint.rank() != 0:
            del state["difficulty"]  # rank 0 has them all by now
        checkpoint.save(folder, state)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from what `save` wrote, with as many ranks as there are now.

        Raises:
            CheckpointError: the folder holds no state of a gate, or it cannot be read.
        """
        self.load_state_dict(checkpoint.load(folder))

    def remove(self) -> None:
        """Take the gate off; the model is as it was before `apply`."""
        self._close_scope()
        self.flush()
        self._outer.remove()
        self._steps.remove()
        for hook in self._hooks:
            hook.remove()
        self._handle.remove()
        if self._teacher is not None:
            self._teacher.close()


def _embeddings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The embeddings [B, S, D] that a decoder is called with, if it is."""
    found = kwargs.get("inputs_embeds", kwargs.get("hidden_states", args[0] if args else None))
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a decoder is called."""
    return next(x.device for x in (*kwargs.values(), *args) if isinstance(x, Tensor))


def _rows_of(head: nn.Module) -> int:
    return max(p.shape[0] for p in head.parameters() if p.dim() == 2)
