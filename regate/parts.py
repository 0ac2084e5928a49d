"""What a gate's forwards work with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import regate_patch
from model_adapters import Batch, Layout, ModelAdapter
from model_adapters.attention import stand_in
from model_adapters.conventional import pad_id, text_config
from model_adapters.flash import called_by
from model_adapters.signatures import signature
from regate.config import Config
from regate.errors import LabelsError, StoreError, served
from regate.memory import keys
from regate.output.logits import LazyHead
from regate.pace.pace import Pace
from regate.proof.readers import Readers
from regate.scoring.scorer import Samples, Scorer
from regate.scoring.turns import Turns
from regate.training import batches
from regate.training.calls import OuterCall
from regate.training.counters import Counters
from regate.training.segments import Segments, check_boundaries
from regate.training.sharding import held_whole, whole_shape
from regate.training.supervision import Numbers
from regate_patch.transfer import made_on_host


@dataclass
class Parts:
    """What forwards work with; the gate's.

    Attributes:
        model: as the user gave it.
        target, decoder: the module whose call receives labels, and the one that is captured; the gate hooks onto them.
        outer: the running call of `model`, where `target` is inside it.
        pace: lets ranks with images and ranks without run the same modules.
        readers: of the decoder's output.
        head: hidden states to logits, as of the batch read last; it may be replaced (`resize_token_embeddings`).
        saw_loss: was the loss of a sparse step looked at?
        fills_rows: does the decoder fill the rows of sparse steps up to the longest, as has been seen? Then whatever
            would make one longer is given up: turns are given all at once, and each sample keeps a share of its own.
        numbers: in calls so far, that may count labels (see `supervision.beside`).
        note: tells the user something, once.
    """

    model: nn.Module
    target: nn.Module
    decoder: nn.Module
    outer: OuterCall
    pace: Pace
    adapter: ModelAdapter
    config: Config
    handle: regate_patch.Handle
    scorer: Scorer
    turns: Turns
    counters: Counters
    note: Callable[[str], None]
    readers: Readers = field(init=False)
    head: nn.Module = field(init=False)
    saw_loss: bool = field(init=False, default=False)
    fills_rows: bool = field(init=False, default=False)
    numbers: Numbers = field(init=False, default_factory=Numbers)
    _lazy: LazyHead | None = field(init=False, default=None)
    _found_at: list[str] | None = field(init=False)  # the names by which one comes from `model` to `decoder`

    def __post_init__(self) -> None:
        self.readers = Readers(self.target, self.decoder, self.adapter, self.note)
        names = (name for name, part in self.model.named_modules() if part is self.decoder)
        self._found_at = found.split(".") if (found := next(names, None)) else None

    def without_cache(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What tells `target` in its call to make no cache, if it may be told so: what it reads of its config may be
        passed on as it was. Its forward may have been replaced."""
        parameters = signature(self.target).parameters
        others = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        told = "use_cache" in parameters or (others and hasattr(self.target, "config")) or "use_cache" in call
        return {"use_cache": False} if told else {}

    @property
    def vocabulary(self) -> int:
        """V, as the config says, or the head, where it was widened by hand."""
        projection = self.projection
        told = getattr(text_config(self.target), "vocab_size", None), getattr(projection, "out_features", None)
        sizes = [size for size in told if isinstance(size, int)]
        return max(sizes or (shape[0] for p in projection.parameters() if len(shape := whole_shape(p)) == 2))

    @property
    def projection(self) -> nn.Module:
        """The linear layer of the head."""
        return getattr(self.head, "projection", self.head)

    def lazy_head(self) -> LazyHead:
        """Makes its logits lazy. It may have been replaced, as by `resize_token_embeddings`."""
        if self._lazy is None or self._lazy.head is not self.projection:
            self._lazy = LazyHead(self.projection)
        return self._lazy

    def is_full(self, step: int) -> bool:
        """Does optimizer step `step` keep every label, by the schedule, or since the guard is open?"""
        return self.config.is_full(step) or self.scorer.guard.open

    def turns_of(self, layout: Layout, samples: Samples) -> Tensor | None:
        """Those samples of a sparse step that have their full turn now, bool [N]; see `Turns.of`."""
        return self.turns.of(samples, at_once=self.fills_rows_of(layout))

    def keep(self, layout: Layout, samples: Samples, whole: Tensor | None) -> Tensor:
        """The labels that a sparse step keeps, bool [N, L], all of those in `whole`, bool [N]; see `Scorer.keep`."""
        return self.scorer.keep(samples, whole=whole, apart=self.fills_rows_of(layout))

    def fills_rows_of(self, layout: Layout) -> bool:
        """Will the rows of a sparse step be filled up to the longest, as has been seen?"""
        return self.fills_rows and len(layout.labels) > 1

    def read(self, batch: Batch) -> tuple[Layout, Samples]:
        """The batch as the decoder sees it, [B, S] on the CPU, and its samples.

        Raises:
            NotElidedError: the model has another decoder by now.
            UnknownArchitectureError: the adapter cannot read it.
            LabelsError, PackedRowsError: there are no labels; or see `batches.on_host`.
            StoreError: `sample_ids` are no list, or not as many as samples.
        """
        self._check_decoder()
        if batch.get("labels") is None:
            raise LabelsError(batches.NO_LABELS.format(name=type(self.target).__name__, got=", ".join(map(str, batch))))
        looked_up = (
            held_whole(self.adapter.embeddings(self.model))
            if batch.get("input_ids") is None
            else contextlib.nullcontext()
        )
        self.head = self.adapter.head(self.model)
        with served(), looked_up:  # ids are read off embeddings, for which ranks look up unlike many
            layout = self.adapter.layout(self.model, batch)
        if stand_in(self.decoder) is not None and not called_by(self.decoder):
            check_boundaries(batch)
        with made_on_host():
            return self._samples(batch, layout)

    def _samples(self, batch: Batch, layout: Layout) -> tuple[Layout, Samples]:
        """The layout on the CPU, and the samples in it."""
        layout, segments, on_padding = batches.on_host(batch, layout, vocabulary=self.vocabulary, model=self.target)
        alone = segments.unpack_layout(layout)
        text = keys.text_keys(alone, pad=pad_id(self.target))
        given = self.outer.arguments | dict(batch)
        sample_ids = given.get("sample_ids")
        _refuse_one(sample_ids)
        visual = None if sample_ids is not None else keys.visual_keys(self.model, self.adapter, given, alone)
        if visual is None and sample_ids is None:
            self.note(keys.UNKNOWN_IMAGES)
        names = keys.sample_keys(text, visual, sample_ids)
        return layout, Samples(text, names, alone, self._apart(batch, segments), segments, on_padding)

    def _check_decoder(self) -> None:
        """It is still the one that is gated."""
        if self._found_at is None:  # a model may keep it where `modules` does not look
            return
        now: Any = self.model
        for name in self._found_at:
            now = getattr(now, name, None)
        if now is not self.decoder and all(part is not self.decoder for part in self.model.modules()):
            raise regate_patch.NotElidedError(
                f"the {type(self.decoder).__name__} of {type(self.model).__name__} was replaced after regate.apply, in "
                f"which it was {'.'.join(self._found_at)}; call regate.apply(model) again"
            )

    def _apart(self, batch: Batch, segments: Segments) -> Batch:
        """The batch with position ids of a row a sample."""
        if segments.places is None:
            return batch
        ids = self.adapter.position_ids(self.model, batch)
        return {**batch, "position_ids": None if ids is None else segments.unpack(ids)}


def _refuse_one(sample_ids: object) -> None:
    """One id for all samples; the characters of a text are not theirs, and a set has no order."""
    listed = isinstance(sample_ids, Iterable) and not isinstance(sample_ids, str | bytes | Mapping | Set)
    if sample_ids is not None and (not listed or getattr(sample_ids, "ndim", 1) == 0):
        raise StoreError(
            f"`sample_ids` must be a list, a tensor or an array with one id per sample, got {sample_ids!r}; leave them "
            "out, and samples are known by their text and images"
        )
