"""One graph that Dynamo captured of a decoder: rewritten as calls need it, run on the active positions of the moment.

Dynamo keeps what it compiled as long as the process lives. So nothing here holds the decoder: it could never be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import fx

from regate_patch.compiling import Backend, compiled
from regate_patch.context import Active, current
from regate_patch.errors import NotElidedError, UnsupportedGraphError
from regate_patch.passes.causal import Proven, masks_made
from regate_patch.passes.rewrite import Observer, Rewrite, following, rewrite
from regate_patch.sharding import run_linear_by
from regate_patch.statistics import Statistics

Run = Callable[..., Any]
Masks = tuple[tuple[int, Proven], ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the graphs of one decoder are rewritten and run.

    Attributes:
        decoder: the name of its class, for errors.
        backend: how they run; no longer "auto".
        several: may they be several of one call?
        padding_elided, visible, observe: see `regate_patch.patch`.
        disable: passes that are left out.
        linear: by which linear operations run where nothing is compiled.
    """

    decoder: str
    backend: Backend
    several: bool
    padding_elided: bool
    visible: bool
    disable: frozenset[str]
    observe: Observer | None
    linear: Callable[..., Any]


class Captured:
    """A captured graph; called with its inputs, it runs on the positions that are active then.

    Args:
        gm: the graph.
        options: the decoder's.
        statistics: the decoder's, which count what is rewritten.
        whole: graphs that were seen to be all of the decoder: only its caller reads them. The decoder's adds to them.
    """

    def __init__(self, gm: fx.GraphModule, options: Options, statistics: Statistics, whole: set[Rewrite]) -> None:
        self._gm, self._options, self._statistics, self._whole = gm, options, statistics, whole
        self._variants: dict[tuple[Any, ...], tuple[Rewrite, Run] | None] = {}
        self._made: Mapping[int, Proven] = {}
        if options.several and options.padding_elided:
            with following("masks"):
                self._made = masks_made(gm)

    def ready_for(self, inputs: Sequence[Any]) -> Run:
        """What runs it, rewritten for the call that is being captured."""
        chosen, options = _chosen(), self._options
        masks = _given(chosen, inputs)
        if self._best(chosen, masks) is None:
            self._statistics.other_graphs += 1
            run = self._inner(fx.GraphModule(self._gm, self._gm.graph))  # Dynamo's own is written when it first runs
            made = self._made
            return (lambda *inputs: _tell(_chosen(), made, run(*inputs))) if made else run
        if options.visible:
            self._variant(any_length=False, samples=False, rows=False, visible=True, masks=masks)
        return self

    def __call__(self, *inputs: Any) -> Any:
        chosen = _chosen()
        found = self._best(chosen, _given(chosen, inputs))
        assert found is not None
        rewritten, run = found
        chosen.ran.append(rewritten)
        if rewritten.visible and self._options.several:
            inputs = self._standing_still(chosen, rewritten, inputs)
        return _tell(chosen, self._made, run(*self._indices(chosen, rewritten), *inputs))

    def _best(self, chosen: Active, masks: Masks) -> tuple[Rewrite, Run] | None:
        """The variant that saves most of those that are right for these positions; None if it holds no block."""
        visible = chosen.visible is not None
        samples = chosen.samples is not None and not visible
        rows = chosen.empty  # no product takes no rows at all
        wanted: dict[str, Any] = {"samples": samples, "rows": rows, "visible": visible, "masks": masks}
        usual = self._variant(any_length=False, **wanted)
        if usual is None or usual[0].longest == inf or 0 < chosen.length <= usual[0].longest:
            return usual
        return self._variant(any_length=True, **wanted)  # 0: nobody said how long the sequence is

    def _variant(
        self, *, any_length: bool, samples: bool, rows: bool, visible: bool, masks: Masks
    ) -> tuple[Rewrite, Run] | None:
        """Rewritten so, once."""
        wanted = any_length, samples, rows, visible, masks
        if wanted in self._variants:
            return self._variants[wanted]
        options = self._options
        of_no_use = {"layers"} if options.backend == "eager" else set()  # where nothing is compiled
        rewritten = rewrite(
            self._gm,
            whole=not options.several,
            padding_elided=options.padding_elided,
            any_length=any_length,
            samples=samples,
            visible=visible,
            masks=dict(masks),
            disable=options.disable | ({"end_to_end"} if rows else set()) | of_no_use,
            observe=options.observe,
        )
        found = None
        if rewritten is not None:
            self._statistics.graphs.append(rewritten)
            found = rewritten, self._inner(rewritten.module, rewritten.layers)
        return self._variants.setdefault(wanted, found)

    def _inner(self, gm: fx.GraphModule, parts: Collection[str] = ()) -> Run:
        """The graph as it runs."""
        if self._options.backend == "eager":
            run_linear_by(gm, self._options.linear)
            return gm.forward
        return compiled(gm, parts, self._options.backend)

    def _indices(self, chosen: Active, rewritten: Rewrite) -> tuple[torch.Tensor | int, ...]:
        """The rewritten graph's first inputs."""
        if rewritten.tail and rewritten not in self._whole:
            chosen = replace(chosen, read=None)  # it may be one of several graphs, and the next reads everything
        if rewritten.end_to_end:
            rows, places, starts, longest, read, slots = chosen.end_to_end(apart=rewritten.apart)
            first: tuple[torch.Tensor | int, ...] = (rows, places, starts, longest)
            if rewritten.visible:
                assert chosen.visible is not None
                first = (rows, places, slots, chosen.longest, chosen.of_rows, chosen.visible)
            return (*first, read) if rewritten.tail else first
        if rewritten.visible:
            assert chosen.visible is not None
            filled = (chosen.index, chosen.valid, chosen.visible)
            return (*filled, *chosen.indices[2:]) if rewritten.tail else filled
        if not rewritten.tail:
            return chosen.index, chosen.valid
        return chosen.indices

    def _standing_still(self, chosen: Active, rewritten: Rewrite, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A graph's inputs, the stream as the call's first graph had it where nothing is computed.

        Code between graphs runs at all positions, such as that which adds visual features behind a layer.
        """
        at, visible = rewritten.stream, chosen.visible
        stream: torch.Tensor | None = None if at is None else inputs[at]
        chosen.streams.append(stream)
        if len(chosen.streams) == 1:
            return inputs
        first = chosen.streams[0]
        assert visible is not None
        if at is None or stream is None or first is None or stream.shape[:2] != visible.shape:
            raise UnsupportedGraphError(
                f"{self._options.decoder} runs in several graphs, of which not each is given the stream of the "
                "one before: what is left out cannot stay visible here (a gate's elided='visible'): let it be hidden"
            )
        computed = torch.zeros_like(visible).scatter(1, chosen.index, chosen.valid)
        still = torch.where(computed[..., None], stream, first.to(stream.dtype))
        return (*inputs[:at], still, *inputs[at + 1 :])


def _chosen() -> Active:
    chosen = current()
    if not isinstance(chosen, Active):
        raise NotElidedError("a rewritten graph ran outside `active(...)`")
    return chosen


def _tell(chosen: Active, made: Mapping[int, Proven], outputs: Any) -> Any:
    """A graph's outputs; of the masks among them, later graphs of the call learn what they say."""
    for place, proven in made.items():
        chosen.masks[outputs[place]] = (proven, outputs[place]._version)
    return outputs


def _given(chosen: Active, inputs: Sequence[Any]) -> Masks:
    """Those of a graph's inputs that are masks of which an earlier graph of the call has told, as they were then."""
    if not chosen.masks:
        return ()
    tensors = ((place, x) for place, x in enumerate(inputs) if isinstance(x, torch.Tensor))
    told = ((place, x, chosen.masks.get(x)) for place, x in tensors)
    return tuple((place, of[0]) for place, x, of in told if of is not None and of[1] == x._version)
