"""Pass: rows of different lengths are laid end to end, so that products with weights run on active positions alone.

To the span the batch is then one row, of B * S positions of which T are active, whosever they are: what it reads from
outside is laid so before it is gathered (B becomes 1, S becomes B * S), and laid in rows again where it goes out.
Attention alone must know whose a position is: `regate_patch.attention.attend` is told where rows begin. So every
attention must be known to say "causal order" and nothing else, and nothing else may run along the sequence.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from regate_patch import attention, ops
from regate_patch.analysis.blocks import Span
from regate_patch.analysis.graph import argument, expr, is_call, is_tensor, shape, value, where
from regate_patch.analysis.mixers import SDPA, attends_to_tokens
from regate_patch.analysis.tokens import Tokens
from regate_patch.errors import UnsupportedGraphError
from regate_patch.passes.insert import ARITHMETIC, Inserter


class NotEndToEndError(UnsupportedGraphError):
    """Something in the graph needs rows of their own; the graph can still be rewritten with them."""


def can_be_laid(span: Span, tokens: Tokens) -> bool:
    """Is every place where tokens meet an attention in causal order, for which there is a kernel?"""
    some_rows = tokens.batch.is_Symbol or tokens.batch == 1
    return some_rows and all(_is_causal_attention(mixer, tokens) for mixer in span.mixers)


def _is_causal_attention(core: fx.Node, tokens: Tokens) -> bool:
    if not is_call(core, *SDPA) or not attends_to_tokens(core, tokens):
        return False
    query, of_value = argument(core, 0, "query"), argument(core, 2, "value")
    return (
        argument(core, 3, "attn_mask") is None
        and argument(core, 4, "dropout_p", 0.0) == 0.0
        and argument(core, 5, "is_causal", False) is True
        and value(query).dim() == 4
        and shape(query)[0] == tokens.batch
        and attention.serves(value(query), value(of_value))
    )


class Within(Inserter):
    """The tail, which is inside what is laid end to end: positions that are read, [R]."""

    def told(self, name: str) -> tuple[fx.Node, fx.Node]:
        (read,) = self.inputs(f"{name}_index")
        with self.behind_inputs():
            index = self.graph.call_method("unsqueeze", (read, 0))
        return index, self.all_of(index)

    def all_of(self, index: fx.Node) -> fx.Node:
        """No row is short, and so there is no filling."""
        with self.behind_inputs():
            return self.graph.call_function(ops.all_true, (index,))

    def compacted(self, v: fx.Node, user: fx.Node) -> fx.Node:
        if v not in self.compact and is_tensor(v) and not self.tokens.mentioned_by(v):
            if any(self.counts_rows(size) for size in value(v).shape):
                raise NotEndToEndError(f"a value per row: {where(v)}")
        return super().compacted(v, user)

    def counts_rows(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and (
            self.tokens.batch in expr(size).free_symbols or self.tokens.is_batch(size)
        )

    def lowered(self, v: fx.Node) -> Any:
        """With one row instead of B, too."""
        e = expr(value(v))
        if e == self.tokens.batch:
            return 1
        if self.mentions(e) or not self.counts_rows(value(v)):
            return super().lowered(v)
        if e.is_Symbol or not is_call(v, *ARITHMETIC):
            raise NotEndToEndError(f"a number that may depend on how many rows there are: {where(v)}")
        return self.scalar(v.target, fx.map_arg(v.args, self.lowered), v)


class EndToEnd(Within):
    """The span on all rows' active positions.

    Attributes:
        starts, longest: where rows begin among the T active positions, and the most that a row has.
    """

    def told(self, name: str) -> tuple[fx.Node, fx.Node]:
        rows, places, self.starts, self.longest = self.inputs("rows", "places", "starts", "longest")
        return self.one_row(rows, places)

    def one_row(self, rows: fx.Node, places: fx.Node) -> tuple[fx.Node, fx.Node]:
        with self.behind_inputs():
            index = self.graph.call_function(ops.in_one_row, (rows, places, self.length))
        return index, self.all_of(index)

    @property
    def rows(self) -> fx.Node:
        """B, at run time."""
        if "rows" not in self.made:
            entry = self.span.entry
            with self.graph.inserting_after(entry):
                self.made["rows"] = self.graph.call_method("size", (entry, self.batch_axis(entry, entry)[0]))
        return self.made["rows"]

    @property
    def total(self) -> fx.Node:
        """B * S."""
        if "total" not in self.made:
            with self.graph.inserting_after(self.length):
                self.made["total"] = self.graph.call_function(operator.mul, (self.rows, self.length))
        return self.made["total"]

    def laid(self, v: fx.Node, dims: tuple[int, ...], batch_dim: int, rank: int, user: fx.Node) -> fx.Node:
        if len(dims) != 1:
            raise NotEndToEndError(f"a value with two token axes: {where(v)}")
        key = ("laid", v, dims, batch_dim, rank)
        return self.make(key, user, ops.one_row, (v, self.rows, dims[0], batch_dim, rank), v)

    def in_rows(self, result: fx.Node, dim: int, batch_dim: int) -> fx.Node:
        with self.graph.inserting_after(result):
            return self.graph.call_function(ops.in_rows, (result, self.rows, dim, batch_dim))

    def attend(self, core: fx.Node) -> None:
        query, key, of_value = (argument(core, i, n) for i, n in enumerate(("query", "key", "value")))
        scale = argument(core, 6, "scale")
        core.op, core.target, core.kwargs = "call_function", attention.attend, {}
        core.args = (query, key, of_value, self.starts, self.longest, scale)
