"""Pass: per block, gather its inputs at the active positions and scatter its result onto the stream.

Terms
    live-in     a value that a block reads and no block makes: rotary cos and sin, masks, per-layer inputs.
    token axis  an axis of size S. A live-in is gathered along each of its token axes.
    chosen axis an axis with one entry per True of a boolean token mask (deepstack features, [N, D]).
    K           the number of active positions, which replaces S in every size that a block computes with.

Pseudo-code
    for each block, in order:
        x = gather(entry); for every live-in: gather it, or rebuild it from gathered values and K
        run the block's own nodes on these; hide the filling of short rows from every attention in it
        later readers of exit read scatter(entry, exit)
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from regate_patch import ops
from regate_patch.blocks import SDPA, Block, Tokens
from regate_patch.errors import UnsupportedGraphError
from regate_patch.graph import argument, expr, is_call, is_scalar, is_tensor, nodes_in, shape, value, where

_VIEWS = (
    operator.getitem, "unsqueeze", "squeeze", "transpose", "permute", "expand", "view", "reshape", "t",
)  # fmt: skip
_INDEXING = (operator.getitem, ops.write, "index_select", "gather", "take_along_dim", torch.gather)
_NEIGHBOURS = (
    F.conv1d, F.pad, torch.conv1d, torch.cumsum, torch.cumprod, torch.cummax, torch.roll, torch.flip, torch.diff,
    torch.sort, torch.topk, torch.logcumsumexp, "cumsum", "cumprod", "cummax", "roll", "flip", "diff", "unfold",
    "sort", "topk", "logcumsumexp",
)  # fmt: skip
_ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, torch.sym_max,
    torch.sym_min, torch.sym_int,
)  # fmt: skip


def insert(gm: fx.GraphModule, blocks: list[Block], tokens: Tokens) -> fx.GraphModule:
    """See the module's description. Adds the inputs `active_index` and `active_valid` in front.

    Raises:
        UnsupportedGraphError: a value whose token axis cannot be followed.
    """
    inserter = _Inserter(gm.graph, blocks, tokens)
    for block in blocks:
        inserter.insert(block)
    for node in gm.graph.nodes:
        if node not in inserter.compact:
            node.meta.pop("checkpoint", None)
    gm.graph.lint()
    return gm


class _Inserter:
    def __init__(self, graph: fx.Graph, blocks: list[Block], tokens: Tokens) -> None:
        self.graph, self.tokens = graph, tokens
        self.compact = {node for block in blocks for node in block.nodes}
        with graph.inserting_before(next(iter(graph.nodes))):
            self.index = graph.placeholder("active_index")
            self.valid = graph.placeholder("active_valid")
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            self.count = graph.call_method("size", (self.index, 1))
        self.last_scalar = self.count
        self.made: dict[Any, fx.Node] = {}
        self.chosen: dict[sympy.Expr, fx.Node] = {}

    # -- one block ------------------------------------------------------------------------------------

    def insert(self, block: Block) -> None:
        inside = set(block.nodes)
        entry_shape = shape(block.entry)
        if entry_shape != shape(block.exit):
            raise UnsupportedGraphError(
                f"a block changes the shape of the residual stream: {where(block.entry)} to {where(block.exit)}"
            )
        dim, batch_dim = entry_shape.index(self.tokens.length), self.batch_axis(block.entry, block.entry)[0]
        entry = self.made.get(("stream", block.entry), block.entry)
        for node in block.nodes:
            self.note_chosen(node)
            self.check(node)
            self.enter(node)
            if node in block.cores:
                self.hide_filling(node)
        with self.graph.inserting_after(block.exit):
            x = self.made[("gather", entry, (dim,), batch_dim, len(entry_shape))]
            result = self.graph.call_function(
                ops.scatter_tokens, (entry, self.index, self.valid, block.exit, x, dim, batch_dim)
            )
        result.meta |= {k: v for k, v in block.exit.meta.items() if k in ("example_value", "stack_trace")}
        self.made[("stream", block.exit)] = result
        for user in list(block.exit.users):
            if user is not result and user not in inside:
                user.replace_input_with(block.exit, result)

    def enter(self, node: fx.Node) -> None:
        """Replace everything that `node` reads from outside by its compact form."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda v: self.compacted(v, node))
        node.args, node.kwargs = args, kwargs

    def compacted(self, v: fx.Node, user: fx.Node) -> fx.Node:
        """`v` as `user`, inside a block, must see it."""
        v = self.canonical(v)
        if v in self.compact:
            return v
        if is_scalar(v):
            return self.lowered(v)
        if not is_tensor(v):
            return v if not self.mentions_tokens(v) else self.rebuilt(v)
        sizes = shape(v)
        if not self.mentions_tokens(v):
            return v
        axes = [d for d, size in enumerate(sizes) if size == self.tokens.length]
        others = [d for d, size in enumerate(sizes) if d not in axes and self.size_mentions_tokens(size)]
        chosen = [d for d in others if sizes[d] in self.chosen]
        if len(chosen) == len(others) == 1 and not axes:
            return self.selected(v, chosen[0], user)
        if others:
            return self.rebuilt(v)
        gathered = self.gathered(v, tuple(axes), user)
        if value(v).dtype == torch.bool and user.target in (operator.getitem, ops.write):
            return self.make(("valid", gathered), user, ops.only_valid, (gathered, self.valid), v)
        return gathered

    def gathered(self, v: fx.Node, axes: tuple[int, ...], user: fx.Node) -> fx.Node:
        batch_dim, rank = self.batch_axis(v, user)
        dims = tuple(d + rank - len(shape(v)) for d in axes)
        key = ("gather", v, dims, batch_dim, rank)
        return self.make(key, user, ops.gather_tokens, (v, self.index, dims, batch_dim, rank), v)

    def selected(self, v: fx.Node, dim: int, user: fx.Node) -> fx.Node:
        mask = self.chosen[shape(v)[dim]]
        args = (v, mask, self.index, self.valid, dim)
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
            if size != self.tokens.length and _same_size(value(v).shape[d], size, self.tokens.batch):
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

    def size_mentions_tokens(self, size: sympy.Expr) -> bool:
        return bool(size.free_symbols & ({self.tokens.length} | set(self.chosen)))

    def mentions_tokens(self, v: fx.Node) -> bool:
        leaves = torch.utils._pytree.tree_leaves(value(v))
        sizes = [s for x in leaves for s in (x.shape if isinstance(x, torch.Tensor) else [x])]
        return any(isinstance(s, torch.SymInt) and self.size_mentions_tokens(expr(s)) for s in sizes)

    def lowered(self, v: fx.Node) -> fx.Node:
        """A number computed from S, computed from K instead."""
        e = expr(value(v))
        if not (isinstance(e, sympy.Basic) and self.size_mentions_tokens(e)):
            return v
        if e == self.tokens.length:
            return self.count
        if is_call(v, *_ARITHMETIC):
            if v not in self.made:
                args = fx.map_arg(v.args, self.lowered)
                with self.graph.inserting_after(self.last_scalar):
                    self.made[v] = self.last_scalar = self.graph.create_node(v.op, v.target, args)
                self.made[v].meta["example_value"] = value(v)
                self.compact.add(self.made[v])
            return self.made[v]
        raise UnsupportedGraphError(f"a number that depends on the sequence length in an unknown way: {where(v)}")

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
        key = ("view", v.target, _frozen(fx.map_arg(v.args, self.canonical)), _frozen(dict(v.kwargs)))
        return self.made.setdefault(key, v)

    # -- what a block may contain -----------------------------------------------------------------------

    def note_chosen(self, node: fx.Node) -> None:
        """Remember `x[mask]` with a boolean live-in mask [B, S]: its first axis lists the mask's tokens."""
        if not is_call(node, operator.getitem) or not is_tensor(node.args[0]):
            return
        key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        mask: Any = key[0] if key else None
        if is_tensor(mask) and value(mask).dtype == torch.bool and mask not in self.compact:
            if value(mask).dim() == 2 and shape(mask)[1] == self.tokens.length and shape(node)[0].is_Symbol:
                self.chosen[shape(node)[0]] = mask

    def check(self, node: fx.Node) -> None:
        """Refuse what would compute something else when positions are left out."""
        if not is_tensor(node):
            return
        length = self.tokens.length
        for size in shape(node):
            if length in size.free_symbols and not (size.is_Symbol or size.is_Mul or size.is_Pow):
                self.refuse(node, f"an axis of {size} is not made of whole tokens")
            if size.is_Mul and size.has(sympy.Add, sympy.floor):
                self.refuse(node, f"an axis of {size} is not made of whole tokens")
        with_tokens = [
            s for s in node.all_input_nodes if is_tensor(s) and value(s).dtype.is_floating_point and length in shape(s)
        ]
        if with_tokens and value(node).dtype.is_floating_point and not self.mentions_tokens(node):
            self.refuse(node, "it reduces over tokens")
        if node.target in _NEIGHBOURS and with_tokens:
            dim = self.axis_of(node)
            if dim is None or shape(with_tokens[0])[dim] == length:
                self.refuse(node, "it mixes neighbouring tokens")
        if is_call(node, *_INDEXING):
            keys = nodes_in((node.args[1:2], node.kwargs.get("index")))
            for key in keys:
                if is_tensor(key) and key not in self.compact and self.mentions_tokens(key):
                    if value(key).dtype != torch.bool:
                        self.refuse(node, f"it picks positions by number, from {where(key)}")

    @staticmethod
    def axis_of(node: fx.Node) -> int | None:
        name = getattr(node.target, "__name__", node.target)
        if name in ("topk",):
            return argument(node, 2, "dim", -1)
        if name in ("conv1d", "pad", "unfold", "roll", "flip"):
            return -1 if name in ("conv1d", "pad") else None
        return argument(node, 1, "dim", -1)

    @staticmethod
    def refuse(node: fx.Node, why: str) -> None:
        raise UnsupportedGraphError(f"this cannot be computed on part of the positions: {why}: {where(node)}")

    def hide_filling(self, core: fx.Node) -> None:
        """Keep the filling of short rows out of an attention's keys."""
        if not is_call(core, *SDPA):
            scores = core.args[0]
            if shape(scores)[0] != self.tokens.batch:
                self.refuse(core, "its scores do not have the batch as their first axis")
            core.args = (self.hidden(scores, core), *core.args[1:])
            return
        mask, causal = argument(core, 3, "attn_mask"), argument(core, 5, "is_causal", False)
        if mask is None and causal is True:
            return  # the filling stands last, where causal order hides it
        hidden = self.hidden(mask, core)
        if len(core.args) > 3:
            core.args = (*core.args[:3], hidden, *core.args[4:])
        else:
            core.kwargs = {**core.kwargs, "attn_mask": hidden}

    def hidden(self, mask: Any, core: fx.Node) -> fx.Node:
        key = ("hidden", mask)
        node = self.make(key, core, ops.hide_filling, (mask, self.valid), mask if mask is not None else core)
        if mask is not None and "checkpoint" in mask.meta:
            node.meta["checkpoint"] = mask.meta["checkpoint"]
        return node


def _same_size(size: Any, e: sympy.Expr, batch: sympy.Expr) -> bool:
    """Equal as expressions, or two symbols that stand for the same number (not yet unified by any op)."""
    if e == batch:
        return True
    if not isinstance(size, torch.SymInt) or not (e.is_Symbol and batch.is_Symbol):
        return False
    hints = size.node.shape_env
    return bool(hints.size_hint(e, allow_none=True) == hints.size_hint(batch, allow_none=True) is not None)


def _frozen(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(_frozen(i) for i in x)
    if isinstance(x, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in x.items()))
    if isinstance(x, slice):
        return ("slice", _frozen((x.start, x.stop, x.step)))
    return x
