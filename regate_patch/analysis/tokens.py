"""Which symbols of a captured graph are its batch size and its sequence length, and what sizes say about them.

Terms
    token axis  an axis whose size is the sequence symbol S.
    padded axis an axis of S rounded up to a multiple, as chunked recurrences pad it: its size holds a `Mod` of S.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from regate_patch.analysis.graph import expr, is_tensor, shape, value, where
from regate_patch.errors import UnsupportedGraphError


@dataclass(frozen=True)
class Tokens:
    """How this graph writes its batch and sequence lengths (expressions; `batch` may be a number)."""

    batch: sympy.Expr
    length: sympy.Symbol

    def is_batch(self, size: Any) -> bool:
        """Equal to the batch size as an expression, or a symbol for the same number that no op has unified with it."""
        return _same(size, self.batch)

    def is_length(self, size: Any) -> bool:
        """The same of the sequence length."""
        return _same(size, self.length)

    def on(self, node: Any) -> list[int]:
        """The token axes of a tensor."""
        return [axis for axis, size in enumerate(shape(node)) if size == self.length]

    def carried_by(self, node: Any) -> bool:
        """Is it per-token data, as the residual stream is: a float of [..., S, ..., D], or of [B*S, D]?"""
        if not is_tensor(node) or not value(node).is_floating_point():
            return False
        flat = value(node).dim() == 2 and shape(node)[0] == self.batch * self.length
        return flat or (value(node).dim() >= 3 and bool(self.on(node)))

    def mentioned_by(self, node: Any) -> bool:
        """Does any size of the value contain S?"""
        leaves = pytree.tree_leaves(value(node))
        sizes = [s for x in leaves for s in (x.shape if isinstance(x, torch.Tensor) else [x])]
        return any(isinstance(s, torch.SymInt) and self.length in expr(s).free_symbols for s in sizes)

    def pads(self, size: sympy.Expr) -> bool:
        """Is the size that of a padded axis, or of a part of one?"""
        return self.length in size.free_symbols and size.has(Mod, PythonMod, FloorDiv, sympy.Mod, sympy.floor)

    def splits(self, size: sympy.Expr) -> bool:
        """Is it of an axis that was cut into blocks as it was? Padded ones hold a `Mod`, or round up: -(-S // 4)."""
        if size.has(Mod, PythonMod, sympy.Mod):
            return False
        parted = [division.args[0] for division in size.atoms(FloorDiv)]
        return any(not of.is_Add and (of / self.length).is_positive for of in parted)


def _same(size: Any, known: sympy.Expr) -> bool:
    e = expr(size)
    if e == known:
        return True
    if not isinstance(size, torch.SymInt) or not (e.is_Symbol and known.is_Symbol):
        return False
    env = size.node.shape_env
    hint = getattr(env, "optimization_hint", None) or partial(env.size_hint, allow_none=True)  # the name of old
    return bool(hint(e) == hint(known) is not None)


def find_tokens(gm: fx.GraphModule, mixers: list[tuple[fx.Node, fx.Node]]) -> Tokens:
    """The batch and sequence symbols: those of the queries whose length is an axis of what the graph returns.

    A decoder that holds a vision encoder has attentions over several lengths; only one of them is returned.

    Args:
        mixers: pairs of a mixer and the value [batch, ..., length, D] that goes into it.

    Raises:
        UnsupportedGraphError: the sequence length became a constant while tracing, or two lengths are returned.
    """
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    returned = {s for n in output.all_input_nodes if is_tensor(n) and value(n).dim() >= 3 for s in shape(n)[:-1]}
    found = Counter((shape(x)[0], shape(x)[-2]) for _, x in mixers)
    usable = [(batch, length) for batch, length in found if length.is_Symbol and length in returned]
    if not usable:
        mixer, x = mixers[0]
        raise UnsupportedGraphError(
            f"the query of this attention has length {shape(x)[-2]}: a fixed or derived number, or not an axis of what "
            f"the decoder returns (of sizes {', '.join(map(str, returned)) or 'none'}), so its token axis cannot be "
            f"followed: {where(mixer)}"
        )
    if len({length for _, length in usable}) > 1:
        lengths = ", ".join(map(str, usable))
        raise UnsupportedGraphError(
            f"the decoder returns values of more than one sequence length, (batch, length) {lengths}: patch the text "
            "decoder alone"
        )
    return Tokens(*max(usable, key=lambda pair: found[pair]))
