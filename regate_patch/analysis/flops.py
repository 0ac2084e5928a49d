"""How many floating-point operations the span of a captured graph costs, as an expression in B and S.

Counted: matrix products and attention, forward (a multiply and an add are two). Attention under an explicit mask is
counted in full, as kernels compute it; under `is_causal` half of it.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from regate_patch.analysis.graph import argument, expr, is_call, is_tensor, nodes_in, shape, value
from regate_patch.analysis.mixers import ADDED_PRODUCTS, EINSUM, LINEAR, PRODUCTS, SDPA, summed
from regate_patch.analysis.tokens import Tokens

_LENGTHS = (1024, 2048, 4096)


def _count(node: fx.Node, masked: bool) -> sympy.Expr:
    if not is_tensor(node):
        return sympy.Integer(0)
    if is_call(node, *SDPA):
        q, k = shape(argument(node, 0, "query")), shape(argument(node, 1, "key"))
        half = not masked and argument(node, 5, "is_causal", False) is True
        return (2 if half else 4) * sympy.prod(q) * k[-2]
    if is_call(node, *EINSUM):
        return 2 * sympy.prod(shape(node)) * sympy.prod(shape(of[0][0])[of[0][1]] for of in summed(node).values())
    if is_call(node, *LINEAR, *PRODUCTS, *ADDED_PRODUCTS) or "grouped_mm" in str(node.target):
        left = next(n for n in nodes_in(node.args[is_call(node, *ADDED_PRODUCTS) :]) if is_tensor(n))
        return 2 * sympy.prod(shape(node)) * shape(left)[-1]
    return sympy.Integer(0)


def polynomial(nodes: list[fx.Node], tokens: Tokens, *, masked: bool = False) -> tuple[int, int]:
    """(linear, quadratic): a row that computes n positions costs `linear * n + quadratic * n**2` FLOPs.

    Other sizes, such as the number of visual keys in cross-attention, count as what they were at capture. All attention
    counts in full if it will be `masked`.
    """
    n = sympy.Symbol("n", positive=True)
    total = sum((_count(node, masked) for node in nodes), start=sympy.Integer(0))
    total = total.subs({tokens.length: n} | ({tokens.batch: 1} if tokens.batch.is_Symbol else {}))
    total = total.subs(_sizes_at_capture(nodes, total.free_symbols - {n}))
    # Through three lengths of whole chunks: recurrences pad to chunks, so the cost as written is no polynomial.
    fitted = sympy.Poly(sympy.interpolate([(at, total.subs(n, at)) for at in _LENGTHS], n), n)
    return int(fitted.coeff_monomial(n)), int(fitted.coeff_monomial(n**2))


def _sizes_at_capture(nodes: list[fx.Node], symbols: set[sympy.Basic]) -> dict[sympy.Basic, int]:
    found: dict[sympy.Basic, int] = {}
    for size in (s for node in nodes if is_tensor(node) for s in value(node).shape if isinstance(s, torch.SymInt)):
        if (symbol := expr(size)) in symbols:
            found[symbol] = size.node.hint or 0
    return {symbol: found.get(symbol, 0) for symbol in symbols}
