"""Find the attention and MLP blocks of a captured decoder, by operations and data flow alone.

Terms
    core        where tokens meet: scaled dot-product attention, or softmax between two matrix products.
    token axis  an axis whose size is the sequence symbol S, read off a core's query.
    stream      the residual stream: the value that blocks read and add to.
    block       input X on the stream, output J on the stream, and the nodes between them.
    joint       the addition that ends a block: J = X + f(X), where the way from X to the addition past f
                changes nothing but scale or type.

Pseudo-code
    for each core: J = the first addition after it that joins it to one of its own ancestors X
    attention block: X .. J             MLP block: from J to the next attention block's X
    after the last attention block: joints that follow, each with a matrix product in it
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from regate_patch.errors import UnsupportedGraphError
from regate_patch.graph import ancestors, argument, is_call, is_tensor, shape, value, where

SDPA = (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)
_SOFTMAX = (F.softmax, torch.softmax, "softmax", torch.special.softmax)
_MATMUL = (
    torch.matmul,
    operator.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    "matmul",
    "bmm",
    "__matmul__",
)
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SAME_VALUE = (
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
    cores: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class Tokens:
    """How this graph writes its batch and sequence lengths (expressions; `batch` may be a number)."""

    batch: sympy.Expr
    length: sympy.Symbol


def find_cores(gm: fx.GraphModule) -> list[fx.Node]:
    """Attention cores in graph order."""
    return [n for n in gm.graph.nodes if is_call(n, *SDPA) or _is_softmax_core(n)]


def find_tokens(cores: list[fx.Node]) -> Tokens:
    """The batch and sequence symbols of the graph that holds these cores.

    Raises:
        UnsupportedGraphError: the sequence length became a constant while tracing, or the cores disagree.
    """
    found = set()
    for core in cores:
        batch, *_, length, _ = shape(query(core))
        if not length.is_Symbol:
            raise UnsupportedGraphError(
                f"the query of this attention has length {length}, a fixed or derived number where the sequence length "
                f"itself was expected, so its token axis cannot be followed: {where(core)}"
            )
        found.add((batch, length))
    if len(found) > 1:
        lengths = ", ".join(str(tuple(f)) for f in found)
        raise UnsupportedGraphError(
            f"attentions over different (batch, length) in one graph: {lengths}; patch the text decoder alone"
        )
    return Tokens(*found.pop())


def query(core: fx.Node) -> Any:
    """The node whose next-to-last axis is the core's queries: q of SDPA, the scores of a softmax."""
    return argument(core, 0, "query") if is_call(core, *SDPA) else core.args[0]


def _is_softmax_core(node: fx.Node) -> bool:
    """A softmax over keys: a matrix product made its scores, and a matrix product reads its result."""
    if not is_call(node, *_SOFTMAX) or not is_tensor(node) or value(node).dim() < 3:
        return False
    sizes = shape(node)
    return (
        not sizes[-1].is_number
        and _reaches(node.args[0], lambda n: n.all_input_nodes, _MATMUL)
        and _reaches(node, lambda n: list(n.users), _MATMUL)
    )


def _reaches(start: Any, step: Any, targets: tuple[Any, ...], limit: int = 12) -> bool:
    """Is there a call of `targets` within `limit` steps of values that keep the last axis?"""
    frontier, last = [start], shape(start)[-1]
    for _ in range(limit):
        if any(is_call(n, *targets) for n in frontier):
            return True
        frontier = [
            m
            for n in frontier
            for m in step(n)
            if is_call(m, *targets) or (is_tensor(m) and value(m).dim() >= 3 and shape(m)[-1] == last)
        ]
    return False


def find_blocks(gm: fx.GraphModule, cores: list[fx.Node], tokens: Tokens) -> list[Block]:
    """The blocks in graph order. See the module's description for the rules.

    Raises:
        UnsupportedGraphError: an attention core with no joint after it.
    """
    search = _Search(gm.graph, tokens)
    blocks: list[Block] = []
    for core in cores:
        if blocks and core in blocks[-1].nodes:
            blocks[-1].cores.append(core)
            continue
        entry, joint = search.joint_of(core)
        blocks.append(Block("attention", entry, joint, search.between(entry, joint), [core]))
    mlps = [search.mlp(a, b.entry) for a, b in zip(blocks, blocks[1:], strict=False)]
    merged: list[Block] = []
    for attention, mlp in zip(blocks, [*mlps, None], strict=True):
        merged.append(attention)
        if mlp is None or not mlp.nodes:
            continue
        if any(_has_weights(n) for n in mlp.nodes):
            merged.append(mlp)
        else:  # norms and dropouts between two attentions belong to the first
            attention.nodes += mlp.nodes
            attention.exit = mlp.exit
    while (tail := search.tail(merged[-1])) is not None:
        merged.append(tail)
    search.adopt_strays(merged)
    return merged


class _Search:
    def __init__(self, graph: fx.Graph, tokens: Tokens) -> None:
        self.order = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.order)}
        self.above = ancestors(graph)
        self.tokens = tokens

    def depends(self, node: Any, on: fx.Node) -> bool:
        return bool(self.above[node] >> self.position[on] & 1)

    def carries_tokens(self, node: Any) -> bool:
        return (
            is_tensor(node)
            and value(node).dtype.is_floating_point
            and self.tokens.length in shape(node)
            and value(node).dim() >= 3
        )

    def joint_of(self, core: fx.Node) -> tuple[fx.Node, fx.Node]:
        for node in self.order[self.position[core] + 1 :]:
            skip = self.skip_side(node, core)
            entry = self.walk_back(skip, lambda n: n is not core and self.depends(core, n)) if skip else None
            if entry is not None:
                return entry, node
        raise UnsupportedGraphError(
            "no residual addition follows this attention (searched every addition after it for one that joins "
            f"it to a value it was computed from): {where(core)}"
        )

    def skip_side(self, node: fx.Node, inner: fx.Node) -> Any:
        """Of an addition of two token-carrying values, one of which depends on `inner`: the other."""
        if not is_call(node, *_ADD) or len(node.args) < 2 or not self.carries_tokens(node):
            return None
        if not all(self.carries_tokens(a) for a in node.args[:2]):
            return None
        sides = [(a, b) for a, b in (node.args[:2], node.args[1::-1]) if self.depends(a, inner)]
        if len(sides) != 1 or shape(sides[0][1]) != shape(node):
            return None
        return sides[0][1]

    def walk_back(self, node: Any, is_goal: Any) -> fx.Node | None:
        """The nearest value behind `node`, through scalings and casts only, that `is_goal`."""
        while not is_goal(node):
            sources = [a for a in node.all_input_nodes if self.carries_tokens(a)]
            if not is_call(node, *_SAME_VALUE) or len(sources) != 1:
                return None
            node = sources[0]
        return node if self.carries_tokens(node) else None

    def between(self, entry: fx.Node, exit_: fx.Node, beside: Block | None = None) -> list[fx.Node]:
        """What lies between two stream values, and what runs beside: computed from `beside.entry`, not in it."""
        start = beside.entry if beside else entry
        taken = set(beside.nodes) if beside else set()
        return [
            n
            for n in self.order[self.position[start] + 1 : self.position[exit_] + 1]
            if n not in taken and self.depends(n, start) and self.depends(exit_, n)
        ]

    def mlp(self, previous: Block, exit_: fx.Node) -> Block:
        entry = previous.exit
        return Block("mlp", entry, exit_, [] if entry is exit_ else self.between(entry, exit_, previous))

    def tail(self, previous: Block) -> Block | None:
        """The next joint after a block's exit that has a matrix product in it."""
        end = previous.exit
        for node in self.order[self.position[end] + 1 :]:
            if not is_call(node, *_ADD) or len(node.args) < 2 or not self.depends(node, end):
                continue
            if not all(self.carries_tokens(a) for a in node.args[:2]):
                continue
            for skip, inner in (node.args[:2], node.args[1::-1]):
                if skip is inner or self.walk_back(skip, lambda n: n is end) is None:
                    continue
                nodes = self.between(end, node, previous)
                if self.depends(inner, previous.entry) and any(_has_weights(n) for n in nodes):
                    return Block("mlp", end, node, nodes)
        return None

    def adopt_strays(self, blocks: list[Block]) -> None:
        """Values computed from inside a block that do not lead to its exit (shared keys, router scores)."""
        owner = {n: b for b in blocks for n in b.nodes if n is not b.exit}
        known = set(owner) | {b.exit for b in blocks}
        for node in self.order:
            parents = [owner[s] for s in node.all_input_nodes if s in owner]
            if node in known or not parents:
                continue
            if node.op == "output":
                leak = next(s for s in node.all_input_nodes if s in owner)
                raise UnsupportedGraphError(
                    "the decoder returns a per-token value other than its hidden states, which has no meaning at "
                    "positions that are not computed; call it with use_cache=False, output_attentions=False: "
                    f"{where(leak)}"
                )
            owner[node] = parents[-1]
            parents[-1].nodes.append(node)
        for block in blocks:
            block.nodes.sort(key=self.position.__getitem__)


def _has_weights(node: fx.Node) -> bool:
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
    return node.op in ("call_function", "call_method") and any(word in name for word in _HAS_WEIGHTS)
