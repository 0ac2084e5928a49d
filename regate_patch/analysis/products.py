"""Matrix products, by whatever call they are made."""

from __future__ import annotations

import operator

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from regate_patch.analysis.graph import is_call, is_tensor, nodes_in, shape

LINEAR = (F.linear, torch._C._nn.linear)
PRODUCTS = (torch.matmul, operator.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__")  # f(a, b)
ADDED_PRODUCTS = (torch.addmm, torch.baddbmm, "addmm", "baddbmm")  # f(added, a, b)
EINSUM = (torch.einsum,)


def flops(node: fx.Node) -> sympy.Expr:
    """Of a product, a multiply and an add counted as two; 0 for anything else."""
    if is_call(node, *EINSUM):
        return 2 * sympy.prod(shape(node)) * sympy.prod(shape(of[0][0])[of[0][1]] for of in summed(node).values())
    if not is_call(node, *LINEAR, *PRODUCTS, *ADDED_PRODUCTS) and "grouped_mm" not in str(node.target):
        return sympy.Integer(0)
    left = next(n for n in nodes_in(node.args[is_call(node, *ADDED_PRODUCTS) :]) if is_tensor(n))
    return 2 * sympy.prod(shape(node)) * shape(left)[-1]


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
