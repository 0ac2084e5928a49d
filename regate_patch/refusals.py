"""What a span may not contain: operations that would compute something else when positions are left out.

The definition that is kept: the span's result at active positions is that of the same layers run on the active
positions alone, in their order. Per-token operations and attention meet it by themselves. Causal recurrences meet
it too. What mixes tokens in another way, or lays them out in a way that cannot be followed, is refused.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Min

from regate_patch import ops
from regate_patch.blocks import Span
from regate_patch.errors import UnsupportedGraphError
from regate_patch.graph import argument, expr, is_call, is_scalar, is_tensor, nodes_in, shape, value, where
from regate_patch.mixers import (
    CONVOLUTION,
    PAD,
    SDPA,
    UNFOLD,
    attends_to_tokens,
    is_attention,
    is_recurrence,
    reorders,
)
from regate_patch.tokens import Tokens

_INDEXING = (operator.getitem, ops.write, "index_select", "gather", "take_along_dim", torch.gather)
_LIKE = (
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
    "new_zeros", "new_ones", "new_empty", "new_full",
)  # fmt: skip
_TOPK = (torch.topk, "topk")
_MASKING = ("masked_fill", operator.and_, torch.logical_and, "logical_and")


def chosen_axes(span: Span, tokens: Tokens) -> dict[sympy.Expr, fx.Node]:
    """Sizes of `x[mask]` with a boolean live-in mask [B, S], and the mask: they list the mask's tokens."""
    inside, chosen = set(span.nodes), {}
    for node in span.nodes:
        if not is_call(node, operator.getitem) or not is_tensor(node.args[0]):
            continue
        key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        mask: Any = key[0] if key else None
        if is_tensor(mask) and value(mask).dtype == torch.bool and mask not in inside:
            if value(mask).dim() == 2 and shape(mask)[1] == tokens.length and shape(node)[0].is_Symbol:
                chosen[shape(node)[0]] = mask
    return chosen


def chooses_positions(node: fx.Node, tokens: Tokens) -> bool:
    """Is it the choice of the best keys in a sparse attention?"""
    if not is_call(node, *_TOPK):
        return False
    size = shape(node.args[0])[argument(node, 2, "dim", -1)]
    return tokens.length in size.free_symbols


def check(span: Span, tokens: Tokens) -> None:
    """Go through the span's nodes.

    Raises:
        UnsupportedGraphError: names the first operation that cannot be computed on part of the positions.
    """
    checker = _Checker(span, tokens)
    for node in span.nodes:
        checker.check_order(node)
        if is_tensor(node):
            checker.check_sizes(node)
            checker.check_reduction(node)
            checker.check_indexing(node)


class _Checker:
    def __init__(self, span: Span, tokens: Tokens) -> None:
        self.tokens = tokens
        self.inside = set(span.nodes)
        self.mixers = set(span.mixers)
        self.reads = {s for n in span.nodes for s in n.all_input_nodes if s not in self.inside and is_tensor(s)}
        self.lists_tokens = {tokens.length, *chosen_axes(span, tokens)}

    def check_sizes(self, node: fx.Node) -> None:
        for size in shape(node):
            if self.tokens.length not in size.free_symbols or self.tokens.pads(size):
                continue
            grown = (size - self.tokens.length).is_number  # by the margin of a convolution
            whole = size.is_Symbol or size.is_Mul or size.is_Pow or grown or self.is_at_most_length(size)
            if not whole or (size.is_Mul and size.has(sympy.Add)):
                refuse(node, f"an axis of {size} is not made of whole tokens")

    def check_reduction(self, node: fx.Node) -> None:
        if not value(node).is_floating_point() or any(s.free_symbols & self.lists_tokens for s in shape(node)):
            return
        if _reads_form_only(node) or (node.users and all(map(_reads_form_only, node.users))):
            return
        if any(is_tensor(s) and value(s).is_floating_point() and self.tokens.on(s) for s in node.all_input_nodes):
            refuse(node, "it reduces over tokens")

    def check_order(self, node: fx.Node) -> None:
        if is_call(node, *_TOPK):
            self.check_topk(node)
        if is_attention(node) and node in self.mixers and not is_call(node, *SDPA):
            if attends_to_tokens(node, self.tokens) and shape(node)[0] != self.tokens.batch:
                refuse(node, "its scores do not have the batch as their first axis")
        if not is_recurrence(node, self.tokens):
            return
        if reorders(node):
            refuse(node, "it puts tokens in another order")
        causal = True
        if is_call(node, *CONVOLUTION):
            causal = self.is_causal_convolution(node)
        elif is_call(node, *UNFOLD):
            causal = _pads_left_only(node.args[0])
        if not causal:
            refuse(node, "its window reaches over tokens on both sides")

    def is_at_most_length(self, size: Any) -> bool:
        """Is it `min(number, S)`, which is `min(number, K)` on K positions?"""
        return isinstance(size, (Min, sympy.Min)) and self.tokens.length in size.args

    def check_topk(self, node: fx.Node) -> None:
        """The best keys of a sparse attention: those among the active ones, if there may be fewer of them."""
        if not chooses_positions(node, self.tokens):
            return
        scores, k = node.args[0], argument(node, 1, "k")
        adapts = is_scalar(k) and self.is_at_most_length(expr(value(k)))
        if shape(scores)[argument(node, 2, "dim", -1)] != self.tokens.length or not adapts:
            refuse(node, "it chooses among positions, or blocks of them")
        for mask in self.reads:
            if len(self.tokens.on(mask)) < 2:
                continue
            if value(mask).dtype != torch.bool or not all(
                is_call(user, *SDPA, *_MASKING) for user in mask.users if user in self.inside
            ):
                refuse(
                    node,
                    "it chooses among positions by a mask that is read in an unknown way; "
                    f"use attn_implementation='sdpa'; the mask is {where(mask)}",
                )

    def is_causal_convolution(self, node: fx.Node) -> bool:
        """Is the margin on the left alone, or cut off on the right?"""
        size, length = shape(node)[-1], self.tokens.length
        if size == length:
            return _pads_left_only(node.args[0])
        return all(is_call(user, operator.getitem) and _is_prefix(user.args[1], length) for user in node.users)

    def check_indexing(self, node: fx.Node) -> None:
        if not is_call(node, *_INDEXING):
            return
        for key in nodes_in((node.args[1:2], node.kwargs.get("index"))):
            if not is_tensor(key) or key in self.inside or value(key).dtype == torch.bool:
                continue
            if any(s.free_symbols & self.lists_tokens for s in shape(key)):
                refuse(node, f"it picks positions by number, from {where(key)}")


def _reads_form_only(node: fx.Node) -> bool:
    """Does it take shape, type or device from per-token data, and no number?"""
    if is_call(node, *_LIKE):
        return True
    return is_call(node, "to", "type_as") and len(node.args) > 1 and is_tensor(node.args[1])


def _pads_left_only(node: Any) -> bool:
    return is_call(node, *PAD) and argument(node, 1, "pad")[1] == 0


def _is_prefix(key: Any, length: sympy.Expr) -> bool:
    """Is it `[..., :S]`?"""
    last = key[-1] if isinstance(key, tuple) else key
    if not isinstance(last, slice) or last.start not in (None, 0) or last.step not in (None, 1):
        return False
    return is_scalar(last.stop) and expr(value(last.stop)) == length


def refuse(node: fx.Node, why: str) -> NoReturn:
    raise UnsupportedGraphError(f"this cannot be computed on part of the positions: {why}: {where(node)}")
