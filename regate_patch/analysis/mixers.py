"""Where tokens meet: the operations of a captured graph whose result at one position depends on others.

Terms
    core        attention: scaled dot-product attention, or softmax between two matrix products.
    recurrence  anything else that runs along the sequence: causal convolutions, cumulative sums, shifts, the padding
                with which chunked linear attention begins.
    mixer       either.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from regate_patch.analysis.graph import argument, is_call, is_tensor, nodes_in, shape, value
from regate_patch.analysis.tokens import Tokens

SDPA = (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SOFTMAX = (F.softmax, torch.softmax, "softmax", torch.special.softmax)
LINEAR = (F.linear, torch._C._nn.linear)
PRODUCTS = (torch.matmul, operator.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__")  # f(a, b)
ADDED_PRODUCTS = (torch.addmm, torch.baddbmm, "addmm", "baddbmm")  # f(added, a, b)
EINSUM = (torch.einsum,)
_CUMULATIVE = (
    torch.cumsum, torch.cumprod, torch.cummax, torch.cummin, torch.logcumsumexp,
    "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp",
)  # fmt: skip
CONVOLUTION = (F.conv1d, torch.conv1d)
PAD = (F.pad, torch._C._nn.pad, torch.nn.functional.pad)
UNFOLD = ("unfold",)
_REORDERING = (
    torch.roll, torch.flip, torch.diff, torch.sort, torch.argsort, "roll", "flip", "diff", "sort", "argsort",
)  # fmt: skip


def find_cores(gm: fx.GraphModule) -> list[fx.Node]:
    """Attention cores in graph order."""
    return [n for n in gm.graph.nodes if is_call(n, *SDPA) or _is_softmax_core(n)]


def is_attention(node: fx.Node) -> bool:
    return is_call(node, *SDPA, *_SOFTMAX)


def sdpa_arguments(core: fx.Node) -> dict[str, Any]:
    """The arguments of a scaled dot-product attention by their names; those that were not given are left out."""
    return {**dict(zip(_SDPA_ARGUMENTS, core.args, strict=False)), **core.kwargs}


def query(core: fx.Node) -> Any:
    """The node whose next-to-last axis is the core's queries: q of SDPA, the scores of a softmax."""
    return argument(core, 0, "query") if is_call(core, *SDPA) else core.args[0]


def attends_to_tokens(core: fx.Node, tokens: Tokens) -> bool:
    """Are the core's keys positions of the sequence? (Those of cross-attention are not.)"""
    if is_call(core, *SDPA):
        return shape(argument(core, 1, "key"))[-2] == tokens.length
    return shape(core)[-1] - tokens.length in (0, 1)  # one more: an attention sink


def sequence_candidates(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of a mixer and a value [batch, ..., length, D] in front of it, for finding S.

    Where there is no attention but a recurrence, every [batch, length, D] is a candidate.
    """
    cores = [(core, query(core)) for core in find_cores(gm)]
    if cores:
        return cores
    around = [n for n in gm.graph.nodes if is_call(n, *CONVOLUTION, *_CUMULATIVE, *PAD) and _is_stream_like(n.args[0])]
    return [(around[0], n) for n in gm.graph.nodes if _is_stream_like(n)] if around else []


def _is_stream_like(node: Any) -> bool:
    return is_tensor(node) and value(node).dim() == 3 and value(node).is_floating_point()


def find_mixers(gm: fx.GraphModule, tokens: Tokens) -> list[fx.Node]:
    """Cores whose queries are the sequence's positions, and recurrences over it, in graph order."""
    cores = set(find_cores(gm))
    return [
        n
        for n in gm.graph.nodes
        if (n in cores and tokens.length == shape(query(n))[-2]) or (n not in cores and is_recurrence(n, tokens))
    ]


def is_recurrence(node: fx.Node, tokens: Tokens) -> bool:
    """Does it run per-token data along the sequence, other than by attention?"""
    if _shifts(node, tokens):
        return True
    if not is_call(node, *CONVOLUTION, *_CUMULATIVE, *PAD, *UNFOLD, *_REORDERING):
        return False
    if not tokens.carried_by(node.args[0]):
        return False
    return any(axis in moved_axes(node) for axis in tokens.on(node.args[0]))


def _shifts(node: fx.Node, tokens: Tokens) -> bool:
    """Does it make a sequence whole that was cut off at an end? Then positions are given their neighbours' values."""
    if is_call(node, *PAD):
        parts, axes = [node.args[0]], moved_axes(node)
    elif is_call(node, torch.cat) and is_tensor(node):
        rank = value(node).dim()
        parts = [x for x in argument(node, 0, "tensors") if is_tensor(x) and value(x).dim() == rank]  # others are empty
        axes = {argument(node, 1, "dim", 0) % rank}
    else:
        return False
    return any(
        shape(node)[axis] == tokens.length and any((shape(part)[axis] - tokens.length).is_negative for part in parts)
        for axis in axes
    )


def reorders(node: fx.Node) -> bool:
    """Does it put values in an order of its own (so that no causal order is left)?"""
    return is_call(node, *_REORDERING)


def moved_axes(node: fx.Node) -> set[int]:
    """The axes (counted from the front) along which one of the operations above works."""
    rank = value(node.args[0]).dim()
    if is_call(node, *CONVOLUTION):
        return {rank - 1}
    if is_call(node, *PAD):
        amounts = argument(node, 1, "pad")
        pairs = zip(amounts[::2], amounts[1::2], strict=True)
        return {rank - 1 - i for i, pair in enumerate(pairs) if pair != (0, 0)}
    name = "dimension" if is_call(node, *UNFOLD) else "dim"
    dims = argument(node, 1, name, argument(node, 1, "dims", -1))
    if is_call(node, torch.roll, "roll"):
        dims = argument(node, 2, "dims")
    if dims is None:
        return set(range(rank))
    return {d % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,)) if isinstance(d, int)}


def _is_softmax_core(node: fx.Node) -> bool:
    """A softmax over keys: a matrix product made its scores, and a matrix product reads its result."""
    if not is_call(node, *_SOFTMAX) or not is_tensor(node) or value(node).dim() < 3:
        return False
    sizes, products = shape(node), (*PRODUCTS, *ADDED_PRODUCTS, *EINSUM)
    return (
        not sizes[-1].is_number
        and _reaches(node.args[0], lambda n: n.all_input_nodes, products)
        and _reaches(node, lambda n: list(n.users), products)
    )


def _reaches(start: Any, step: Any, targets: tuple[Any, ...], limit: int = 12) -> bool:
    """Is there a call of `targets` within `limit` steps of values that keep the last axis, sinks aside?"""
    frontier, last = [start], shape(start)[-1]
    kept = (last, last - 1)
    for _ in range(limit):
        if any(is_call(n, *targets) for n in frontier):
            return True
        frontier = [
            m
            for n in frontier
            for m in step(n)
            if is_call(m, *targets) or (is_tensor(m) and value(m).dim() >= 3 and shape(m)[-1] in kept)
        ]
    return False


def summed(node: fx.Node) -> dict[str, list[tuple[fx.Node, int]]]:
    """What an einsum sums over: for each letter that its result does not have, the operands that do, and at which axis.

    Nothing is known of one whose equation is no string.
    """
    found: dict[str, list[tuple[fx.Node, int]]] = {}
    if not isinstance(equation := node.args[0], str):
        return found
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    for x, letters in zip(nodes_in(node.args[1:]), inputs.split(","), strict=False):
        before, _, after = letters.partition("...")
        others = range(len(shape(x)) - len(before) - len(after), 0, -1)  # from the last, as they are broadcast
        for axis, letter in enumerate([*before, *(f"...{i}" for i in others), *after]):
            name = letter[:3]
            if name not in result if arrow else name != "..." and inputs.count(name) > 1:
                found.setdefault(letter, []).append((x, axis))
    return found
