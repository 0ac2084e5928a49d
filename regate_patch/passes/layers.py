"""Pass: equal layers become calls of one function, which a compiler then compiles once.

Terms
    slice       what runs from one point of the residual stream to the next: one layer. What comes before the first and
                after the last is a slice, too.
    kind        what a slice does: its operations in their order, what each reads, which of its results are read later,
                and the form of its inputs (type, shape, whether they need a gradient). Slices of one kind differ in
                nothing but the values that they are given.

Pseudo-code
    cut the graph, in the order in which it runs, before each attention block
    move what all layers read (gathered masks, cosines, sizes) in front of the first
    if no two slices are of one kind: leave the graph in one piece
    join slices that stand alone to their neighbours
    for each slice: a call of its kind's function, with what it reads as arguments

A slice never ends where a checkpoint, autocast or `no_grad` is open, nor where something is written into a value made
in another slice.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from regate_patch import ops
from regate_patch.analysis.blocks import Span
from regate_patch.analysis.graph import (
    erase_dead,
    expr,
    frozen,
    is_call,
    is_scalar,
    is_tensor,
    shape,
    value,
    writes_in_place,
)
from regate_patch.analysis.tokens import Tokens
from regate_patch.passes.mutations import viewed

_GRAD = torch._C._set_grad_enabled
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


@dataclass(frozen=True)
class Slice:
    """Nodes that follow one another, and what goes in and out, in the order in which it is met.

    Both are read anew: what goes in changes as earlier slices are replaced.
    """

    nodes: list[fx.Node]

    @property
    def inputs(self) -> list[fx.Node]:
        inside = set(self.nodes)
        return list(dict.fromkeys(s for n in self.nodes for s in n.all_input_nodes if s not in inside))

    @property
    def outputs(self) -> list[fx.Node]:
        inside = set(self.nodes)
        return [n for n in self.nodes if any(user not in inside for user in n.users)]


def outline_layers(gm: fx.GraphModule, span: Span, tokens: Tokens) -> tuple[str, ...]:
    """Change the graph as said above.

    Returns:
        the names of the submodules that are called now, one per kind, in the order of their first call; none if the
        graph stays in one piece.
    """
    graph = gm.graph
    starts = [block.entry for block in span.blocks if block.kind == "attention"][1:]
    if not starts:
        return ()
    _settle_numbers(graph)
    _hoist(graph, span, tokens)
    slices = [Slice(nodes) for nodes in _cut(graph, _first(graph, span), starts)]
    kinds = [_kind(gm, part) for part in slices]
    often = Counter(kinds)
    if max(often.values()) == 1:
        return ()
    names: dict[Hashable, str] = {}
    for alone, group in groupby(zip(slices, kinds, strict=True), lambda each: often[each[1]] == 1):
        members = list(group)
        if alone:
            joined = Slice([node for part, _ in members for node in part.nodes])
            members = [(joined, _kind(gm, joined))]
        for part, kind in members:
            if kind not in names:
                names[kind] = f"layers_{len(names)}"
                gm.add_submodule(names[kind], body_of(gm, part))
            with graph.inserting_after(part.nodes[-1]):
                call = graph.call_module(names[kind], tuple(part.inputs))
            replace_by(graph, part, call)
    graph.lint()
    return tuple(names.values())


# -- before the cut -----------------------------------------------------------------------------------


def _settle_numbers(graph: fx.Graph) -> None:
    """Sizes that capture has found to be numbers, written as numbers: the first layer asks for them, others know."""
    for node in graph.nodes:
        if node.op != "placeholder" and is_scalar(node):
            e = expr(value(node))
            if isinstance(e, sympy.Integer):
                node.replace_all_uses_with(int(e))
    erase_dead(graph)


def _first(graph: fx.Graph, span: Span) -> fx.Node:
    """The first node of the first layer: a value, or what must be entered before it is computed."""
    inside = set(span.nodes)
    entered, open_ = None, _Open()
    for node in graph.nodes:
        was_open = bool(open_)
        open_.step(node)
        if open_ and not was_open:
            entered = node
        if node in inside and is_tensor(node):
            return entered if open_ and entered is not None else node
    raise AssertionError("a span without values")


def _hoist(graph: fx.Graph, span: Span, tokens: Tokens) -> None:
    """Move in front of the first layer what layers read and did not make: values per token, and sizes.

    What is made of weights alone stays where it is read: weights that are unpacked there should not all be unpacked at
    once.
    """
    first, inside = _first(graph, span), set(span.nodes)
    checkpoints = {node.meta.get("checkpoint") for node in span.nodes}
    later: set[fx.Node] = set()
    open_ = _Open()
    for node in list(graph.nodes):
        open_.step(node)
        if node is first:
            later.add(node)
        if not later and node.meta.get("checkpoint") in checkpoints:
            node.meta.pop("checkpoint", None)  # an index, which it costs nothing to keep
        if not later or node.op in ("placeholder", "output"):
            continue
        writes = writes_in_place(node) or is_call(node, ops.write, ops.after)
        shared = is_tensor(node) and node not in inside and tokens.mentioned_by(node) and not open_ and not writes
        put_in = not writes and getattr(node.target, "__module__", "") == ops.__name__ and node not in inside
        if (shared or put_in or _is_size(node)) and not later & set(node.all_input_nodes):
            first.prepend(node)
            node.meta.pop("checkpoint", None)
        else:
            later.add(node)


def _is_size(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(value(node))
    return bool(leaves) and all(isinstance(x, (int, torch.SymInt)) for x in leaves)


# -- the cut ------------------------------------------------------------------------------------------


class _Open:
    """Autocast and `no_grad` that have been entered and not left."""

    def __init__(self) -> None:
        self.autocast: set[fx.Node] = set()
        self.switched_grad = False

    def step(self, node: fx.Node) -> None:
        if is_call(node, _ENTER):
            self.autocast.add(node)
        elif is_call(node, _EXIT):
            self.autocast.discard(node.args[0])
        elif is_call(node, _GRAD):
            self.switched_grad = not self.switched_grad

    def __bool__(self) -> bool:
        return bool(self.autocast) or self.switched_grad


def _cut(graph: fx.Graph, first: fx.Node, starts: list[fx.Node]) -> list[list[fx.Node]]:
    """The graph's calls in slices; a layer ends with the stream value that the next one starts from."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    position = {node: i for i, node in enumerate(nodes)}
    wanted = {position[first]} | {position[node] + 1 for node in starts if node in position}
    whole = _held_together(nodes, position)
    cuts = sorted(cut for cut in wanted if 0 < cut < len(nodes) and not whole[cut])
    return [nodes[a:b] for a, b in zip([0, *cuts], [*cuts, len(nodes)], strict=True)]


def _held_together(nodes: list[fx.Node], position: dict[fx.Node, int]) -> list[bool]:
    """For each place between two nodes (before the second): must they stay in one slice?"""
    ties = [0] * (len(nodes) + 1)
    regions: dict[Any, int] = {}
    open_ = _Open()
    for i, node in enumerate(nodes):
        ties[i] += bool(open_)
        open_.step(node)
        held = [regions.setdefault(node.meta["checkpoint"], i)] if "checkpoint" in node.meta else []
        if is_call(node, ops.after):
            held += [_maker(source, position) for source in node.args]
        elif writes_in_place(node) or is_call(node, ops.write):
            held.append(_maker(node.args[0], position))
        for since in held:
            for between in range(since + 1, i + 1):
                ties[between] += 1
    return [count > 0 for count in ties]


def _maker(node: Any, position: dict[fx.Node, int]) -> int:
    """Where the memory of this value was made; what is handed in is held to have been made at the very start."""
    while True:
        source = node.args[0] if writes_in_place(node) else viewed(node)
        if source is None:
            return position.get(node, 0)
        node = source


# -- kinds --------------------------------------------------------------------------------------------


def _kind(gm: fx.GraphModule, part: Slice) -> Hashable:
    """Equal for slices that one function can serve."""
    names: dict[fx.Node, Hashable] = {node: ("input", i) for i, node in enumerate(part.inputs)}
    names |= {node: ("node", i) for i, node in enumerate(part.nodes)}
    forms = tuple(_form(node) for node in part.inputs)
    return _lines(gm, part.nodes, names), forms, tuple(names[node] for node in part.outputs)


def _lines(gm: fx.GraphModule, nodes: Iterable[fx.Node], names: dict[fx.Node, Hashable]) -> tuple[Hashable, ...]:
    regions: dict[Any, int] = {}
    lines = []
    for node in nodes:
        region = node.meta.get("checkpoint")
        again = None if region is None else (regions.setdefault(region, len(regions)), frozen(region.options, names))
        lines.append((node.op, _target(gm, node), frozen(node.args, names), frozen(node.kwargs, names), again))
    return tuple(lines)


def _target(gm: fx.GraphModule, node: fx.Node) -> Hashable:
    """What is called; a graph that belongs to this one by what it does, anything else that does by what it is."""
    if node.op not in ("get_attr", "call_module"):
        return None if node.op == "placeholder" else node.target
    found: Any = operator.attrgetter(str(node.target))(gm)
    if not isinstance(found, fx.GraphModule) or any(True for _ in (*found.parameters(), *found.buffers())):
        return id(found)
    inner = list(found.graph.nodes)
    return _lines(found, inner, {each: i for i, each in enumerate(inner)})


def _form(node: fx.Node) -> Hashable:
    x: Any = value(node)
    if not isinstance(x, torch.Tensor):
        return (type(x),)
    return type(x), x.dtype, x.device, shape(node), x.requires_grad


# -- what stands there instead ------------------------------------------------------------------------


def body_of(gm: fx.GraphModule, part: Slice) -> fx.GraphModule:
    """The function that a slice is, of its inputs; its outputs in a tuple."""
    body = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for source in part.inputs:
        copied[source] = body.placeholder(source.name)
        copied[source].meta = {k: v for k, v in source.meta.items() if k != "checkpoint"}
    for node in part.nodes:
        copied[node] = body.node_copy(node, lambda n: copied[n])
    body.output(tuple(copied[node] for node in part.outputs))
    return fx.GraphModule(gm, body)


def replace_by(graph: fx.Graph, part: Slice, call: fx.Node) -> None:
    """Let `call`, which gives the outputs of a slice in a tuple, stand in its place."""
    inside, outputs, last = set(part.nodes), part.outputs, call
    for place, node in enumerate(outputs):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, place))
        last.meta = {k: v for k, v in node.meta.items() if k != "checkpoint"}
        for user in list(node.users):
            if user not in inside:
                user.replace_input_with(node, last)
    for node in reversed(part.nodes):
        graph.erase_node(node)
