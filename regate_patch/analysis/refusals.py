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
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.functions import Min

from regate_patch import ops
from regate_patch.analysis.blocks import Span
from regate_patch.analysis.graph import argument, expr, is_call, is_scalar, is_tensor, nodes_in, shape, value, where
from regate_patch.analysis.mixers import (
    ADDED_PRODUCTS,
    CONVOLUTION,
    EINSUM,
    LINEAR,
    PAD,
    PRODUCTS,
    SDPA,
    UNFOLD,
    attends_to_tokens,
    is_attention,
    is_recurrence,
    reorders,
    summed,
)
from regate_patch.analysis.tokens import Tokens
from regate_patch.errors import UnsupportedGraphError

_INDEXING = (operator.getitem, ops.write)  # x[key]
_INDEXING_ALONG = (  # f(x, dim, index)
    torch.gather, torch.scatter, torch.index_select, "gather", "scatter", "scatter_", "scatter_add", "scatter_add_",
    "index_select", "index_add", "index_add_", "index_copy", "index_copy_", "index_fill_", "take_along_dim",
)  # fmt: skip
_WINDOWS = (
    "pool", "conv2d", "conv3d", "conv_transpose", "interpolate", "batch_norm", "instance_norm", "renorm", "fft_",
)  # fmt: skip
_NORMALISING = {  # f(x, dim), by the name of f: the place of `dim`, and what it is if it is not given
    "softmax": (1, -1), "log_softmax": (1, -1), "softmin": (1, -1), "normalize": (2, 1),
}  # fmt: skip
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
            checker.check_sum(node)
            checker.check_window(node)
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
            if self.tokens.length not in size.free_symbols:
                continue
            if self.tokens.pads(size):
                if self.tokens.splits(size):
                    refuse(node, f"an axis of {size} is of blocks of tokens, chosen by number")
                continue
            grown = (size - self.tokens.length).is_number  # by the margin of a convolution
            whole = size.is_Symbol or size.is_Mul or size.is_Pow or grown or self.is_at_most_length(size)
            if not whole or (size.is_Mul and size.has(sympy.Add)):
                refuse(node, f"an axis of {size} is not made of whole tokens")

    def check_reduction(self, node: fx.Node) -> None:
        """To whole numbers, too, as `argmax` does; what `nonzero` finds is none of these, and has a size of its own."""
        if any(s.free_symbols & self.lists_tokens for s in shape(node)):
            return
        if not value(node).is_floating_point() and free_unbacked_symbols(value(node)):
            return
        if _reads_form_only(node) or (node.users and all(map(_reads_form_only, node.users))):
            return
        if self.lists_found(node):
            return
        sources = filter(is_tensor, _call_of(node).all_input_nodes)
        if any(value(s).is_floating_point() and self.tokens.on(s) for s in sources):
            refuse(_call_of(node), "it reduces over tokens")

    def lists_found(self, node: fx.Node) -> bool:
        """Is it `x[index]` of as many tokens as the span itself finds, such as those that go to one expert?

        By number they are what is computed; of several rows, [B*S, D], no token axis would be lost.
        """
        keys = nodes_in(node.args[1]) if is_call(node, operator.getitem) else ()
        return any(key in self.inside for key in keys) and bool(free_unbacked_symbols(value(node)))

    def check_sum(self, node: fx.Node) -> None:
        """Only attention hides the filling of short rows: no other product may sum over positions."""
        over_tokens: list[list[fx.Node]] = []  # for each sum, the operands that have the axis
        if is_call(node, *LINEAR, *PRODUCTS, *ADDED_PRODUCTS):
            x: Any = node.args[1 if is_call(node, *ADDED_PRODUCTS) else 0]
            over_tokens = [[x]] if is_tensor(x) and shape(x)[-1] == self.tokens.length else []
        elif is_call(node, *EINSUM):
            over_tokens = [[x for x, axis in of if self.is_tokens(x, axis)] for of in summed(node).values()]
        for operands in filter(None, over_tokens):
            if not any(map(self.is_attention_weight, operands)):
                refuse(node, "it sums over tokens, other than by attention")

    def is_tokens(self, x: fx.Node, axis: int) -> bool:
        """Is it an axis of one row's tokens?

        A list of all rows' tokens, as routers make it, has none by its size; in a batch of one row it is known by its
        place: the first.
        """
        in_list = axis == 0 and self.tokens.batch not in shape(x)[1:]
        return axis in self.tokens.on(x) and not in_list

    def is_attention_weight(self, node: Any, limit: int = 12) -> bool:
        """Was it made from an attention's softmax, through values that keep the axis of keys?"""
        frontier = [node]
        for _ in range(limit):
            if any(is_attention(n) and n in self.mixers for n in frontier):
                return True
            sources = [s for n in frontier for s in n.all_input_nodes if is_tensor(s) and value(s).dim()]
            frontier = [s for s in sources if shape(s)[-1] - self.tokens.length in (0, 1)]
        return False

    def check_window(self, node: fx.Node) -> None:
        """Operations that mix neighbours, or normalise over tokens, and keep the shape."""
        name = str(getattr(node.target, "__name__", node.target))
        source = next(filter(self.tokens.carried_by, node.all_input_nodes), None)
        if source is None:
            return
        if any(word in name for word in _WINDOWS):
            refuse(node, "it mixes tokens")
        if name == "group_norm" and any(axis > 0 for axis in self.tokens.on(source)):
            refuse(node, "it is normalised over tokens")
        if name in ("layer_norm", "rms_norm") and any(
            not is_tensor(n) and self.tokens.mentioned_by(n) for n in nodes_in(argument(node, 1, "normalized_shape"))
        ):
            refuse(node, "it is normalised over tokens")
        if name in _NORMALISING and node not in self.mixers:
            place, default = _NORMALISING[name]
            dim = argument(node, place, "dim", default)
            if isinstance(dim, int) and shape(source)[dim] == self.tokens.length:
                refuse(node, "it is normalised over tokens, and is no attention")

    def check_order(self, node: fx.Node) -> None:
        if is_call(node, *_TOPK):
            self.check_topk(node)
        if is_attention(node) and node in self.mixers and not is_call(node, *SDPA):
            if attends_to_tokens(node, self.tokens) and shape(node)[0] != self.tokens.batch:
                refuse(node, "its scores do not have the batch as their first axis")
        if is_call(node, *SDPA) and not attends_to_tokens(node, self.tokens):
            if self.tokens.length in shape(argument(node, 1, "key"))[-2].free_symbols:
                refuse(node, "it sees keys that are no positions beside those that are")
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
        if is_call(node, *_INDEXING):
            keys = nodes_in(node.args[1])
        elif is_call(node, *_INDEXING_ALONG):
            dim, index = argument(node, 1, "dim", -1), argument(node, 2, "index")
            size = shape(node.args[0])[dim] if isinstance(dim, int) else self.tokens.length
            keys = nodes_in(index) if size.free_symbols & self.lists_tokens else ()
        else:
            return
        for key in keys:
            if (numbers := self.position_numbers(key)) is not None:
                refuse(node, f"it picks positions by number, from {where(numbers)}")

    def position_numbers(self, key: Any) -> fx.Node | None:
        """The whole numbers per token, made outside the span, that an index was made of.

        A list of all rows' tokens, such as `arange(B*S)`, is made again from K and numbers what is computed.
        """
        pending, seen = [key], set()
        while pending:
            node = pending.pop()
            if node in seen or not is_tensor(node):
                continue
            if value(node).is_floating_point() or value(node).dtype == torch.bool:
                continue
            if node not in self.inside and any(s in self.lists_tokens or self.tokens.pads(s) for s in shape(node)):
                return node
            seen.add(node)
            pending.extend(node.all_input_nodes)
        return None


def _call_of(node: fx.Node) -> fx.Node:
    """The call of which a value is one of several results, as of `max(1)`; else the node itself."""
    source = node.args[0] if is_call(node, operator.getitem) else None
    return source if isinstance(source, fx.Node) and not is_tensor(source) else node


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
