"""Find the span of a captured decoder that is computed on active positions, and the blocks in it.

Terms
    mixer       where tokens meet: attention or a recurrence (see `mixers`).
    stream      the residual stream: the value that blocks read and add to.
    block       input X on the stream, output J on the stream, and the nodes between them.
    joint       the addition that ends a block: J = X + f(X), where the way from X to the addition past f
                changes nothing but scale or type.
    span        everything computed from the first block's X, up to the last block's J.

Pseudo-code
    for each mixer: J = the first addition after it that joins it to one of its own ancestors X
    mixer's block: X .. J               MLP block: from J to the next mixer's X
    before the first and after the last such block: joints with a matrix product in them
    entry = the first X (or, where no joint is found, the first per-token value that all mixers were made from)
    exit = the last J (or, where something after it reads inside the span, the graph's outputs)

Blocks only say where the span begins and ends, and what to report; what happens inside it is not theirs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from regate_patch.analysis.graph import ancestors, is_call, is_tensor, shape, value, where
from regate_patch.analysis.tokens import Tokens
from regate_patch.errors import UnsupportedGraphError

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SAME_VALUE = (
    operator.mul, operator.truediv, operator.imul, torch.mul, F.dropout, "mul", "div", "to", "clone", "contiguous",
    "float", "type_as", "view", "reshape",
)  # fmt: skip
_HAS_WEIGHTS = ("linear", "matmul", "bmm", "mm", "addmm", "einsum", "baddbmm", "conv1d", "grouped_mm", "gemm")


@dataclass(eq=False)
class Block:
    """One block: `nodes` lie between the stream values `entry` (outside) and `exit` (the last of them)."""

    kind: str
    entry: fx.Node
    exit: fx.Node
    nodes: list[fx.Node]


@dataclass(eq=False)
class Span:
    """What is computed on active positions: `nodes`, all made from `entry`.

    Attributes:
        entry: the residual stream before the first block; itself outside.
        exit: the residual stream after the last block; None where the span goes on to the graph's outputs.
        nodes: in graph order.
        mixers: where tokens meet in it, in graph order.
        handed_out: how many values per token, made from `entry`, the graph gives to whoever called it.
        attention, mlp: number of blocks of each kind; a mixer that no joint follows counts as a block of its own.
    """

    entry: fx.Node
    exit: fx.Node | None
    nodes: list[fx.Node]
    mixers: list[fx.Node]
    blocks: list[Block] = field(default_factory=list)
    handed_out: int = 0

    @property
    def attention(self) -> int:
        in_blocks = {node for block in self.blocks for node in block.nodes}
        alone = sum(mixer not in in_blocks for mixer in self.mixers)
        return alone + sum(block.kind == "attention" for block in self.blocks)

    @property
    def mlp(self) -> int:
        return sum(block.kind == "mlp" for block in self.blocks)


def find_span(gm: fx.GraphModule, mixers: list[fx.Node], tokens: Tokens) -> Span:
    """See the module's description for the rules.

    Raises:
        UnsupportedGraphError: no value from which all mixers were made.
    """
    search = _Search(gm.graph, tokens)
    blocks = search.blocks(mixers)
    entry = search.common_source(mixers, blocks)
    exit_ = blocks[-1].exit if blocks else None
    nodes = search.made_from(entry, exit_)
    if exit_ is not None and not (search.is_cut(entry, exit_) and set(mixers) <= set(nodes)):
        exit_, nodes = None, search.made_from(entry, None)
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    handed_out = sum(tokens.carried_by(n) and search.depends(n, entry) for n in set(output.all_input_nodes))
    return Span(entry, exit_, nodes, mixers, blocks, handed_out)


class _Search:
    def __init__(self, graph: fx.Graph, tokens: Tokens) -> None:
        self.order = [n for n in graph.nodes if n.op != "output"]
        self.position = {node: i for i, node in enumerate(self.order)}
        self.above = ancestors(graph)
        self.tokens = tokens

    def depends(self, node: Any, on: fx.Node) -> bool:
        return bool(self.above[node] >> self.position[on] & 1)

    # -- blocks ---------------------------------------------------------------------------------------

    def blocks(self, mixers: list[fx.Node]) -> list[Block]:
        """All blocks in graph order."""
        mixing: list[Block] = []
        for mixer in mixers:
            if mixing and mixer in mixing[-1].nodes:
                continue
            if (found := self.joint_of(mixer)) is None:
                continue
            block = Block("attention", *found, self.between(*found))
            while mixing and mixing[-1].exit in block.nodes:  # a joint inside another block, as of a convolved key
                mixing.pop()
            mixing.append(block)
        if not mixing:
            return []
        blocks: list[Block] = []
        while (head := self.head(blocks[0] if blocks else mixing[0])) is not None:
            blocks.insert(0, head)
        for block, following in zip(mixing, [*mixing[1:], None], strict=True):
            blocks.append(block)
            if following is None or following.entry is block.exit:
                continue
            nodes = self.between(block.exit, following.entry, block)
            if any(_has_weights(n) for n in nodes):
                blocks.append(Block("mlp", block.exit, following.entry, nodes))
        while (tail := self.tail(blocks[-1])) is not None:
            blocks.append(tail)
        return blocks

    def joint_of(self, mixer: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        for node in self.order[self.position[mixer] + 1 :]:
            skip = self.skip_side(node, mixer)
            entry = self.walk_back(skip, lambda n: n is not mixer and self.depends(mixer, n)) if skip else None
            if entry is not None:
                return entry, node
        return None

    def skip_side(self, node: fx.Node, inner: fx.Node) -> Any:
        """Of an addition of two token-carrying values, one of which depends on `inner`: the other."""
        if not is_call(node, *ADDITIONS) or len(node.args) < 2 or not self.tokens.carried_by(node):
            return None
        if not all(self.tokens.carried_by(a) for a in node.args[:2]):
            return None
        sides = [(a, b) for a, b in (node.args[:2], node.args[1::-1]) if self.depends(a, inner)]
        if len(sides) != 1 or shape(sides[0][1]) != shape(node):
            return None
        return sides[0][1]

    def walk_back(self, node: Any, is_goal: Any) -> fx.Node | None:
        """The nearest value behind `node`, through scalings and casts only, that `is_goal`."""
        while not is_goal(node):
            sources = [a for a in node.all_input_nodes if self.tokens.carried_by(a)]
            if not is_call(node, *SAME_VALUE) or len(sources) != 1:
                return None
            node = sources[0]
        return node if self.tokens.carried_by(node) else None

    def between(self, entry: fx.Node, exit_: fx.Node, beside: Block | None = None) -> list[fx.Node]:
        """What lies between two stream values, and what runs beside: computed from `beside.entry`, not in it."""
        start = beside.entry if beside else entry
        taken = set(beside.nodes) if beside else set()
        return [
            n
            for n in self.order[self.position[start] + 1 : self.position[exit_] + 1]
            if n not in taken and self.depends(n, start) and self.depends(exit_, n)
        ]

    def head(self, following: Block) -> Block | None:
        """The block of which `following.entry` is the joint, if it has a matrix product in it."""
        joint = following.entry
        if not is_call(joint, *ADDITIONS) or len(joint.args) < 2:
            return None
        if not all(self.tokens.carried_by(a) for a in joint.args[:2]):
            return None
        for skip, inner in (joint.args[:2], joint.args[1::-1]):
            entry = self.walk_back(skip, lambda n, f=inner: self.depends(f, n)) if skip is not inner else None
            if entry is None:
                continue
            nodes = self.between(entry, joint)
            if any(_has_weights(n) for n in nodes):
                return Block("mlp", entry, joint, nodes)
        return None

    def tail(self, previous: Block) -> Block | None:
        """The next joint after a block's exit that has a matrix product in it."""
        end = previous.exit
        for node in self.order[self.position[end] + 1 :]:
            if not is_call(node, *ADDITIONS) or len(node.args) < 2 or not self.depends(node, end):
                continue
            if not all(self.tokens.carried_by(a) for a in node.args[:2]):
                continue
            for skip, inner in (node.args[:2], node.args[1::-1]):
                if skip is inner or not self.depends(inner, previous.entry):
                    continue
                beside = self.walk_back(skip, lambda n: n is end)  # runs beside the block before, or after it
                after = self.walk_back(skip, lambda n, f=inner: self.depends(f, n) and self.depends(n, end))
                if beside is None and after is None:
                    continue
                joint = self.unflattened(node)
                nodes = self.between(end, joint, previous)
                within = nodes if after is None else self.between(after, node)  # an activation may add, too
                if any(_has_weights(n) for n in within):
                    return Block("mlp", end, joint, nodes)
        return None

    def unflattened(self, joint: fx.Node) -> fx.Node:
        """A joint of [B*S, D] as the [B, S, D] that is made of it."""
        users = list(joint.users)
        if value(joint).dim() == 2 and len(users) == 1 and is_call(users[0], "view", "reshape"):
            return users[0]
        return joint

    # -- the span -------------------------------------------------------------------------------------

    def common_source(self, mixers: list[fx.Node], blocks: list[Block]) -> fx.Node:
        """The first block's entry if all mixers were made from it, or the first per-token value of which that holds.

        Position embeddings are per-token values too; they are not made from data, which has a batch.
        """
        if blocks and all(self.depends(m, blocks[0].entry) for m in mixers):
            return blocks[0].entry
        for node in self.order:
            if self.tokens.carried_by(node) and self.tokens.batch in shape(node):
                if all(self.depends(m, node) and m is not node for m in mixers):
                    return node
        raise UnsupportedGraphError(
            "attentions of this graph have no per-token value in common that all were made from, so no residual "
            f"stream is found; the first is {where(mixers[0])}"
        )

    def made_from(self, entry: fx.Node, exit_: fx.Node | None) -> list[fx.Node]:
        return [
            n
            for n in self.order
            if n is not entry and self.depends(n, entry) and (exit_ is None or n is exit_ or not self.depends(n, exit_))
        ]

    def is_cut(self, entry: fx.Node, exit_: fx.Node) -> bool:
        """Does everything computed after `exit_` read the span through `exit_` alone?"""
        if not self.depends(exit_, entry):
            return False
        inside = set(self.made_from(entry, exit_)) - {exit_}
        after = (n for n in self.order if n is not exit_ and self.depends(n, exit_))
        return not any(s in inside and is_tensor(s) for n in after for s in n.all_input_nodes)


def _has_weights(node: fx.Node) -> bool:
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
    return node.op in ("call_function", "call_method") and any(word in name for word in _HAS_WEIGHTS)
