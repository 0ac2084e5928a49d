"""Pass: run the span on active positions: gather what goes in, scatter what comes out.

Terms
    live-in     a value that the span reads and does not make: rotary cos and sin, masks, per-layer inputs.
    token axis  an axis of size S. A live-in is gathered along each of its token axes.
    chosen axis an axis with one entry per True of a boolean token mask (deepstack features, [N, D]).
    K           the number of active positions, which replaces S in every size that the span computes with.

Pseudo-code
    x = gather(entry); for every live-in: gather it, or rebuild it from gathered values and K
    run the span's own nodes on these; hide the filling of short rows from every attention in it
    what is read outside: exit as scatter(entry, exit); any other per-token value as scatter(zeros, value)
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch import fx

from regate_patch import ops
from regate_patch.analysis.blocks import Span
from regate_patch.analysis.graph import (
    argument,
    expr,
    frozen,
    is_call,
    is_scalar,
    is_tensor,
    shape,
    sort_topologically,
    value,
    where,
)
from regate_patch.analysis.mixers import PAD, SDPA, attends_to_tokens, is_attention
from regate_patch.analysis.refusals import chooses_positions, chosen_axes
from regate_patch.analysis.tokens import Tokens
from regate_patch.errors import UnsupportedGraphError

_VIEWS = (
    operator.getitem, "unsqueeze", "squeeze", "transpose", "permute", "expand", "view", "reshape", "t",
)  # fmt: skip
ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, torch.sym_max,
    torch.sym_min, torch.sym_int, torch.sym_sum,
)  # fmt: skip


def insert(
    gm: fx.GraphModule,
    span: Span,
    tail: Span | None,
    tokens: Tokens,
    *,
    outer: type[Inserter] | None = None,
    inner: type[Inserter] | None = None,
) -> fx.GraphModule:
    """See the module's description. Adds inputs in front: which positions are active, as `outer` wants to be told.

    With a `tail` (`analysis.tail`) on fewer of the active positions, then which of these are read, for `inner`.

    Raises:
        UnsupportedGraphError: a value whose token axis cannot be followed.
    """
    graph = gm.graph
    nested = _insert_tail(graph, tail, tokens, inner or Inserter) if tail else []
    inserter = (outer or Inserter)(graph, span, tokens, "active")
    inserter.compact |= set(nested)
    done = set(tail.nodes) if tail else set()
    inserter.insert([n for n in graph.nodes if n in inserter.compact and n not in done])
    sort_topologically(graph)
    for node in graph.nodes:
        if node not in inserter.compact:
            node.meta.pop("checkpoint", None)
    graph.lint()
    return gm


def _insert_tail(graph: fx.Graph, tail: Span, tokens: Tokens, kind: type[Inserter]) -> list[fx.Node]:
    """Run the tail on positions that are read; the nodes that this put in are the outer span's."""
    before = set(graph.nodes)
    inserter = kind(graph, tail, tokens, "read")
    inserter.insert(tail.nodes)
    new = [n for n in graph.nodes if n not in before and n.op != "placeholder"]
    for node in reversed(new):  # recomputed together with what reads it
        regions = {user.meta.get("checkpoint") for user in node.users if user in inserter.compact}
        if len(regions) == 1 and (region := regions.pop()) is not None:
            node.meta["checkpoint"] = region
    return new


class Inserter:
    """Each row computes positions of its own.

    Attributes:
        index, valid: [B, K] as in `Active`.
        count: K.
    """

    def __init__(self, graph: fx.Graph, span: Span, tokens: Tokens, name: str) -> None:
        self.graph, self.span, self.tokens = graph, span, tokens
        self.compact = set(span.nodes)
        self.made: dict[Any, fx.Node] = {}
        self.index, self.valid = self.told(name)
        with self.behind_inputs():
            self.count = graph.call_method("size", (self.index, 1))
        self.cut: dict[fx.Node, sympy.Expr] = {}  # values without the padding that their captured shape still has
        self.chosen = chosen_axes(span, tokens)
        self.chooses = any(chooses_positions(node, tokens) for node in span.nodes)

    def told(self, name: str) -> tuple[fx.Node, fx.Node]:
        """`index` and `valid`, from new inputs in front."""
        index, valid = self.inputs(f"{name}_index", f"{name}_valid")
        return index, valid

    def inputs(self, *names: str) -> list[fx.Node]:
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            return [self.graph.placeholder(name) for name in names]

    def behind_inputs(self) -> AbstractContextManager[None]:
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        return self.graph.inserting_after(last)  # sorted at the end

    def insert(self, nodes: list[fx.Node]) -> None:
        """Run these nodes, in graph order, on positions at `index`."""
        attending = {m for m in self.span.mixers if is_attention(m) and attends_to_tokens(m, self.tokens)}
        for node in nodes:
            self.enter(node)
            if node in attending:
                self.attend(node)
        inside = set(self.compact)
        for node in nodes:
            readers = [user for user in node.users if user not in inside and user not in self.compact]
            if readers:
                result = self.full_length(node)
                for user in readers:
                    user.replace_input_with(node, result)

    # -- out of the span ------------------------------------------------------------------------------

    def full_length(self, node: fx.Node) -> fx.Node:
        """`node` as it is read outside the span: at all S positions."""
        if not is_tensor(node):
            return self.scalar_outside(node)
        sizes, entry = shape(node), self.span.entry
        axes = self.tokens.on(node)
        if not self.tokens.mentioned_by(node) and not value(node).is_floating_point():
            return node  # a record of what was computed, such as the outlier columns of an 8-bit product
        with self.graph.inserting_after(node):
            if sizes == shape(entry) and value(node).dtype == value(entry).dtype:
                dim, batch_dim = axes[0], self.batch_axis(entry, entry)[0]
                x = self.made[("gather", entry, (dim,), batch_dim, len(sizes))]
                laid = self.laid(entry, (dim,), batch_dim, len(sizes), x)
                result = self.graph.call_function(
                    ops.scatter_tokens, (laid, self.index, self.valid, node, x, dim, batch_dim)
                )
                result = self.in_rows(result, dim, batch_dim)
            elif len(axes) == 1 and (rows := self.rows_before(node, axes[0])) is not None:
                args = (node, self.index, self.valid, self.total, axes[0], rows)
                result = self.in_rows(self.graph.call_function(ops.scatter_on_zeros, args), axes[0], rows)
            elif sizes[0] == self.tokens.batch * self.tokens.length and not axes:
                result = self.graph.call_function(ops.scatter_flat_on_zeros, (node, self.index, self.valid, self.total))
            else:
                raise UnsupportedGraphError(
                    "the decoder returns a value, made inside its blocks, that has no meaning at positions that are "
                    "not computed; call it with use_cache=False, output_attentions=False: " + where(node)
                )
        result.meta |= {k: v for k, v in node.meta.items() if k in ("example_value", "stack_trace")}
        return result

    def rows_before(self, node: fx.Node, dim: int) -> int | None:
        """The axis of the batch, if that of tokens follows it, as in [B, S, D] or a stack [N, B, S, D]; not of keys."""
        sizes, batch = shape(node), self.tokens.batch
        return dim - 1 if batch in sizes and sizes.index(batch) == dim - 1 else None

    def scalar_outside(self, node: fx.Node) -> fx.Node:
        if is_scalar(node) and expr(value(node)) == self.tokens.length:
            return self.length
        raise UnsupportedGraphError(f"the decoder returns something other than per-token values: {where(node)}")

    @property
    def length(self) -> fx.Node:
        """S, at run time."""
        if "length" not in self.made:
            entry = self.span.entry
            axis = shape(entry).index(self.tokens.length)
            with self.graph.inserting_after(entry):
                self.made["length"] = self.graph.call_method("size", (entry, axis))
        return self.made["length"]

    @property
    def total(self) -> fx.Node:
        """Of the axis on which active positions are counted, at run time."""
        return self.length

    def laid(self, v: fx.Node, dims: tuple[int, ...], batch_dim: int, rank: int, user: fx.Node) -> fx.Node:
        """`v` as it is gathered from."""
        return v

    def in_rows(self, result: fx.Node, dim: int, batch_dim: int) -> fx.Node:
        """What was scattered, as it is read outside the span."""
        return result

    # -- into the span --------------------------------------------------------------------------------

    def enter(self, node: fx.Node) -> None:
        """Replace everything that `node` reads from outside by its compact form."""
        if is_call(node, "masked_scatter") and not set(node.args[1:]) & self.compact:
            self.scatter_by_mask(node)
            return
        if is_call(node, "view", "reshape"):
            self.cut_padding(node)
        self.follow_cut(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda v: self.compacted(v, node))
        node.args, node.kwargs = args, kwargs

    def cut_padding(self, node: fx.Node) -> None:
        """`x.view(B, S, ...)` of a padded x: at capture S was whole chunks and nothing had to be cut; K is not."""
        x, *sizes = node.args
        for axis, (size, wanted) in enumerate(zip(shape(x), sizes, strict=False)):
            if self.tokens.pads(size) and is_scalar(wanted) and expr(value(wanted)) == self.tokens.length:
                with self.graph.inserting_before(node):
                    x = self.graph.call_method("narrow", (x, axis, 0, self.count))
                x.meta |= {k: m for k, m in node.meta.items() if k in ("checkpoint", "stack_trace")}
                x.meta["example_value"] = value(node.args[0])
                self.compact.add(x)
                self.cut[x] = size
        node.args = (x, *node.args[1:])

    def follow_cut(self, node: fx.Node) -> None:
        """After the cut, a size that is written as the padded one is K."""
        padded = {self.cut[source] for source in node.all_input_nodes if source in self.cut}
        if not padded or not is_tensor(node) or is_call(node, *PAD):
            return

        def shortened(v: fx.Node) -> fx.Node:
            return self.count if is_scalar(v) and expr(value(v)) in padded else v

        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), shortened)
        if size := padded & set(shape(node)):
            self.cut[node] = size.pop()

    def scatter_by_mask(self, node: fx.Node) -> None:
        """`x.masked_scatter(mask, source)` with a live-in source, which lists values for the mask's tokens."""
        x, mask, source = (n for n in node.args if isinstance(n, fx.Node))
        sizes = shape(mask)
        if sizes[:2] != (self.tokens.batch, self.tokens.length) or len(sizes) != len(shape(x)):
            raise UnsupportedGraphError(f"a masked_scatter whose mask is not [B, S, ...]: {where(node)}")
        node.op, node.target = "call_function", ops.masked_scatter_tokens
        node.args = (self.compacted(x, node), self.laid(mask, (1,), 0, len(sizes), node), source, self.index)

    def compacted(self, v: fx.Node, user: fx.Node) -> fx.Node:
        """`v` as `user`, inside a block, must see it."""
        v = self.canonical(v)
        if v in self.compact:
            return v
        if is_scalar(v):
            return self.lowered(v)
        if not is_tensor(v):
            return v if not self.tokens.mentioned_by(v) else self.rebuilt(v)
        sizes = shape(v)
        if not any(map(self.mentions, sizes)):
            return v
        axes = self.tokens.on(v)
        others = [d for d, size in enumerate(sizes) if d not in axes and self.mentions(size)]
        chosen = [d for d in others if sizes[d] in self.chosen]
        if len(chosen) == len(others) == 1 and not axes:
            return self.selected(v, chosen[0], user)
        if others:
            return self.rebuilt(v)
        gathered = self.gathered(v, tuple(axes), user)
        if self.chooses and value(v).dtype == torch.bool and len(axes) == 2:
            return self.without_filling(gathered, user)
        if value(v).dtype == torch.bool and user.target in (operator.getitem, ops.write, "masked_scatter"):
            return self.make(("valid", gathered), user, ops.only_valid, (gathered, self.valid), v)
        return gathered

    def without_filling(self, mask: fx.Node, user: fx.Node) -> fx.Node:
        """An attention mask under which a sparse attention cannot choose the filling of short rows."""
        if is_call(user, "masked_fill") and user.args[1] is not mask:  # True where hidden
            return self.make(("choose", mask), user, ops.choose_no_filling, (mask, self.valid), mask)
        return self.hidden(mask, user)

    def gathered(self, v: fx.Node, axes: tuple[int, ...], user: fx.Node) -> fx.Node:
        batch_dim, rank = self.batch_axis(v, user)
        dims = tuple(d + rank - len(shape(v)) for d in axes)
        laid = self.laid(v, dims, batch_dim, rank, user)
        key = ("gather", v, dims, batch_dim, rank)
        return self.make(key, user, ops.gather_tokens, (laid, self.index, dims, batch_dim, rank), v)

    def selected(self, v: fx.Node, dim: int, user: fx.Node) -> fx.Node:
        mask = self.chosen[shape(v)[dim]]
        args = (v, self.laid(mask, (1,), 0, 2, user), self.index, self.valid, dim)
        return self.make(("select", v, dim, mask), user, ops.select_tokens, args, v)

    def make(self, key: Any, user: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        if key not in self.made:
            with self.graph.inserting_before(user):
                node = self.graph.call_function(target, args)
            node.meta["stack_trace"] = like.meta.get("stack_trace")
            node.meta["example_value"] = value(like)  # at full length: shapes are read before compaction
            self.compact.add(node)
            self.made[key] = node
        return self.made[key]

    def batch_axis(self, v: fx.Node, user: fx.Node) -> tuple[int, int]:
        """(axis of the batch, rank) under which `v` is gathered, such that `user` can broadcast it."""
        sizes = shape(v)
        for d, size in enumerate(sizes):
            if size != self.tokens.length and self.tokens.is_batch(value(v).shape[d]):
                return d, len(sizes)
        aligned = shape(user) if is_tensor(user) else ()
        if is_call(user, *SDPA):
            aligned = shape(argument(user, 0, "query"))
        if len(aligned) >= len(sizes) and self.tokens.batch in aligned:
            batch_dim = aligned.index(self.tokens.batch)
            own = batch_dim - (len(aligned) - len(sizes))
            if own < 0 or sizes[own] == 1:
                return batch_dim, len(aligned)
        if sizes[0] == 1:
            return 0, len(sizes)
        raise UnsupportedGraphError(
            f"a value with a token axis but no batch axis, read where none can be given to it: {where(v)}\n"
            f"read by {where(user)}"
        )

    # -- sizes ----------------------------------------------------------------------------------------

    def mentions(self, size: sympy.Expr) -> bool:
        return bool(size.free_symbols & ({self.tokens.length} | set(self.chosen)))

    def lowered(self, v: fx.Node) -> fx.Node:
        """A number computed from S, computed from K instead."""
        e = expr(value(v))
        if not (isinstance(e, sympy.Basic) and self.mentions(e)):
            return v
        if e == self.tokens.length:
            return self.count
        if is_call(v, *ARITHMETIC):
            if v not in self.made:
                if is_call(v, operator.mod):  # padding up to whole chunks takes up what is left out
                    left_out = self.scalar(operator.sub, (self.length, self.count), v)
                    self.made[v] = self.scalar(operator.add, (v, left_out), v)
                else:
                    self.made[v] = self.scalar(v.target, fx.map_arg(v.args, self.lowered), v)
            return self.made[v]
        raise UnsupportedGraphError(f"a number that depends on the sequence length in an unknown way: {where(v)}")

    def scalar(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        with self.graph.inserting_after(self.count):  # sorted at the end
            node = self.graph.create_node("call_function", target, args)
        node.meta["example_value"] = value(like)
        self.compact.add(node)
        return node

    def rebuilt(self, v: fx.Node) -> fx.Node:
        """`v` made again inside the block from compact inputs: for axes that only contain S, such as B*S."""
        if v.op not in ("call_function", "call_method") or is_call(v, ops.write, ops.after):
            raise UnsupportedGraphError(
                f"an axis of this value depends on the sequence length {self.tokens.length}, but is not it, and "
                f"cannot be made again from values whose token axis is known: {where(v)}"
            )
        if v not in self.made:
            args, kwargs = fx.map_arg((v.args, v.kwargs), lambda a: self.compacted(a, v))
            with self.graph.inserting_after(v):
                node = self.graph.create_node(v.op, v.target, args, kwargs)
            node.meta |= {k: m for k, m in v.meta.items() if k != "checkpoint"}
            self.compact.add(node)
            self.made[v] = node
        return self.made[v]

    def canonical(self, v: fx.Node) -> fx.Node:
        """The first of equal views of one value: models unsqueeze the same cos in every layer."""
        if v in self.compact or not is_call(v, *_VIEWS) or not is_tensor(v):
            return v
        key = ("view", v.target, frozen(fx.map_arg(v.args, self.canonical), {}), frozen(v.kwargs, {}))
        return self.made.setdefault(key, v)

    # -- attention ------------------------------------------------------------------------------------

    def attend(self, core: fx.Node) -> None:
        """Keep the filling of short rows out of an attention's keys."""
        if not is_call(core, *SDPA):
            scores = core.args[0]
            sinks = int(shape(core)[-1] - self.tokens.length)
            core.args = (self.hidden(scores, core, sinks), *core.args[1:])
            return
        mask, causal = argument(core, 3, "attn_mask"), argument(core, 5, "is_causal", False)
        if mask is None and causal is True:
            return  # the filling stands last, where causal order hides it
        if is_call(mask, ops.hide_filling):
            return
        hidden = self.hidden(mask, core)
        if len(core.args) > 3:
            core.args = (*core.args[:3], hidden, *core.args[4:])
        else:
            core.kwargs = {**core.kwargs, "attn_mask": hidden}

    def hidden(self, mask: Any, core: fx.Node, sinks: int = 0) -> fx.Node:
        rank = len(shape(mask if mask is not None else argument(core, 0, "query")))
        key = ("hidden", mask, rank)
        args = (mask, self.valid, rank, sinks)
        node = self.make(key, core, ops.hide_filling, args, mask if mask is not None else core)
        if mask is not None and "checkpoint" in mask.meta:
            node.meta["checkpoint"] = mask.meta["checkpoint"]
        return node
