"""Values that count for nothing: they take part in the backward pass, which gives zeros to all that they come from.

A product with zero would not do, for zero times infinity is no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

Edge = tuple[Any, int]  # a node of autograd's graph, and which of its outputs


def tensors(tree: Any) -> list[Tensor | None]:
    """The leaves of what a module takes or gives, None for those that are no tensors."""
    return [leaf if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(tree)]


def edges(tree: Any) -> list[Edge | None]:
    """Where each leaf stands in the graph; None for those that need no gradient."""
    return [_edge(x) if x is not None and x.requires_grad else None for x in tensors(tree)]


def _edge(x: Tensor) -> Edge:
    found = get_gradient_edge(x)
    return found.node, found.output_nr


def behind(tree: Any) -> set[Edge]:
    """All that the leaves come from, and themselves."""
    found: set[Edge] = set()
    waiting = [edge for edge in edges(tree) if edge is not None]
    while waiting:
        edge = waiting.pop()
        if edge not in found:
            found.add(edge)
            waiting += [(node, number) for node, number in edge[0].next_functions if node is not None]
    return found


def leaf_of(edge: Edge) -> Tensor | None:
    """The parameter whose gradient is added up there, if it is one's."""
    found = getattr(edge[0], "variable", None)
    return found if isinstance(found, Tensor) else None


class _Weightless(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(x.shape, {"dtype": x.dtype, "device": x.device}) for x in others]
        return value.clone()  # a view could not be written to by who goes on with it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], *(torch.zeros(shape, **like) for shape, like in ctx.like)


def with_weightless(value: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`value` itself, in whose backward pass `others` get zeros."""
    return _Weightless.apply(value, *others)


def instead(tree: Any, old: Tensor, new: Tensor) -> Any:
    """The tree with `new` in the place of the leaf `old`."""
    return pytree.tree_map(lambda leaf: new if leaf is old else leaf, tree)
