"""Pass: positions that are not computed can be seen, as they are in front of the span.

A position that is left out stands still: in front of every block it is what it is in front of the first. So all that it
costs is its keys and values, and active positions attend to the whole sequence.

Terms
    at rest    of a value in the span: what it is where every block leaves the stream as it found it.

Pseudo-code
    for every attention, its key and value at rest: the nodes that make them once more, with the span's entry in the
        place of the stream; what is the same in several layers once for all
    key = scatter(key at rest, key); value = scatter(value at rest, value)        all S positions, in their order
    mask = its rows of active queries; hidden is padding, and what comes later where the kernel knew that
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from regate_patch import attention_visible, ops
from regate_patch.analysis.blocks import ADDITIONS, SAME_VALUE, Block, Span
from regate_patch.analysis.graph import argument, frozen, is_call, shape, value, where
from regate_patch.analysis.mixers import SDPA, attends_to_tokens, is_attention, sdpa_arguments
from regate_patch.analysis.refusals import chooses_positions
from regate_patch.analysis.tokens import Tokens
from regate_patch.errors import UnsupportedGraphError
from regate_patch.passes.end_to_end import EndToEnd, NotEndToEndError
from regate_patch.passes.insert import Inserter

_PLACED = (ops.write, ops.after, operator.getitem, "masked_scatter", "index_put", torch.where)  # at some positions
_OTHERWISE = "what is left out cannot stay visible here (a gate's elided='visible'): let it be hidden"


@dataclass
class AtRest:
    """What was found.

    Attributes:
        keys: by attention, its key and value at rest.
        nodes: all that was put in, in graph order; they read nothing of the span.
    """

    keys: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)


def find_at_rest(graph: fx.Graph, span: Span, tokens: Tokens) -> AtRest:
    """Make keys and values at rest.

    Raises:
        UnsupportedGraphError: tokens meet elsewhere than in fused attentions over the sequence, or keys are not made
            from the stream alone.
    """
    cores = _fused(span, tokens)
    _check_stream(span, tokens)
    found, inside = AtRest(), set(span.nodes)
    stream = {n for b in span.blocks for n in (b.entry, b.exit) if shape(n) == shape(span.entry)} | {span.entry}
    made: dict[fx.Node, fx.Node] = dict.fromkeys(stream, span.entry)
    known: dict[Hashable, fx.Node] = {}  # layers' norms begin alike, and now with the same
    for core in cores:
        ends = (argument(core, 1, "key"), argument(core, 2, "value"))
        behind = _behind(ends, inside, stream, span)
        for node in span.nodes:
            if node in behind and node not in made:
                key = frozen((node.op, node.target, node.args, node.kwargs), made)
                if (same := known.get(key)) is not None:
                    made[node] = same
                    continue
                with graph.inserting_after(node):
                    made[node] = graph.node_copy(node, lambda n: made.get(n, n))
                found.nodes.append(made[node])
                if "checkpoint" not in node.meta and "dropout" not in str(node.target):
                    known[key] = made[node]
        found.keys[core] = (made[ends[0]], made[ends[1]])
        if not behind & (stream - {span.entry}):  # in the first layer all positions are at rest
            for own in ends:
                core.replace_input_with(own, made[own])
            for node in [n for n in reversed(span.nodes) if n in behind]:
                if not node.users:
                    graph.erase_node(node)
    left = set(graph.nodes)
    parts: list[Span | Block] = [span, *span.blocks]
    for part in parts:
        part.nodes = [node for node in part.nodes if node in left]
    return found


def _fused(span: Span, tokens: Tokens) -> list[fx.Node]:
    """Where tokens meet: fused attentions alone. What else a cross-attention sees is no position."""
    if any(chooses_positions(node, tokens) for node in span.nodes):
        raise UnsupportedGraphError(f"an attention that chooses what it sees: {_OTHERWISE}")
    meeting = [m for m in span.mixers if not is_attention(m) or attends_to_tokens(m, tokens)]
    for mixer in meeting:
        if not is_call(mixer, *SDPA):
            sdpa = ", or use attn_implementation='sdpa', where the model has it" if is_attention(mixer) else ""
            raise UnsupportedGraphError(f"tokens do not meet in fused attention: {_OTHERWISE}{sdpa}: {where(mixer)}")
    return meeting


def _check_stream(span: Span, tokens: Tokens) -> None:
    """Is what each block reads what the one before it read, and something added? Only then can it stand still."""
    ends = [span.entry, *(end for block in span.blocks for end in (block.entry, block.exit))]
    for before, after in pairwise(ends):
        seen, frontier = set(), [after]
        while frontier and before not in seen:
            node = frontier.pop()
            seen.add(node)
            carriers = [n for n in node.all_input_nodes if tokens.carried_by(n)]
            if is_call(node, *ADDITIONS, *_PLACED) or (is_call(node, *SAME_VALUE) and len(carriers) == 1):
                frontier.extend(n for n in carriers if n not in seen)
        if before not in seen:
            raise UnsupportedGraphError(
                f"layers change what they read, and do not only add to it: {_OTHERWISE}: {where(after)}"
            )


def _behind(ends: tuple[Any, ...], inside: set[fx.Node], stream: set[fx.Node], span: Span) -> set[fx.Node]:
    """What of the span these are made of, back to the stream and it included."""
    found: set[fx.Node] = set()
    frontier = list(ends)
    while frontier:
        node = frontier.pop()
        if node in found or not (node in inside or node is span.entry):
            continue
        found.add(node)
        if node in stream:
            continue
        if node in span.mixers:
            raise UnsupportedGraphError(f"keys are made of what another attention gives: {_OTHERWISE}: {where(node)}")
        frontier.extend(node.all_input_nodes)
    return found


class Resting(Inserter):
    """Keys and values at rest are made of the whole sequence, and nothing of them is gathered."""

    def __init__(self, graph: fx.Graph, span: Span, tokens: Tokens, name: str, *, at_rest: AtRest) -> None:
        super().__init__(graph, span, tokens, name)
        self.at_rest = at_rest
        self.compact |= set(at_rest.nodes)

    def insert(self, nodes: list[fx.Node]) -> None:
        resting = set(self.at_rest.nodes)
        super().insert([node for node in nodes if node not in resting])


class Visible(Resting):
    """Queries at active positions, keys and values at all."""

    def __init__(self, graph: fx.Graph, span: Span, tokens: Tokens, name: str, *, at_rest: AtRest) -> None:
        super().__init__(graph, span, tokens, name, at_rest=at_rest)
        self.seen: dict[fx.Node, tuple[Any, bool]] = {}  # by attention: its mask, and whether the kernel knew the order

    def told(self, name: str) -> tuple[fx.Node, fx.Node]:
        index, valid, self.visible = self.inputs(f"{name}_index", f"{name}_valid", "visible")
        return index, valid

    def enter(self, node: fx.Node) -> None:
        if node in self.at_rest.keys:
            of_call = sdpa_arguments(node)
            mask = of_call.get("attn_mask")
            if isinstance(mask, fx.Node) and mask in self.compact:
                raise UnsupportedGraphError(f"a mask that is made of what tokens hold: {_OTHERWISE}: {where(mask)}")
            self.seen[node] = (mask, of_call.get("is_causal") is True)
            node.args, node.kwargs = (), of_call | {"attn_mask": None, "is_causal": False}
        super().enter(node)

    def attend(self, core: fx.Node) -> None:
        mask, causal = self.seen[core]
        if mask is not None and shape(mask)[-2] == self.tokens.length:
            mask = self.gathered(self.canonical(mask), (len(shape(mask)) - 2,), core)
        rank = len(shape(core.kwargs["query"]))
        key = ("seen", mask, causal, rank)
        args = (mask, self.visible, self.index, self.valid, causal, rank)
        core.kwargs = {
            **core.kwargs,
            "key": self.everywhere(core, 0),
            "value": self.everywhere(core, 1),
            "attn_mask": self.make(key, core, ops.hide_invisible, args, self.seen[core][0] or core),
        }

    def everywhere(self, core: fx.Node, which: int) -> fx.Node:
        """A key or value [.., S, D], at rest where it is not computed."""
        resting = self.at_rest.keys[core][which]
        own: Any = core.kwargs[("key", "value")[which]]
        if own is resting:
            return resting
        dim = len(shape(resting)) - 2
        still = self.gathered(resting, (dim,), core)
        args = (resting, self.index, self.valid, own, still, dim, 0)
        everywhere = self.make(("everywhere", resting, own), core, ops.scatter_tokens, args, resting)
        for node in (still, everywhere):  # recomputed together with what they are made of
            if "checkpoint" in own.meta:
                node.meta["checkpoint"] = own.meta["checkpoint"]
        return everywhere


class VisibleEndToEnd(Resting, EndToEnd):
    """The same where all attention is in causal order: queries of all rows end to end, keys and values in rows."""

    def told(self, name: str) -> tuple[fx.Node, fx.Node]:
        self.whose, self.places, *others = self.inputs("rows", "places", "slots", "longest", "counts", "visible")
        self.slots, self.longest, self.counts, self.visible = others
        return self.one_row(self.whose, self.places)

    def attend(self, core: fx.Node) -> None:
        of_call = sdpa_arguments(core)
        query, own = of_call["query"], (of_call["key"], of_call["value"])
        ends = [self.everywhere(core, *pair) for pair in zip(own, self.at_rest.keys[core], strict=True)]
        if attention_visible.by_rows(value(query)):
            core.target, at = attention_visible.attend_by_rows, (self.places, self.counts, self.visible)
        else:
            args = (self.whose, self.places, self.slots, self.longest, self.visible)
            seen = self.make("seen", core, attention_visible.may_see, args, core)
            core.target, at = attention_visible.attend_filled, (self.whose, self.slots, seen)
        core.op, core.kwargs = "call_function", {}
        core.args = (query, *ends, *at, of_call.get("scale"))

    def everywhere(self, core: fx.Node, own: fx.Node, resting: fx.Node) -> fx.Node:
        """A key or value [B, G, S, D], at rest where it is not computed."""
        sizes = shape(resting)
        if len(sizes) != 4 or (sizes[0], sizes[2]) != (self.tokens.batch, self.tokens.length):
            raise NotEndToEndError(f"a key or value that is not [B, G, S, D]: {where(resting)}")
        if own is resting:
            return resting
        args = (resting, self.whose, self.places, own)
        everywhere = self.make(("everywhere", resting, own), core, ops.put_in_rows, args, resting)
        if "checkpoint" in own.meta:  # recomputed together with what it is made of
            everywhere.meta["checkpoint"] = own.meta["checkpoint"]
        return everywhere
