"""What a gate's forwards work with, and what is known so far of who reads the decoder's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import regate_patch
from model_adapters import AdapterError, Batch, Layout, ModelAdapter
from model_adapters.attention import stand_in
from model_adapters.conventional import text_config, way_to
from model_adapters.flash import called_by
from model_adapters.signatures import signature
from regate.config import Config
from regate.errors import HiddenStatesError, UnknownArchitectureError
from regate.memory import keys
from regate.memory.checkpoint import ranks
from regate.memory.sharing import any_rank
from regate.output.logits import LazyHead
from regate.pace.pace import Pace
from regate.proof.prove import Proven, few_of, tells_rows
from regate.scoring.scorer import Samples, Scorer
from regate.scoring.turns import Turns
from regate.training import batches
from regate.training.calls import OuterCall
from regate.training.counters import Counters
from regate.training.segments import Segments, check_boundaries
from regate.training.sharding import held_whole, whole_shape
from regate_patch import is_sharded


@dataclass
class Parts:
    """What forwards work with; the gate's.

    Attributes:
        model: as the user gave it.
        target, decoder: the module whose call receives labels, and the one that is captured; the gate hooks onto them.
        outer: the running call of `model`, where `target` is inside it.
        pace: lets ranks with images and ranks without run the same modules.
        proven: what full steps may leave out; None before the first forward.
        ways: in which the losses that it is proven for come from the decoder's output.
        put_elsewhere: who keeps values of the decoder that it does not return; None where nobody does.
        handed_out: does the model return its decoder's output? Then how to say so.
        strays: of past backward passes, at how many positions hidden states were read that mean nothing, int64 [].
        lazy: makes the head's logits lazy.
        fills_rows: does the decoder fill rows up to the longest? Where it can, and until that is known, it does not.
        between: the modules through which `target` calls `decoder`.
        head: hidden states to logits, as of the batch read last; it may be replaced (`resize_token_embeddings`).
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
    proven: Proven | None = None
    ways: set[Any] = field(default_factory=set)
    put_elsewhere: str | None = None
    handed_out: str | None = None
    strays: list[Tensor] = field(default_factory=list)
    lazy: LazyHead | None = None
    between: list[nn.Module] = field(init=False)
    head: nn.Module = field(init=False)
    _in_step: bool | None = None

    def __post_init__(self) -> None:
        self.between = way_to(self.target, self.decoder)[1:-1]

    @property
    def takes_cache(self) -> bool:
        """May the call of `target` say whether it is to make a cache? Its forward may have been replaced."""
        parameters = signature(self.target).parameters
        others = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        return "use_cache" in parameters or (others and hasattr(self.target, "config"))

    def count_stray(self, read: Tensor) -> None:
        """In a backward pass; a GPU is not waited for before the next forward."""
        self.strays.append(read)
        if not read.is_cuda:
            self.check_strays()

    def check_strays(self) -> None:
        """Did something besides the model's loss read hidden states of a forward before?

        Raises:
            HiddenStatesError: it did.
        """
        strays, self.strays = self.strays, []
        if read := sum(map(int, strays)):
            raise HiddenStatesError(
                f"something besides the loss of {type(self.target).__name__} reads hidden states of its decoder, at "
                f"{read} position(s) that no label is predicted from: they were not all computed, and are not where "
                "they would be. Call the model with output_hidden_states=True and take outputs.hidden_states, or train "
                "with regate.Config(logits='all')"
            )

    @property
    def vocabulary(self) -> int:
        """V, as the config says, or the head, where it was widened by hand."""
        head = getattr(self.head, "projection", self.head)
        told = getattr(text_config(self.target), "vocab_size", None), getattr(head, "out_features", None)
        sizes = [size for size in told if isinstance(size, int)]
        return max(sizes or (shape[0] for p in head.parameters() if len(shape := whole_shape(p)) == 2))

    @property
    def in_step(self) -> bool:
        """Must ranks run the model's forward equally often? It is split before its first step, if ever."""
        if self.proven is None or self._in_step is None:
            self._in_step = is_sharded(self.target) or (self.adapter.in_step and ranks() > 1)
        return self._in_step

    def is_full(self, step: int) -> bool:
        """Does optimizer step `step` keep every label, by the schedule, or since the guard is open?"""
        return self.config.is_full(step) or self.scorer.guard.open

    def ready_to_prove(self, labels: Tensor | None) -> bool:
        """Is a proof due in this forward, with labels [B, S] or without any?

        In step it runs on all ranks at once: when all have labels. Where the first batch could not tell all, a later
        one that can is looked at, too.
        """
        if self.proven is None:
            return labels is not None if not self.in_step else not any_rank(labels is None)
        if labels is None or self.proven.rows or self.in_step:
            return False
        return tells_rows(few_of(labels))

    def turns_of(self, layout: Layout, samples: Samples) -> Tensor | None:
        """Those samples of a sparse step that have their full turn now, bool [N]; see `Turns.of`."""
        return self.turns.of(samples, at_once=self.turns.fills_rows and len(layout.labels) > 1)

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
        self.head = self.adapter.head(self.model)
        try:
            with looked_up:  # ids are read off embeddings, for which ranks look up unlike many
                layout = self.adapter.layout(self.model, batch)
        except AdapterError as error:
            raise UnknownArchitectureError(str(error)) from error
        if stand_in(self.decoder) is not None and not called_by(self.decoder):
            check_boundaries(batch)
        layout, segments, on_padding = batches.on_host(batch, layout, vocabulary=self.vocabulary)
        alone = segments.unpack_layout(layout)
        text = keys.text_keys(alone)
        given = self.outer.arguments | dict(batch)
        sample_ids = given.get("sample_ids")
        visual = None if sample_ids is not None else keys.visual_keys(self.model, self.adapter, given, alone)
        if visual is None and sample_ids is None:
            self.note(keys.UNKNOWN_IMAGES)
        names = keys.sample_keys(text, visual, sample_ids)
        return layout, Samples(text, names, alone, self._apart(batch, segments), segments, on_padding)

    def _apart(self, batch: Batch, segments: Segments) -> Batch:
        """The batch with position ids of a row a sample."""
        if segments.places is None:
            return batch
        ids = self.adapter.position_ids(self.model, batch)
        return {**batch, "position_ids": None if ids is None else segments.unpack(ids)}
