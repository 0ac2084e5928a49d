"""The gate: hangs on a model's forward, and on sparse steps lets it learn from the important labels only.

One training forward, in order:
    before   read the batch's layout; full or sparse? score labels, keep the best; mask the others' labels;
             compute which positions the decoder needs
    during   the engine elides the other positions (`regate_patch.active`)
    after    read the student's losses at kept labels; update difficulties (written at the next forward)
Only training forwards with labels are touched; evaluation and generation run as they were.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm.auto import tqdm

import regate_patch
from model_adapters import AdapterError, Batch, Layout, ModelAdapter, find_adapter
from model_adapters.conventional import text_config
from regate import checkpoint, difficulty, keys, reference, router
from regate.config import Config
from regate.errors import (
    GateNotAppliedError,
    LabelsError,
    NotGatedError,
    StoreError,
    UnknownArchitectureError,
)
from regate.hooks import Hook, call_weakly
from regate.outputs import kept_losses, rescale
from regate.report import Counters, Report, Stopwatch
from regate.selection import IGNORED, active_positions, keep_highest, predicted
from regate.sharding import refuse_opaque
from regate.sharing import Exchange
from regate.store import Store, Table

log = logging.getLogger("regate")
TeacherChoice = Literal["auto", "4bit", "precomputed"] | nn.Module | None
OnUnsupported = Literal["raise", "warn"]


@dataclass(frozen=True)
class Decision:
    """What the gate decided in one forward; all tensors [B, S].

    Attributes:
        full: every label kept?
        labels: int64, as the batch brought them.
        kept: bool, labels that enter the loss.
        active: bool, positions that the decoder computes.
    """

    full: bool
    labels: Tensor
    kept: Tensor
    active: Tensor


@dataclass
class _Pending:
    """Losses of one forward on their way to the store."""

    keys: list[bytes]
    candidates: Tensor
    kept: Tensor
    losses: Tensor


class Gate:
    """Made by `regate.apply`; see there."""

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
        self.config, self.adapter, self.store = config, adapter, store
        self.counters = Counters()
        self.last: Decision | None = None
        self.step = 0
        self.watch = Stopwatch()
        self.exchange = Exchange(store)
        self.on_unsupported = on_unsupported
        self._stepped: set[int] = set()  # optimizers that stepped since the last gated forward
        self._optimizer_known = False
        self._without_labels = 0  # training forwards since then
        self._counted_step = -1
        self._notes: list[str] = []
        self._pending: list[_Pending] = []
        self._hidden_states: Tensor | None = None
        self._scope: contextlib.ExitStack | None = None
        self._active: regate_patch.Active | None = None
        self._model = model
        self._target = adapter.causal_lm(model)
        self._decoder = adapter.decoder(model)
        self._head = adapter.head(model)
        self._vocabulary = getattr(text_config(self._target), "vocab_size", None) or _rows_of(self._head)
        self.prior = difficulty.VocabularyPrior(self._vocabulary, decay=config.ema_decay)
        self._handle = regate_patch.patch(self._decoder, backend=backend, on_unsupported=on_unsupported)
        self._teacher = self._make_teacher(teacher, backend, on_unsupported)
        if self._teacher is not None:
            self.store.bind(self._teacher.fingerprint())
        self._precomputed_only = teacher == "precomputed"
        self._signature = inspect.signature(self._target.forward)
        self._hooks = [
            self._target.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            self._target.register_forward_hook(Hook(self._after), with_kwargs=True, always_call=True),
            self._decoder.register_forward_hook(Hook(self._after_decoder)),
            register_optimizer_step_post_hook(call_weakly(self._on_optimizer_step)),
        ]

    def _make_teacher(
        self, teacher: TeacherChoice, backend: regate_patch.Backend, on_unsupported: OnUnsupported
    ) -> reference.Teacher | None:
        if teacher is None or self.config.reference_weight == 0 or self.config.selection == "random":
            return None
        source: reference.Source = "copy"
        model, adapter = self._model, self.adapter
        if isinstance(teacher, nn.Module):
            model, adapter, source = teacher, find_adapter(teacher), "given"
        elif teacher == "precomputed" or reference.uses_peft(model):
            source = "live"
        elif teacher == "4bit":
            source = "4bit"
        return reference.Teacher(model, adapter, backend=backend, source=source, on_unsupported=on_unsupported)

    # -- hooks ----------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._close_scope()  # left open only if a forward was interrupted between its hooks
        kwargs = dict(kwargs)
        sample_ids = kwargs.pop("sample_ids", None)  # ours, not the model's
        if not (module.training and torch.is_grad_enabled()):
            return args, kwargs
        batch = self._by_name(args, kwargs)
        if batch.get("labels") is None:
            self._without_labels += 1
            return args, kwargs
        self._advance()
        if self.counters.labels_seen == 0:  # sharding comes after `apply`, before the first step
            refuse_opaque(module)
        if self._handle.statistics.failed is not None:  # on_unsupported="warn": the decoder runs dense
            self.counters.forwards_ungated += 1
            return args, kwargs
        start = time.perf_counter()
        taught = self.counters.teacher_seconds
        layout = self._layout(batch)
        candidates = predicted(layout.labels)
        if not bool(candidates.any()):
            self.counters.forwards_ungated += 1
            return args, kwargs
        self.flush()
        full = self.config.is_full(self.step)
        kept, samples = self._choose(batch, layout, candidates, full, sample_ids)
        active = active_positions(layout.labels, kept, layout.valid, alignment=self.config.alignment)
        balanced = router.is_balanced(self._target, batch)
        if full and balanced:  # the router loss reads positions that no label needs
            active = layout.valid
        self._active = regate_patch.Active.from_mask(active)
        self.last = Decision(full, layout.labels, kept, active)
        self._waiting = (samples, candidates)
        self._count(layout, self.last)
        changed = dict(layout.call or batch)
        if not full:
            labels = torch.where(kept, layout.labels, IGNORED)
            changed |= self.adapter.with_labels(self._model, changed, labels)
            if changed.get("num_items_in_batch") is not None:  # the trainer's count of all labels
                share = kept.sum() / candidates.sum()
                changed["num_items_in_batch"] = changed["num_items_in_batch"] * share
        if "use_cache" in self._signature.parameters or hasattr(module, "config"):
            changed["use_cache"] = False  # keys of positions that were not computed cannot be cached
        self._scope = contextlib.ExitStack()
        self._scope.enter_context(regate_patch.active(self._active))
        self._scope.enter_context(self.adapter.capturable(self._model))
        if balanced:
            self._scope.enter_context(router.balanced_over(self._target, self._decoder, active))
        self.counters.gate_seconds += time.perf_counter() - start - (self.counters.teacher_seconds - taught)
        return (), changed

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_states, self._hidden_states = self._hidden_states, None
        if self._scope is None:
            return None
        self._close_scope()
        active, self._active = self._active, None
        if output is None:  # the forward raised
            return None
        assert active is not None
        assert self.last is not None
        if not active.ran and self._handle.statistics.failed is None:
            raise regate_patch.NotElidedError(
                f"{type(module).__name__} ran a training forward without calling its decoder "
                f"{type(self._decoder).__name__}; register an adapter whose `decoder` is the module it calls"
            )
        start = time.perf_counter()
        rows, length = self.last.labels.shape
        self._count_flops(rows, length, active.index.shape[1])
        self._observe(output, hidden_states)
        if not self.last.full:
            output = rescale(output, self._waiting[1], self.last.kept)
        self.counters.gate_seconds += time.perf_counter() - start
        return output

    @torch.compiler.disable
    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._scope is not None:
            found = getattr(output, "last_hidden_state", None)
            if found is None:
                found = output if isinstance(output, Tensor) else output[0]
            self._hidden_states = found

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(p) for p in self._target.parameters()}
        holds = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        self._optimizer_known |= holds
        if not holds and self._optimizer_known:
            return  # another model's; until one with our parameters is seen, it may hold master copies of them
        if holds and id(optimizer) in self._stepped:  # a second time, and no gated forward between
            self._missed()
        if not self._stepped:  # the first of the model's optimizers
            self.watch.step(full=self.config.is_full(self.step))
            self.exchange.tick()
        self._stepped.add(id(optimizer))

    def _missed(self) -> None:
        """An optimizer step was made of forwards that were not gated."""
        self._stepped.clear()
        self.step += 1
        if self.config.is_full(self.step):
            return
        self.counters.steps_missed += 1
        name = type(self._target).__name__
        why = (
            f"{self._without_labels} training forward(s) of {name} got no `labels`. Pass them to the model; a trainer "
            "keeps them back for label smoothing or for a loss function of its own"
            if self._without_labels
            else f"no training forward of {name} was called. What computes the loss must call the model itself, not "
            "its `forward` or its parts"
        )
        problem = f"step {self.step} should be sparse, but its parameters were updated without gating: {why}."
        if self.on_unsupported == "raise":
            raise NotGatedError(problem)
        self._note(problem.replace(f"step {self.step}", "a step"))

    def _advance(self) -> None:
        """Micro-batches of one optimizer step share one decision: count steps, not forwards."""
        if self._stepped:
            self.step += 1
            self._stepped.clear()
        self._without_labels = 0

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
        shapes = {n: list(getattr(layout, n).shape) for n in ("input_ids", "labels", "valid", "visual")}
        if len({tuple(s) for s in shapes.values()}) > 1 or layout.labels.dim() != 2:
            raise LabelsError(
                "labels must be [B, S] like the decoder's input, one per position after visual expansion; got "
                + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            )
        highest = int(layout.labels.max())
        if highest >= self._vocabulary or bool((layout.labels < 0).logical_and(layout.labels != IGNORED).any()):
            raise LabelsError(
                f"labels must be token ids below the vocabulary size {self._vocabulary}, or {IGNORED}; got values "
                f"from {int(layout.labels.min())} to {highest}"
            )
        return layout

    def _choose(
        self, batch: Batch, layout: Layout, candidates: Tensor, full: bool, sample_ids: Any
    ) -> tuple[Tensor, list[bytes]]:
        """(labels kept [B, S], the rows' keys)."""
        text = keys.text_keys(layout)
        pixels = keys.pixel_fingerprints(batch, self.adapter.visual_inputs, len(text))
        if pixels is None and bool(layout.visual.any()) and sample_ids is None:
            self._note("visual input has no row per sample: equal texts share one difficulty; pass sample_ids")
        samples = keys.sample_keys(text, pixels, sample_ids)
        if full:
            return candidates, samples
        scores = self._scores(batch, layout, candidates, text, samples)
        return keep_highest(scores, candidates, self.config.keep), samples

    def _scores(
        self, batch: Batch, layout: Layout, candidates: Tensor, text: list[bytes], samples: list[bytes]
    ) -> Tensor:
        """[B, S] float32 scores at candidates: `student_weight*m + reference_weight*ref`."""
        config, device = self.config, layout.labels.device
        if config.selection == "random":
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.counters.labels_seen)
            return torch.rand(candidates.shape, generator=generator).to(device)
        m = _spread(self.store.get("difficulty", samples), candidates, difficulty.UNSEEN)
        expected = self.prior.expect(torch.where(candidates, layout.labels, 0))
        score = config.student_weight * torch.where(m == difficulty.UNSEEN, expected, m)
        if self._teacher is not None:
            score = score + config.reference_weight * _spread(self._references(batch, layout, text), candidates, 0.0)
        return score

    def _references(self, batch: Batch, layout: Layout, text: list[bytes]) -> Sequence[np.ndarray | None]:
        """Reference losses of the batch's rows, computed and stored where they are missing."""
        if self.store.missing("reference", text):
            if self._precomputed_only and self.step > 0:
                raise StoreError(
                    "a sample has no reference loss, and teacher='precomputed' keeps no teacher; run "
                    "gate.precompute over every sample before training, or use teacher='auto'"
                )
            self._teach(batch, layout, text)
        return self.store.get("reference", text)

    def _teach(self, batch: Batch, layout: Layout, text: list[bytes]) -> None:
        assert self._teacher is not None
        missing = self.store.missing("reference", text)
        if not missing:
            return
        start = time.perf_counter()
        rows = [text.index(key) for key in missing]
        losses = self._teacher.losses(batch, layout, rows)
        self._put("reference", {k: x.numpy() for k, x in zip(missing, losses, strict=True)})
        self.counters.teacher_samples += len(rows)
        self.counters.teacher_seconds += time.perf_counter() - start

    # -- learning from the forward ----------------------------------------------------------------------

    def _observe(self, output: Any, hidden_states: Tensor | None) -> None:
        assert self.last is not None
        kept = self.last.kept
        losses = kept_losses(output, self.last.labels, kept, hidden_states=hidden_states, head=self._head)
        samples, candidates = self._waiting
        self._pending.append(_Pending(samples, candidates, kept, losses))
        self.prior.observe(self.last.labels[kept], losses)

    def flush(self) -> None:
        """Write the difficulties of earlier forwards to the store."""
        pending, self._pending = self._pending, []
        for item in pending:
            m = _spread(self.store.get("difficulty", item.keys), item.candidates, difficulty.UNSEEN)
            loss = torch.zeros_like(m)
            loss[item.kept] = item.losses
            self.counters.nonfinite_losses += int((~torch.isfinite(item.losses)).sum())
            m = difficulty.update(m, loss, item.kept, decay=self.config.ema_decay).cpu()
            counts = item.candidates.sum(1).tolist()
            rows = m[item.candidates.cpu()].split(counts)
            self._put("difficulty", {k: r.numpy() for k, r in zip(item.keys, rows, strict=True) if len(r)})

    def _put(self, table: Table, records: dict[bytes, np.ndarray]) -> None:
        self.store.put(table, records)
        self.exchange.add(table, records)

    def _count(self, layout: Layout, decision: Decision) -> None:
        c = self.counters
        if self.step != self._counted_step:
            self._counted_step = self.step
            c.steps_full += decision.full
            c.steps_sparse += not decision.full
        c.labels_seen += int((layout.labels[:, 1:] != IGNORED).sum())
        c.labels_kept += int(decision.kept.sum())
        c.positions_seen += int(layout.valid.sum())
        c.positions_computed += int(decision.active.sum())

    def _count_flops(self, rows: int, length: int, computed: int) -> None:
        head = 6.0 * rows * length * sum(p.numel() for p in self._head.parameters() if p.dim() == 2)
        self.counters.flops_dense += 3 * rows * self._handle.statistics.flops(length) + head
        self.counters.flops_computed += 3 * rows * self._handle.statistics.flops(computed) + head

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
        if self._teacher is None:
            raise GateNotAppliedError(
                "this gate has no teacher (teacher=None, reference_weight=0 or selection='random')"
            )
        device = next(self._target.parameters()).device
        for batch in tqdm(dataloader, desc="reference losses", unit="batch", disable=not progress):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            layout = self._layout(batch)
            self._teach(batch, layout, keys.text_keys(layout))
        return self.report()

    def choose(self, batch: Batch, *, full: bool = False) -> Tensor:
        """The labels [B, S] bool that a sparse (or full) step would keep of this batch now; trains nothing."""
        self.flush()
        layout = self._layout(batch)
        return self._choose(batch, layout, predicted(layout.labels), full, batch.get("sample_ids"))[0]

    def report(self) -> Report:
        """What was matched and what it gained; a mapping of plain numbers whose text is readable."""
        statistics = self._handle.statistics
        found = {
            "attention_blocks": statistics.attention,
            "mlp_blocks": statistics.mlp,
            "graphs": len(statistics.graphs) + statistics.other_graphs,
            "recompiles": statistics.recompiles,
            **self.watch.medians(),
        }
        notes = list(self._notes)
        if self._handle.statistics.failed is not None:
            notes.append(f"the decoder runs dense: {self._handle.statistics.failed}")
        return Report(self.counters, found, notes)

    def state_dict(self) -> dict[str, Any]:
        """Schedule position, prior, counters and difficulties; tensors and plain numbers only."""
        self.flush()
        return {
            "step": self.step + bool(self._stepped),
            "counters": asdict(self.counters),
            "prior": self.prior.state_dict(),
            "difficulty": checkpoint.pack(self.store.items("difficulty")),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the store's difficulties become those of then."""
        self._pending.clear()
        self._stepped.clear()
        self.step = state["step"]
        self.counters.load(state["counters"])
        self._counted_step = self.step - 1
        self.prior.load_state_dict(state["prior"])
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
        for hook in self._hooks:
            hook.remove()
        self._handle.remove()
        if self._teacher is not None:
            self._teacher.close()


def _rows_of(head: nn.Module) -> int:
    return max(p.shape[0] for p in head.parameters() if p.dim() == 2)


def _spread(rows: Sequence[np.ndarray | None], candidates: Tensor, missing: float) -> Tensor:
    """Per-row label values [n_labels] onto their positions [B, S]; `missing` everywhere else."""
    out = torch.full(candidates.shape, missing, dtype=torch.float32)
    where = candidates.cpu()
    for b, row in enumerate(rows):
        if row is not None:
            out[b, where[b]] = torch.from_numpy(row)
    return out.to(candidates.device)
