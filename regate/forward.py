"""One training forward of a gated model, from its call to the losses that are learnt from.

begin      read the batch; full or sparse? score labels, keep the best; how much of the decoder's output is read?
           The only wait for the device
arguments  the model's call with the other labels masked; opens what holds while the model runs
positions  the engine asks what the decoder computes
decoded    the decoder's output goes on to the head at predictors of kept labels alone
finish     take the student's losses at kept labels, without waiting for them; what the caller gets
close      whatever happened
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import regate_patch
from model_adapters import AdapterError, Batch, Layout, ModelAdapter
from model_adapters.attention import stand_in
from model_adapters.base import labels_alone
from model_adapters.conventional import text_config
from regate.config import Config
from regate.errors import ConfigError, LogitsError, UnknownArchitectureError
from regate.labels import IGNORED, predicted, predictors
from regate.memory.sharing import any_rank, highest
from regate.output import proof, reads, router
from regate.output.head import Reading, embeddings, hidden_states
from regate.output.logits import LazyHead
from regate.output.loss import Places
from regate.output.outputs import kept_losses, rescale, with_logits
from regate.output.reads import Read
from regate.output.withheld import WithheldLogits, watched
from regate.scoring import keys
from regate.scoring.decision import Decision
from regate.scoring.scorer import Samples, Scorer
from regate.training import batches, supervision
from regate.training.calls import OuterCall
from regate.training.counters import Counters
from regate.training.hooks import followable_dora
from regate.training.segments import Segments, check_boundaries
from regate.training.sharding import held_whole, whole_shape
from regate_patch import is_sharded, to_device


@dataclass
class Parts:
    """What forwards work with; the gate's.

    Attributes:
        model: as the user gave it.
        target, decoder: the module whose call receives labels, and the one that is captured; the gate hooks onto them.
        outer: the running call of `model`, where `target` is inside it.
        proven: what full steps may leave out; None before the first forward.
        lazy: makes the head's logits lazy.
        note: tells the user something, once.
    """

    model: nn.Module
    target: nn.Module
    decoder: nn.Module
    outer: OuterCall
    adapter: ModelAdapter
    config: Config
    handle: regate_patch.Handle
    scorer: Scorer
    counters: Counters
    note: Callable[[str], None]
    proven: proof.Proven | None = None
    lazy: LazyHead | None = None

    @property
    def head(self) -> nn.Module:
        """Hidden states to logits; looked up, for it may be replaced (`resize_token_embeddings`)."""
        return self.adapter.head(self.model)

    @property
    def vocabulary(self) -> int:
        """V."""
        size = getattr(text_config(self.target), "vocab_size", None)
        return size or max(shape[0] for p in self.head.parameters() if len(shape := whole_shape(p)) == 2)

    def ready_to_prove(self, ready: bool) -> bool:
        """Is the proof due in this forward? Of a split model it runs on all ranks at once: when all have labels."""
        if self.proven is not None or not is_sharded(self.target):
            return ready and self.proven is None
        return not any_rank(not ready)

    def read(self, batch: Batch) -> tuple[Layout, Samples]:
        """The batch as the decoder sees it, [B, S] on the CPU, and its samples.

        Raises:
            UnknownArchitectureError: the adapter cannot read it.
            LabelsError, PackedRowsError: see `batches.on_host`.
        """
        looked_up = (
            held_whole(self.adapter.embeddings(self.model))
            if batch.get("input_ids") is None
            else contextlib.nullcontext()
        )
        try:
            with looked_up:  # ids are read off embeddings, for which ranks look up unlike many
                layout = self.adapter.layout(self.model, batch)
        except AdapterError as error:
            raise UnknownArchitectureError(str(error)) from error
        if stand_in(self.decoder) is not None:
            check_boundaries(batch)
        layout, segments = batches.on_host(batch, layout, vocabulary=self.vocabulary)
        alone = segments.unpack_layout(layout)
        text = keys.text_keys(alone)
        given = self.outer.arguments | dict(batch)
        sample_ids = given.get("sample_ids")
        visual = None if sample_ids is not None else keys.visual_keys(self.model, self.adapter, given, alone)
        if visual is None and sample_ids is None:
            self.note(keys.UNKNOWN_IMAGES)
        names = keys.sample_keys(text, visual, sample_ids)
        return layout, Samples(text, names, alone, self._apart(batch, segments), segments)

    def _apart(self, batch: Batch, segments: Segments) -> Batch:
        """The batch with position ids of a row a sample."""
        if segments.places is None:
            return batch
        ids = self.adapter.position_ids(self.model, batch)
        return {**batch, "position_ids": None if ids is None else segments.unpack(ids)}


class Forward:
    """See the module's description.

    Attributes:
        decision: what is kept and computed.
    """

    def __init__(self, parts: Parts, batch: Batch, layout: Layout, samples: Samples, *, full: bool, due: bool) -> None:
        self.parts, self.layout, self._samples = parts, layout, samples
        self._target, self._decoder, self._head = parts.target, parts.decoder, parts.head
        self._call: dict[str, Any] = {k: v for k, v in (layout.call or batch).items() if k != "sample_ids"}
        self._device: torch.device = batch["labels"].device
        self._balanced = router.is_balanced(self._target, self._call)
        self._beside = supervision.beside(self._call, layout.labels) if parts.config.keep < 1 else {}
        self._scope = contextlib.ExitStack()
        self._active: regate_patch.Active | None = None  # what the decoder ran on
        self._decoded: Any = None  # its output
        self._reader = reads.inner_reader(self._call, self._target, self._decoder)
        if self._reader is not None:
            reads.capturing(self._decoder)
        self._kept = samples.candidates if full else parts.scorer.keep(samples)  # [N, L]
        kept = samples.segments.pack(self._kept)
        if due:
            parts.proven = self._prove()
        self.read, self.short = self._reading_of(parts.proven or proof.NOTHING)
        self.decision = Decision.of(layout, kept, parts.config, full=full, beyond=self._beyond(full))
        self._reading = Reading.of(layout.labels, kept) if self.short else None
        self._places = Places.of(layout.labels, kept) if self._reading is None else self._reading.places

    @classmethod
    def begin(cls, parts: Parts, batch: Batch, *, step: int) -> Forward | None:
        """A forward of the optimizer step `step`; None where no label can be predicted.

        Raises:
            RegateError: the batch cannot be gated (see `Parts.read`, `Scorer.prepare`, `supervision.beside`).
        """
        start, taught = time.perf_counter(), parts.counters.teacher_seconds
        layout, samples = parts.read(batch)
        labelled, full = bool(samples.candidates.any()), parts.config.is_full(step)
        parts.scorer.prepare(samples, full=full)
        due = parts.ready_to_prove(labelled)
        if not labelled:
            return None
        parts.scorer.collect()
        forward = cls(parts, batch, layout, samples, full=full, due=due)
        parts.counters.gate_seconds += time.perf_counter() - start - (parts.counters.teacher_seconds - taught)
        return forward

    # -- what is read ---------------------------------------------------------------------------------

    def _prove(self) -> proof.Proven:
        """In the first forward: what full steps may leave out (see `proof`)."""
        parts, labels, valid = self.parts, self.layout.labels, self.layout.valid
        candidates = predicted(labels)
        few = candidates & (candidates.cumsum(1) <= proof.FEW)
        some = replace(self.layout, labels=torch.where(few, labels, IGNORED))
        sharded, projection = is_sharded(self._target), getattr(self._head, "projection", self._head)
        parts.lazy = None if sharded else LazyHead(projection)
        own_head = bool(self._call.get("fused_lm_head"))  # which leaves out what has no label by itself
        plain = parts.adapter.with_labels is labels_alone and not own_head
        shortens = plain and not supervision.has_tensors(self._beside)

        @contextlib.contextmanager
        def elide(read: Read, tail: bool) -> Iterator[None]:
            self.decision = Decision.of(some, few, parts.config, full=True, beyond=read >= Read.VALID)
            with self._engine(tail=tail):
                yield

        device_labels = to_device(some.labels, self._device)
        with proof.without_dropout(self._decoder) as had_dropout, self._aside(had_dropout):
            proven = proof.prove(
                proof.Subject(
                    model=self._target,
                    decoder=self._decoder,
                    call=self._call
                    | parts.adapter.with_labels(parts.model, self._call, device_labels)
                    | supervision.masked(self._beside, labels, few)
                    | self._without_cache(),
                    labels=labels,
                    few=few,
                    live=valid & predictors(few).flip(1).cummax(1).values.flip(1),
                    valid=valid,
                    elide=elide,
                    lazy=parts.lazy,
                    short=shortens and parts.config.logits == "kept",
                    at_least=Read.ALL if parts.config.logits == "all" else Read.VALID if self._balanced else Read.KEPT,
                    backward=not sharded,
                    highest=highest if sharded else int,
                )
            )
        self._active = None
        if proven.other and (usual := stand_in(self._decoder)) is not None:
            raise regate_patch.UnsupportedGraphError(
                f"the attention kernels of {type(self._decoder).__name__} compute something else than its "
                f"'{usual}' attention: they know causal order, windows and padding, and leave out what else its masks "
                f"say, such as image tokens that see one another. Train it with attn_implementation='{usual}'"
            )
        for note in proven.notes:
            parts.note(note)
        return proven

    @contextlib.contextmanager
    def _aside(self, aside: bool) -> Iterator[None]:
        """Inside, the engine's graphs are for the moment: what is captured without dropout is not what trains."""
        if not aside:
            yield
            return
        standing = self._decoder.forward
        regate_patch.patch(self._decoder, backend="eager", padding_elided=True, disable=self.parts.config.disable)
        try:
            yield
        finally:
            self._decoder.forward = standing

    def _reading_of(self, proven: proof.Proven) -> tuple[Read, bool]:
        """What this forward computes, and whether its head runs at kept labels alone."""
        if (why := reads.logits_reader(self._head)) is not None:
            self.parts.note(f"{reads.GIVEN_UP[Read.ALL]}: {why}")
            return Read.ALL, False
        if self._reader is not None:
            self.parts.note(f"{reads.GIVEN_UP[Read.ALL]}: {self._reader}")
            return Read.ALL, proven.short
        return max(proven.read, Read.VALID if self._balanced else Read.KEPT), proven.short

    def _beyond(self, full: bool) -> bool:
        """Compute what follows the last label, too? A router's loss reads it on full steps."""
        return self.read >= Read.VALID and (full or not self._balanced or self.read == Read.ALL)

    # -- while the model runs -------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What the model is called with. Until `close`, its decoder computes active positions only."""
        start = time.perf_counter()
        parts, call, decision = self.parts, dict(self._call), self.decision
        if not decision.full or self._samples.segments.places is not None:  # no label with which a sample begins
            labels = to_device(decision.labels_left, self._device)
            call |= parts.adapter.with_labels(parts.model, call, labels)
            call |= supervision.masked(self._beside, decision.labels, decision.kept)
        call |= self._without_cache()
        if self._reading is not None:
            call["labels"] = to_device(self._reading.labels, self._device)
            if parts.proven is not None and parts.proven.lazy and parts.lazy is not None:
                self._scope.enter_context(self._lazily(parts.lazy))
        if not (decision.full and self.read == Read.ALL):
            self._scope.enter_context(self._engine(tail=self.read == Read.KEPT))
        parts.counters.gate_seconds += time.perf_counter() - start
        return call

    @contextlib.contextmanager
    def _engine(self, *, tail: bool) -> Iterator[None]:
        """Inside, the decoder computes the decision's positions; with `tail`, its end at predictors of kept labels."""
        self._tail = tail and not self._balanced
        with contextlib.ExitStack() as scope:
            scope.enter_context(self.parts.adapter.followable(self.parts.model, self._decoder))
            scope.enter_context(followable_dora())
            if self._balanced:
                scope.enter_context(router.balanced_over(self._target, self._decoder, self._computed))
            scope.enter_context(regate_patch.active(self.positions))
            yield

    def _lazily(self, lazy: LazyHead) -> contextlib.AbstractContextManager[None]:
        projection = getattr(self._head, "projection", self._head)
        if lazy.head is not projection:  # the head was replaced, as by `resize_token_embeddings`
            lazy = self.parts.lazy = LazyHead(projection)
        return lazy.standing_in()

    def _without_cache(self) -> dict[str, Any]:
        """Keys of positions that were not computed cannot be cached."""
        return {"use_cache": False} if "use_cache" in self._call or hasattr(self._target, "config") else {}

    def _computed(self) -> Tensor:
        return to_device(self.decision.active, self._device)

    @torch.compiler.disable
    def positions(self, *args: Any, **kwargs: Any) -> regate_patch.Active:
        """What the decoder computes, now that it is called.

        Raises:
            ConfigError: visual tokens are to be left out, but the decoder is not called with embeddings.
        """
        start = time.perf_counter()
        if self.decision.spare is not None:
            found = embeddings(args, kwargs)
            if found is None or found.shape[:2] != self.decision.spare.shape:
                raise ConfigError(
                    f"visual_keep={self.parts.config.visual_keep} needs the embeddings of visual tokens, and "
                    f"{type(self._decoder).__name__} is not called with such; set visual_keep=1"
                )
            self.decision = self.decision.thin(found, self.parts.config.visual_keep)
        device = next(x.device for x in (*kwargs.values(), *args) if isinstance(x, Tensor))
        self._active = self.decision.positions(device, read=self._tail, owner=self._samples.segments.owner)
        self.parts.counters.gate_seconds += time.perf_counter() - start
        return self._active

    def decoded(self, output: Any) -> Any:
        """What the model goes on with instead of its decoder's output."""
        self._decoded = output if self._reading is None else self._reading.shorten(output)
        return self._decoded

    # -- when it is done ------------------------------------------------------------------------------

    def finish(self, output: Any) -> Any:
        """Learn from what the model returned; what the caller gets.

        Raises:
            NotElidedError: the model did not call its decoder.
        """
        self.close()
        parts, decision, active, reading = self.parts, self.decision, self._active, self._reading
        statistics = parts.handle.statistics
        if self._decoded is None or (active is not None and not active.ran and statistics.failed is None):
            raise regate_patch.NotElidedError(
                f"{type(self._target).__name__} ran a training forward without calling its decoder "
                f"{type(self._decoder).__name__}; register an adapter whose `decoder` is the module it calls"
            )
        start = time.perf_counter()
        parts.counters.add(decision.sums)
        projected = decision.labels.shape[1] if reading is None else reading.index.shape[1]
        shape, samples = decision.labels.shape, self._samples.segments.lengths
        parts.counters.count_flops(statistics, self._head, shape, samples, active, projected=projected)
        known = None if reading is None or parts.lazy is None else parts.lazy.losses
        losses = kept_losses(
            output, self._places, known=known, hidden_states=hidden_states(self._decoded), head=self._head
        )
        parts.scorer.write()
        parts.scorer.observe(self._samples, self._kept, losses)
        output = self._handed_out(output)
        parts.counters.gate_seconds += time.perf_counter() - start
        return output

    def close(self) -> None:
        """End what `arguments` began."""
        self._scope.close()

    def _handed_out(self, output: Any) -> Any:
        decision = self.decision
        if self._reading is not None:
            return with_logits(output, self._withheld)
        if decision.full:
            return output
        candidates = predicted(decision.labels)
        output = rescale(output, candidates, decision.share)
        left_out = to_device(predictors(candidates & ~decision.kept), self._device)
        return with_logits(output, lambda logits: watched(logits, left_out, _complain))

    def _withheld(self, logits: Tensor) -> Tensor:
        return WithheldLogits((*self.decision.labels.shape, logits.shape[-1]), logits.dtype, logits.device)


def _complain(read: int) -> None:
    raise LogitsError(
        f"a loss outside the model reads outputs.logits at {read} positions whose labels this sparse step leaves out: "
        "nothing was computed there. Take the labels that are kept instead, gate.last.labels_left, or train with "
        "regate.Config(keep=1.0)"
    )
