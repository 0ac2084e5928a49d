"""The passes, in order, from a captured decoder graph to one that computes active positions only.

`PASSES` is the list; `rewrite` walks it. Each pass works on the graph at hand and on what those before it found, and
promises one of two things:

    "needed"   without it the graph would compute active positions wrongly, or not at all
    "saves"    it only saves work: numbers at positions that are read are the same without it, up to rounding, and it
               can be switched off by name
"""

from __future__ import annotations

import contextlib
import operator
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal

import torch
from torch import fx

from regate_patch import ops
from regate_patch.analysis import flops
from regate_patch.analysis.blocks import Span, find_span
from regate_patch.analysis.graph import erase_dead, expr, is_call, is_scalar, value, where
from regate_patch.analysis.mixers import find_mixers, is_attention, sequence_candidates
from regate_patch.analysis.operands import put_in_place
from regate_patch.analysis.refusals import check
from regate_patch.analysis.tail import find_tail
from regate_patch.analysis.tokens import Tokens, find_tokens
from regate_patch.errors import RegateError, UnknownPassError, UnsupportedGraphError
from regate_patch.passes.causal import Proven, repeat_shared_heads, use_causal_kernels
from regate_patch.passes.checkpointing import inline, outline
from regate_patch.passes.end_to_end import EndToEnd, NotEndToEndError, Within, can_be_laid
from regate_patch.passes.insert import insert
from regate_patch.passes.layers import outline_layers
from regate_patch.passes.mutations import name_mutations
from regate_patch.passes.visible import AtRest, Visible, VisibleEndToEnd, find_at_rest

DISABLE = "REGATE_DISABLE"  # environment variable: names of passes to switch off, with commas between


@dataclass
class State:
    """What is handed from pass to pass.

    Attributes:
        gm: the graph.
        whole, padding_elided, any_length, samples, visible, masks: as `rewrite` was asked.
        found: does the graph hold attention? If not, no pass has more to do.
        stream: see `Rewrite`.
        tokens: what axes are tokens.
        span: from the first block to the last.
        recurrences: see `Rewrite`; counted while attention is still what the model calls.
        tail: the part of the span that runs where the output is read, if it can be cut off.
        causal, longest, apart: see `Rewrite`.
        at_rest: keys and values of positions that are not computed, where they are to be seen.
        flops: its `flops_linear, flops_quadratic, flops_tail`.
        flops_visible: see `Rewrite`.
        end_to_end: lay rows end to end, if nothing needs rows of its own; then, whether they are.
        put_in: its `gathers, scatters`.
        layers: see `Rewrite`.
    """

    gm: fx.GraphModule
    whole: bool
    padding_elided: bool
    any_length: bool
    samples: bool
    visible: bool
    masks: Mapping[int, Proven]
    found: bool = True
    stream: int | None = None
    tokens: Tokens = None  # type: ignore[assignment]  # from the pass that finds it on
    span: Span = None  # type: ignore[assignment]
    recurrences: int = 0
    tail: Span | None = None
    causal: int = 0
    longest: float = inf
    apart: bool = False
    at_rest: AtRest | None = None
    flops: tuple[int, int, int] = (0, 0, 0)
    flops_visible: tuple[int, int, int] = (0, 0, 0)
    end_to_end: bool = False
    put_in: tuple[int, int] = (0, 0)
    layers: tuple[str, ...] = ()


def _flatten(state: State) -> None:
    state.gm = put_in_place(drop_assertions(inline(state.gm)))
    state.found = bool(sequence_candidates(state.gm))


def _name_mutations(state: State) -> None:
    state.gm = name_mutations(state.gm)
    erase_dead(state.gm.graph)


def _find(state: State) -> None:
    state.tokens = find_tokens(state.gm, sequence_candidates(state.gm))
    state.span = find_span(state.gm, find_mixers(state.gm, state.tokens), state.tokens)
    state.recurrences = sum(not is_attention(mixer) for mixer in state.span.mixers)
    inputs = [node for node in state.gm.graph.nodes if node.op == "placeholder"]
    state.stream = inputs.index(state.span.entry) if state.span.entry in inputs else None


def _check(state: State) -> None:
    check(state.span, state.tokens)


def _causal(state: State) -> None:
    if state.padding_elided:
        state.causal, state.longest, state.apart = use_causal_kernels(
            state.gm,
            state.span,
            state.tokens,
            any_length=state.any_length,
            samples=state.samples,
            masks=state.masks,
        )


def _tail(state: State) -> None:
    if state.whole:
        state.tail = find_tail(state.gm.graph, state.span, state.tokens)


def _end_to_end(state: State) -> None:
    state.end_to_end = can_be_laid(state.span, state.tokens)
    if state.apart and not state.end_to_end:
        raise NotEndToEndError("samples were to be kept apart by laying them end to end")


def _measure(state: State) -> None:
    of_tail = flops.polynomial(state.tail.nodes, state.tokens)[0] if state.tail else 0
    state.flops = (*flops.polynomial(state.span.nodes, state.tokens), of_tail)


def _visible(state: State) -> None:
    if state.visible:
        state.at_rest = find_at_rest(state.gm.graph, state.span, state.tokens)
        computed = flops.polynomial(state.span.nodes, state.tokens, masked=True)
        state.flops_visible = (*computed, flops.polynomial(state.at_rest.nodes, state.tokens)[0])


def _insert(state: State) -> None:
    kinds: dict[str, Any] = {"outer": EndToEnd, "inner": Within} if state.end_to_end else {}
    if state.at_rest is not None:
        outer: Any = VisibleEndToEnd if state.end_to_end else Visible
        kinds["outer"] = partial(outer, at_rest=state.at_rest)
    state.gm = insert(state.gm, state.span, state.tail, state.tokens, **kinds)
    state.put_in = count(state.gm)


def _heads(state: State) -> None:
    repeat_shared_heads(state.gm)


def _layers(state: State) -> None:
    state.layers = outline_layers(state.gm, state.span, state.tokens)


def _outline(state: State) -> None:
    for part in (state.gm, *(getattr(state.gm, name) for name in state.layers)):
        outline(part).recompile()


@dataclass(frozen=True)
class Pass:
    """One entry of the list.

    Attributes:
        name: by which it is observed and, if it only saves work, switched off.
        run: changes the state.
        promise: see the module's description.
        does: in a line.
    """

    name: str
    run: Callable[[State], None]
    promise: Literal["needed", "saves"]
    does: str


PASSES = (
    Pass(
        "flatten",
        _flatten,
        "needed",
        "bodies of checkpoints become part of the graph, calls take one form; assertions on sizes go",
    ),
    Pass("mutations", _name_mutations, "needed", "writes in place become values with a name"),
    Pass("find", _find, "needed", "token axes by the symbol S, places where tokens mix, the span of all blocks"),
    Pass("check", _check, "needed", "operations that would be something else on part of the positions are refused"),
    Pass("causal", _causal, "saves", "masks that say no more than causal order give way to `is_causal`"),
    Pass("tail", _tail, "saves", "what comes after the last attention is found, to run where the output is read"),
    Pass("end_to_end", _end_to_end, "saves", "rows are laid end to end, where all attention is in causal order"),
    Pass("measure", _measure, "needed", "what a position costs in FLOPs, for reports"),
    Pass("visible", _visible, "needed", "keys and values of positions that are left out, if they are to be seen"),
    Pass("insert", _insert, "needed", "one gather in front of the span, one scatter behind it, side inputs gathered"),
    Pass(
        "heads",
        _heads,
        "saves",
        "on a GPU, keys that heads share are repeated where a mask stands: its kernels share none",
    ),
    Pass("layers", _layers, "saves", "equal layers become calls of one function, which is compiled once"),
    Pass("outline", _outline, "needed", "checkpoints are put back around what was inside them"),
)
OPTIONAL = tuple(p.name for p in PASSES if p.promise == "saves")


def switched_off(disable: Collection[str] = ()) -> frozenset[str]:
    """The passes that a caller or the environment switches off.

    Raises:
        UnknownPassError: no such pass, or one that is needed.
    """
    named = {*disable, *filter(None, (name.strip() for name in os.environ.get(DISABLE, "").split(",")))}
    if wrong := sorted(named - set(OPTIONAL)):
        raise UnknownPassError(
            f"no pass named {', '.join(map(repr, wrong))} can be switched off (by `disable` or {DISABLE}); those that "
            f"only save work are {', '.join(map(repr, OPTIONAL))}"
        )
    return frozenset(named)


@dataclass(frozen=True, eq=False)
class Rewrite:
    """What was found in one captured graph and what became of it.

    Attributes:
        module: takes `(active_index, active_valid, *inputs of the captured graph)`, with a tail
            `(active_index, active_valid, read_index, read_valid, *inputs of the captured graph)`; where rows are laid
            end to end, `(rows, places, starts, longest, *inputs)`, with a tail `(.., longest, read, *inputs)`. Where
            positions that are not computed are seen, `visible` stands behind `active_valid`, and `slots, longest,
            counts, visible` in the place of `starts, longest`.
        attention, mlp: number of blocks of each kind.
        recurrences: operations other than attention that run along the sequence (convolutions, linear attention);
            they run over the active positions in their order.
        flops_linear, flops_quadratic: forward FLOPs of the blocks for a row that computes n positions are
            `flops_linear * n + flops_quadratic * n**2`, and `flops_tail` less for each position that is not read.
        gathers, scatters: how many the rewriter put in: one gather per live-in, one for the stream; with a tail, one
            more for the attention's result and one for the stream, and one scatter.
        causal: attentions whose mask gave way to `is_causal` (see `regate_patch.passes.causal`).
        flops_visible: of a row that computes n positions and sees S, computed or not: a, b, c of
            `a * n + b * n * S + c * S`.
        longest: the sequence length up to which that is right: within it, no window hides anything.
        tail: does what comes after the last attention run at positions that are read (`regate_patch.analysis.tail`)?
        end_to_end: are rows laid end to end (see `regate_patch.passes.end_to_end`)?
        apart: is that what keeps samples of one row apart (see `Active.samples`)?
        visible: are positions that are not computed seen (see `regate_patch.passes.visible`)?
        stream: which of the captured graph's inputs the span's entry is; None if the graph makes it.
        handed_out: values per token that the graph gives to whoever called it: what the decoder returns, and what its
            code or a wrapped part of it puts elsewhere.
        layers: names of the submodules that the graph is made of, to be compiled each on its own (see
            `regate_patch.passes.layers`); none where it is one piece.
    """

    module: fx.GraphModule
    attention: int
    mlp: int
    recurrences: int
    flops_linear: int
    flops_quadratic: int
    gathers: int
    scatters: int
    causal: int = 0
    longest: float = inf
    tail: bool = False
    flops_tail: int = 0
    flops_visible: tuple[int, int, int] = (0, 0, 0)
    end_to_end: bool = False
    apart: bool = False
    visible: bool = False
    stream: int | None = None
    handed_out: int = 0
    layers: tuple[str, ...] = ()

    def flops(self, computed: float, read: float, seen: float | None = None) -> float:
        """Forward FLOPs of its blocks for a row; `seen`: how many positions it sees, where that is more."""
        if seen is None:
            blocks = self.flops_linear * computed + self.flops_quadratic * computed**2
        else:
            each, pair, still = self.flops_visible
            blocks = each * computed + pair * computed * seen + still * seen
        return blocks - self.flops_tail * (computed - read)


Observer = Callable[[str, fx.GraphModule], None]


def rewrite(
    gm: fx.GraphModule,
    *,
    whole: bool = True,
    padding_elided: bool = False,
    any_length: bool = True,
    samples: bool = False,
    visible: bool = False,
    masks: Mapping[int, Proven] | None = None,
    disable: Collection[str] = (),
    observe: Observer | None = None,
) -> Rewrite | None:
    """Rewrite a graph that Dynamo captured; None if it holds no attention, and so nothing to elide.

    Args:
        gm: the captured graph, left as it was.
        whole: this graph should be all of the decoder: then its tail is looked for.
        padding_elided: no active position, and none that is visible, is one that the attention mask hides.
        any_length: the rewritten graph must serve sequences of any length, else those up to its `longest`.
        samples: whoever runs it knows how many active positions each sample has, where rows hold several.
        visible: active positions see those that are not computed, as `Active.visible` says when it runs.
        masks: of the graph's inputs, by their places, those that another graph made and what they say.
        disable: names of passes to leave out.
        observe: called with "captured" and then each pass's name, and the graph after it (for tests and debugging).

    Raises:
        UnsupportedGraphError: see `regate_patch.analysis.blocks`, `refusals` and `regate_patch.passes.insert`; or a
            pass failed in another way, which is the error's cause.
    """
    samples = samples and not visible and "end_to_end" not in disable

    def begun(samples: bool) -> State:
        return State(_copy(gm), whole, padding_elided, any_length, samples, visible, masks or {})

    try:
        return _walk(begun(samples), disable, observe)
    except NotEndToEndError:
        return _walk(begun(samples=False), {*disable, "end_to_end"}, observe)


@contextlib.contextmanager
def following(step: str) -> Iterator[None]:
    """What fails inside and is no error of ours is a graph that this step cannot follow.

    Typed, it is told at once, wherever errors of others would be passed over, and the decoder can run dense.
    """
    try:
        yield
    except RegateError:
        raise
    except Exception as error:
        looked_at = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__)]
        nodes = [node for node in looked_at if isinstance(node, fx.Node)]
        raise UnsupportedGraphError(
            f"the engine could not follow this decoder: its step {step!r} ended in {type(error).__name__}: {error}. "
            "Please report this fault of the engine; until it is mended, on_unsupported='warn' runs the decoder dense"
            + (f". It looked at {where(nodes[-1])}" if nodes else "")
        ) from error


def _walk(state: State, disable: Collection[str], observe: Observer | None) -> Rewrite | None:
    see = observe or (lambda name, graph: None)
    see("captured", state.gm)
    for each in PASSES:
        if each.name not in disable:
            with following(each.name):
                each.run(state)
            if not state.found:
                return None
            see(each.name, state.gm)
    return _summary(state)


def _summary(state: State) -> Rewrite:
    span = state.span
    linear, quadratic, of_tail = state.flops
    gathers, scatters = state.put_in
    return Rewrite(
        module=state.gm,
        attention=span.attention,
        mlp=span.mlp,
        recurrences=state.recurrences,
        flops_linear=linear,
        flops_quadratic=quadratic,
        gathers=gathers,
        scatters=scatters,
        causal=state.causal,
        longest=state.longest,
        tail=state.tail is not None,
        flops_tail=of_tail,
        flops_visible=state.flops_visible,
        end_to_end=state.end_to_end,
        apart=state.apart,
        visible=state.visible,
        stream=state.stream,
        handed_out=span.handed_out,
        layers=state.layers,
    )


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed, sharing parameters and fake tensors with the original."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copied)
    graph.output(output)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(gm, graph)


def drop_assertions(gm: fx.GraphModule) -> fx.GraphModule:
    """Remove run-time assertions on sizes (they hold at full length only) and read sizes from the inputs."""
    graph = gm.graph
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and is_scalar(node):
            known.setdefault(expr(value(node)), node)
        elif is_call(node, operator.getitem) and is_call(node.args[0], "size") and is_scalar(node):
            if (same := known.get(expr(value(node)))) is not None:
                node.replace_all_uses_with(same)
        elif is_call(node, torch.ops.aten._assert_scalar.default, torch._check, torch._assert):
            graph.erase_node(node)
    erase_dead(graph)
    return gm


def count(gm: fx.GraphModule) -> tuple[int, int]:
    """(gathers, scatters) that the rewriter put into the graph."""
    gathers = sum(is_call(n, ops.gather_tokens, ops.select_tokens) for n in gm.graph.nodes)
    scatters = (ops.scatter_tokens, ops.scatter_on_zeros, ops.scatter_flat_on_zeros)
    return gathers, sum(is_call(n, *scatters) for n in gm.graph.nodes)
