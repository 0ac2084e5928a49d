"""Small questions about an FX graph as Dynamo captures it."""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree


def value(node: Any) -> Any:
    """What the node holds, with fake tensors: Dynamo's `example_value`."""
    return node.meta.get("example_value")


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor)


def is_scalar(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), (torch.SymInt, torch.SymBool, torch.SymFloat))


def expr(size: Any) -> sympy.Expr:
    """A size as an expression in the graph's symbols, equal symbols unified."""
    if isinstance(size, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        node = size.node
        return node.shape_env.replace(node.expr) if isinstance(node.expr, sympy.Basic) else node.expr
    return sympy.sympify(size)


def shape(node: Any) -> tuple[sympy.Expr, ...]:
    """The node's shape as expressions."""
    return tuple(expr(s) for s in value(node).shape)


def is_call(node: Any, *targets: Any) -> bool:
    """Is it a call of one of these functions, or of a method with one of these names?"""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return node.target in targets


def argument(node: Any, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def ancestors(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node the set of nodes it depends on, itself included, as a bit set over graph order."""
    reach: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        bits = 1 << position
        for source in node.all_input_nodes:
            bits |= reach[source]
        reach[node] = bits
    return reach


def where(node: fx.Node) -> str:
    """The node for an error message: its name, its op, its shape, and the model's source line."""
    text = f"`{node.name}` ({node.op} {getattr(node.target, '__name__', node.target)}"
    if is_tensor(node):
        text += f", shape [{', '.join(map(str, shape(node)))}]"
    text += ")"
    frames = re.split(r"^(?=\s*File )", node.meta.get("stack_trace") or "", flags=re.MULTILINE)
    models = [frame for frame in frames if "File " in frame and "/torch/" not in frame.splitlines()[0]]
    if models:
        text += "\n" + models[-1].rstrip()
    return text


def nodes_in(arguments: Any) -> Iterable[fx.Node]:
    """The nodes among (nested) arguments, slices included."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(arguments, note)
    return found


def frozen(x: Any, names: Mapping[fx.Node, Hashable]) -> Hashable:
    """Arguments of a call as something that can be compared: 1, 1.0 and True are three things. Nodes go by `names`."""
    if isinstance(x, fx.Node):
        return names.get(x, x)
    if isinstance(x, (tuple, list)):
        return (type(x).__name__, *(frozen(item, names) for item in x))
    if isinstance(x, dict):
        return ("dict", *((key, frozen(item, names)) for key, item in x.items()))
    if isinstance(x, slice):
        return ("slice", *(frozen(item, names) for item in (x.start, x.stop, x.step)))
    if isinstance(x, (int, float, complex, str, type(None))):
        return type(x), repr(x)
    return x if isinstance(x, Hashable) else id(x)


def writes_in_place(node: fx.Node) -> bool:
    """Does it change its first input? (`x[key] = v` aside, which returns nothing.)"""
    if not node.args or not is_tensor(node.args[0]):
        return False
    if node.op == "call_method":
        method = str(node.target)
        return method.endswith("_") and not method.endswith("__") and method != "requires_grad_"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_torch = node.target not in (operator.and_, operator.or_, operator.not_, operator.is_)
        return node.target in _IN_PLACE_OPERATORS or (in_torch and name.endswith("_") and not name.endswith("__"))
    return False


def sort_topologically(graph: fx.Graph) -> None:
    """Reorder so that every node stands after its inputs, otherwise keeping the order."""
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        pending = [node]
        while pending:
            top = pending[-1]
            waiting = [source for source in top.all_input_nodes if source not in done]
            if waiting:
                pending.extend(waiting)
                continue
            pending.pop()
            if top not in done:
                done.add(top)
                if top is not node:
                    node.prepend(top)


def erase_dead(graph: fx.Graph) -> None:
    """Remove calls whose value nobody reads, but no in-place write."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr" or is_scalar(node) or is_tensor(node) or _holds_tensors(node):
            if not is_call(node, *_EFFECTS) and not writes_in_place(node):
                graph.erase_node(node)


def _holds_tensors(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(value(node))
    return bool(leaves) and all(isinstance(x, (torch.Tensor, torch.SymInt, int)) for x in leaves)


_EFFECTS = (operator.setitem, torch._C._set_grad_enabled)

_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
    operator.ixor, operator.ifloordiv, operator.ipow,
}  # fmt: skip
