"""One training forward of a gated model, from its call to the losses that are learnt from.

begin      read the batch; full or sparse, and whose turn to be full? score labels, keep the best; how much of the
           decoder's output is read? The only wait for the device
arguments  the model's call with the other labels masked; opens what holds while the model runs, in which the engine
           asks what the decoder computes (`decoding.py`)
decoded    the decoder's output goes on to the head at predictors of kept labels alone
finish     take the student's losses at kept labels, without waiting for them; what the caller gets
close      whatever happened
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor

import regate_patch
from model_adapters import Batch, Layout
from model_adapters.base import labels_alone
from model_adapters.recording import install_recording
from regate.asking import ask_for_readers
from regate.decoding import Decoding
from regate.errors import LogitsError
from regate.labels import IGNORED, predicted, predictors
from regate.output import router
from regate.output.head import Reading, hidden_states, is_aside, with_hidden_states
from regate.output.logits import LazyHead
from regate.output.loss import Places
from regate.output.outputs import get, kept_losses, rescale, with_logits
from regate.output.withheld import WithheldLogits, watched
from regate.parts import Parts
from regate.proof.readers import Saving
from regate.proof.reads import Read, least
from regate.scoring.decision import Decision
from regate.scoring.scorer import Samples
from regate.training import supervision
from regate_patch import to_device

_FILLED = (
    "rows are filled up to the longest: they cannot be laid end to end, for attention says something else than causal "
    "order. "
)
AT_ONCE = (
    f"{_FILLED}One full row would make all as long: so instead of some samples in every forward, all samples of some "
    "forwards keep every label. Steps cost as much on average, but not each, and learn as in cycles (docs/evidence.md)"
)
EACH_ITS_OWN = (
    f"{_FILLED}The one that keeps most would make all as long: so the share that is kept is each sample's own, as with "
    'budget="sample"'
)
ON_PADDING = (
    "labels stand on padding, or on a first token that padding predicts: full steps train on them as the model does, "
    "for which they run the decoder as it is, padding and all; sparse steps leave them out. If they are not meant, set "
    "labels to -100 where attention_mask is 0, and on each row's first token"
)
ON_IMAGES = (
    "labels stand on visual tokens, and are among those that sparse steps choose from. If they are not meant, as where "
    "labels are a copy of input_ids, set them to -100 where the placeholders of images are"
)
COUNTED = (
    "`{name}` was the number of labels in every batch so far: where labels are left out, the model is given the number "
    "of those kept"
)
BY_CHANCE = (
    "`{name}` was the number of labels in every batch so far, but may be so by chance, for it is small and always the "
    "same: sparse steps leave it as it is. If the loss is divided by it, call it `num_items_in_batch` or the like, or "
    "the gradient is too small by the share that is kept"
)
NO_LONGER = "`{name}` no longer is the number of labels: since then the model is given it as it is"
TOO_SMALL = (
    "`{name}` has the name of a number of labels, but is less than half of a batch's: the model is given it as it is. "
    "If the loss is divided by it, call it `num_items_in_batch`, or the gradient is too small by the share that is kept"
)
DIVIDED = (
    "the model's loss is divided by `{name}`, which sparse steps leave as it is, for it is not the number of labels in "
    "this batch: the gradient is too small by the share that is kept. Call it `num_items_in_batch`, and it is scaled"
)
SUMMED = (
    "the model's loss is the sum of its labels' losses, on sparse steps of those kept: divide it by the number of "
    "these, gate.last.labels_kept, and not by all labels of the batch, or the gradient is too small by the share "
    "that is kept"
)
NOT_ONE = (
    "the model's loss is no single number, and sparse steps have losses of the labels that they keep alone: what takes "
    "their mean outside must divide by the number of these, gate.last.kept, and not by all labels of the batch, or the "
    "gradient is too small by the share that is kept"
)


class Forward:
    """See the module's description.

    Attributes:
        saving: what is left out of what is computed, for nobody reads it.
    """

    def __init__(
        self,
        parts: Parts,
        batch: Batch,
        layout: Layout,
        samples: Samples,
        whole: Tensor | None,  # bool [N], those of a sparse step that are in their full turn
        *,
        full: bool,
        due: bool,
    ) -> None:
        self.parts, self.layout, self._samples, self._batch, self._whole = parts, layout, samples, batch, whole
        self._target, self._decoder, self._head = parts.target, parts.decoder, parts.head
        self._call: dict[str, Any] = {k: v for k, v in (layout.call or batch).items() if k != "sample_ids"}
        given = (batch.get(name) for name in ("input_ids", "inputs_embeds", "labels"))
        self._device: torch.device = next(x.device for x in given if isinstance(x, Tensor))
        all_whole = full or (whole is not None and bool(whole[samples.candidates.any(1)].all()))
        self._balanced = router.is_balanced(self._target, self._call)
        self._beside = self._beside_labels() if parts.config.keep < 1 else {}
        self._scope = contextlib.ExitStack()
        self._made: Tensor | None = None  # the hidden states that the decoder made
        self._decoded: Any = None  # what the model goes on with instead of the decoder's output
        self._lazy: LazyHead | None = None  # by which the head's logits are made
        self._asked, self._inside = parts.readers.hanging(self._call)
        if self._asked or self._inside:
            install_recording(self._target, self._decoder)
        self._on_padding = samples.on_padding if full else None
        self._kept = samples.candidates  # [N, L]
        if not full:
            self._kept = parts.keep(layout, samples, whole)
            self._tell_of_labels()
        kept = samples.segments.pack(self._kept)
        if due:
            proven = ask_for_readers(
                parts, self._call, layout, self._beside, owner=samples.segments.owner, balanced=self._balanced
            )
            parts.readers.learn(proven)
        self.saving = self._saving_at(kept)
        at_whole, beyond = None, torch.tensor(self._beyond(full), device="cpu")
        if whole is not None:
            at_whole = samples.segments.pack(whole[:, None].expand_as(self._kept))
            beyond = torch.where(at_whole, self._beyond(True), beyond)
        decision = Decision.of(
            layout, kept, parts.config, full=full, beyond=beyond, whole=at_whole, on_padding=self._on_padding
        )
        tail, visible = self.saving.read == Read.KEPT, parts.config.elided == "visible" and not all_whole
        owner, balanced = samples.segments.owner, self._balanced
        self._decoding = Decoding(parts, self._call, layout, decision, owner, balanced, tail, visible)
        self._reading = Reading.of(layout.labels, kept) if self.saving.short else None
        self._places = Places.of(layout.labels, kept) if self._reading is None else self._reading.places

    @classmethod
    def begin(cls, parts: Parts, batch: Batch, *, step: int) -> Forward | None:
        """A forward of the optimizer step `step`; None where no label can be predicted.

        Raises:
            RegateError: the batch cannot be gated (see `Parts.read`, `Scorer.prepare`, `supervision.beside`).
        """
        start, taught = time.perf_counter(), parts.counters.teacher_seconds
        layout, samples = parts.read(batch)
        parts.pace.wait()  # some embed their batch to read it
        labelled, full = bool(samples.candidates.any()), parts.is_full(step)
        parts.turns.forward(step)
        whole = None if full else parts.turns_of(layout, samples)
        parts.scorer.prepare(samples, full=full, whole=whole)
        due = parts.readers.due(layout.labels if labelled else None, layout.call or batch)
        if not labelled:
            return None
        parts.scorer.collect()
        parts.readers.check_strays()
        forward = cls(parts, batch, layout, samples, whole, full=full, due=due)
        parts.counters.gate_seconds += time.perf_counter() - start - (parts.counters.teacher_seconds - taught)
        return forward

    @property
    def decision(self) -> Decision:
        """What is kept and computed."""
        return self._decoding.decision

    def _beside_labels(self) -> dict[str, Any]:
        """What the call has beside its labels, but for what the adapter masks by itself."""
        labels, with_labels = self.layout.labels, self.parts.adapter.with_labels
        own = {"labels"} if with_labels is labels_alone else {*with_labels(self.parts.model, self._call, labels)}
        call = {k: v for k, v in self._call.items() if k not in own - {"labels"}}
        return supervision.beside(call, labels, self.parts.numbers)

    def _tell_of_labels(self) -> None:
        """Of a sparse step: what stands where or is as large as it may not be meant to."""
        parts, layout = self.parts, self.layout
        if bool((layout.visual & (layout.labels != IGNORED)).any()):
            parts.note(ON_IMAGES)
        for name, by_chance in supervision.guesses(self._beside):
            parts.note((BY_CHANCE if by_chance else COUNTED).format(name=name))
        for name in sorted(parts.numbers.given_up):
            parts.note(NO_LONGER.format(name=name))
        for name in sorted(parts.numbers.small):
            parts.note(TOO_SMALL.format(name=name))

    # -- what is read ---------------------------------------------------------------------------------

    def _saving_at(self, kept: Tensor) -> Saving:
        """What this forward leaves out where these labels are kept, bool [B, S]."""
        if self._samples.on_padding is not None:
            self.parts.note(ON_PADDING)
        if self._on_padding is not None:
            return Saving(Read.ALL)
        in_any_case = least(balanced=self._balanced)
        return self.parts.readers.saving(
            kept, asked=self._asked, inside=self._inside, head=self._head, least=in_any_case
        )

    def _beyond(self, full: bool) -> bool:
        """Compute what follows the last label, too? A router's loss reads it on full steps."""
        read = self.saving.read
        return read >= Read.VALID and (full or not self._balanced or read == Read.ALL)

    # -- while the model runs -------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What the model is called with. Until `close`, its decoder computes active positions only."""
        start = time.perf_counter()
        parts, call, decision = self.parts, dict(self._call), self.decision
        if not decision.full or self._samples.segments.places is not None:  # no label with which a sample begins
            labels = to_device(decision.labels_left, self._device)
            call |= parts.adapter.with_labels(parts.model, call, labels)
            call |= supervision.masked(self._beside, decision.labels, decision.kept)
        call |= parts.without_cache(call)
        if self._reading is not None:
            call["labels"] = to_device(self._reading.labels, self._device)
            if self.saving.lazy:
                self._lazy = parts.lazy_head()
                self._scope.enter_context(self._lazy.standing_in())
        if not (decision.full and self.saving.read == Read.ALL):
            self._scope.enter_context(self._decoding.entering())
        parts.counters.gate_seconds += time.perf_counter() - start
        return call

    def decoded(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the model goes on with instead of its decoder's output."""
        if is_aside(args, kwargs, tuple(self.decision.labels.shape)):
            return output
        self._made = hidden_states(output).detach()
        if self._reading is not None:
            output = self._reading.shorten(output)
            left_out = self._reading.unread
        elif self.decision.full and self.saving.read < Read.ALL:
            left_out = ~self.decision.active
        else:
            self._decoded = output
            return output
        hidden = hidden_states(output)
        hidden = watched(hidden, to_device(left_out, hidden.device), self.parts.readers.count_stray)
        self._decoded = with_hidden_states(output, hidden)
        return self._decoded

    # -- when it is done ------------------------------------------------------------------------------

    def outgrown(self, output: Any) -> bool:
        """Is more read of what the decoder computes than was proven? Then this forward must run anew."""
        elsewhere = 0 if self._decoding.active is None else self.parts.handle.statistics.put_elsewhere
        return self.parts.readers.outgrown(self.saving, output, self._decoded, made=self._made, elsewhere=elsewhere)

    def again(self) -> Forward:
        """The same forward, after another proof if its loss was not proven."""
        self.close()
        parts, full = self.parts, self.decision.full
        due = parts.readers.due_again()
        return Forward(parts, self._batch, self.layout, self._samples, self._whole, full=full, due=due)

    def finish(self, output: Any) -> Any:
        """Learn from what the model returned; what the caller gets.

        Raises:
            NotElidedError: the model did not call its decoder.
        """
        self.close()
        parts, decision, active, reading = self.parts, self.decision, self._decoding.active, self._reading
        statistics = parts.handle.statistics
        passed_by = self._decoding.entered and not statistics.ran_dense and (active is None or not active.ran)
        if self._decoded is None or passed_by:
            raise regate_patch.NotElidedError(
                f"{type(self._target).__name__} ran a training forward without calling its decoder "
                f"{type(self._decoder).__name__} as the gate left it; register an adapter whose `decoder` is the "
                "module it calls, and let what takes the place of the decoder's forward call the one before"
            )
        start = time.perf_counter()
        parts.counters.add(decision.sums)
        projected = decision.labels.shape[1] if reading is None else reading.index.shape[1]
        shape, samples = decision.labels.shape, self._samples.segments.lengths
        parts.counters.count_flops(statistics, self._head, shape, samples, active, projected=projected)
        known = None if self._lazy is None else self._lazy.losses
        losses = kept_losses(
            output, self._places, known=known, hidden_states=hidden_states(self._decoded), head=self._head
        )
        parts.scorer.write()
        whole = torch.full((len(self._kept),), decision.full, device="cpu") if self._whole is None else self._whole
        apart = parts.fills_rows_of(self.layout)
        parts.scorer.observe(self._samples, self._kept, losses, whole=whole, apart=apart)
        if self._whole is not None:
            self._end_turns(self._whole)
        if not decision.full:
            self._look_at_rows()
            self._look_at_loss(get(output, "loss"), losses)
        output = self._handed_out(output)
        if self._balanced and active is not None:
            output = router.watch_scores(output, ~decision.active)
        parts.counters.gate_seconds += time.perf_counter() - start
        return output

    def _look_at_loss(self, loss: Any, losses: Tensor) -> None:
        """Of a sparse step: will its caller divide it by all labels? For a sum that is asked once; it has to wait."""
        parts = self.parts
        if isinstance(loss, Tensor) and loss.numel() > 1:
            parts.note(NOT_ONE)
        elif isinstance(loss, Tensor) and losses.numel() > 1 and not parts.saw_loss:
            parts.saw_loss = True
            ratio = float(losses.sum()) / (float(loss.detach()) or 1.0)
            if abs(ratio - 1) < 1e-3:
                parts.note(SUMMED)
            elif abs(ratio - losses.numel()) > 0.5 and (name := supervision.divides(self._call, self._beside, ratio)):
                parts.note(DIVIDED.format(name=name))

    def _end_turns(self, whole: Tensor) -> None:
        """Of the samples of a sparse step, those in `whole`, bool [N], had their full turn."""
        parts = self.parts
        parts.turns.took(self._samples, whole)
        labelled, had = sum(self._samples.candidates.any(1).tolist()), sum(whole.tolist())
        numbers = {"samples_sparse": labelled - had, "samples_whole": had}
        parts.counters.add(numbers)

    def _look_at_rows(self) -> None:
        """Were those of a sparse step filled up to the longest? Then what makes one longer is given up from now on."""
        parts = self.parts
        active, laid = self._decoding.active, all(rewritten.end_to_end for rewritten in parts.handle.statistics.last)
        if laid or len(self.layout.labels) == 1 or active is None or active.empty:
            return
        parts.fills_rows = True
        if parts.turns.interleaved:
            parts.note(AT_ONCE)
        if parts.config.budget == "batch":
            parts.note(EACH_ITS_OWN)

    def close(self) -> None:
        """End what `arguments` began."""
        self._scope.close()

    def _handed_out(self, output: Any) -> Any:
        decision, rows = self.decision, len(self.decision.labels)
        if self._reading is not None:
            short = (rows, self._reading.index.shape[1], self.parts.vocabulary)
            return with_logits(output, self._withheld, shape=short)
        if decision.full:
            return output
        candidates = predicted(decision.labels)
        output = rescale(output, candidates, decision.share)
        left_out = to_device(predictors(candidates & ~decision.kept), self._device)
        whole = (rows, decision.labels.shape[1], self.parts.vocabulary)
        return with_logits(output, lambda logits: watched(logits, left_out, _complain_of_logits), shape=whole)

    def _withheld(self, logits: Tensor) -> Tensor:
        return WithheldLogits((*self.decision.labels.shape, logits.shape[-1]), logits.dtype, logits.device)


def _complain_of_logits(read: Tensor) -> None:
    if not read:
        return
    raise LogitsError(
        f"a loss outside the model reads outputs.logits at {int(read)} positions whose labels this sparse step leaves "
        "out: nothing was computed there. Take the labels that are kept instead, gate.last.labels_left, or train with "
        "regate.Config(keep=1.0)"
    )
