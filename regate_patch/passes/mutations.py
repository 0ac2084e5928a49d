"""Pass: give every in-place write a name, so that data flow alone tells what depends on it.

Terms
    write   a node that changes one of its inputs: `x[key] = v`, `x.add_(v)`, `x.index_add_(...)`.
    alias   a value that shares memory with another: a view of it, or its base.

Pseudo-code
    for each write to t, in order:
        turn `x[key] = v` into an expression that returns x
        later readers of t read the write's result instead
        later readers of t's aliases read `after(alias, write)`: the alias itself, plus the dependence

The memory that is written and the order of writes stay exactly as they were.
"""

from __future__ import annotations

import operator

from torch import fx

from regate_patch import ops
from regate_patch.analysis.graph import is_call, is_tensor, value, writes_in_place

VIEWS = {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "flatten",
    "unflatten", "narrow", "select", "chunk", "split", "t", "movedim", "swapaxes", "unbind", "view_as",
    "diagonal", "contiguous", "to", "detach", "getitem", "after", "write",
}  # fmt: skip


def name_mutations(gm: fx.GraphModule) -> fx.GraphModule:
    """See the module's description. Changes `gm` in place and returns it."""
    graph = gm.graph
    order = {node: position for position, node in enumerate(graph.nodes)}
    base: dict[fx.Node, fx.Node] = {}
    family: dict[fx.Node, list[fx.Node]] = {}

    for node in list(graph.nodes):
        if is_call(node, operator.setitem) and is_tensor(node.args[0]):
            target = node.args[0]
            node.target = ops.write
            node.meta["example_value"] = value(target)
        elif writes_in_place(node):
            target = node.args[0]
        else:
            target = None
        root = _root(node, target, base)
        base[node] = root
        family.setdefault(root, []).append(node)
        if target is None:
            continue
        _redirect(target, node, order)
        for alias in list(family[root]):
            if alias not in (target, node) and _is_read_later(alias, node, order):
                with graph.inserting_after(node):
                    late = graph.call_function(ops.after, (alias, node))
                late.meta["example_value"] = value(alias)
                late.meta["stack_trace"] = node.meta.get("stack_trace")
                _copy_tag(node, late)
                order[late] = order[node]
                base[late] = root
                family[root].append(late)
                _redirect(alias, late, order, after=order[node])
    graph.lint()
    return gm


def _copy_tag(source: fx.Node, target: fx.Node) -> None:
    if "checkpoint" in source.meta:
        target.meta["checkpoint"] = source.meta["checkpoint"]


def _root(node: fx.Node, target: fx.Node | None, base: dict[fx.Node, fx.Node]) -> fx.Node:
    if target is not None:
        return base[target]
    source = viewed(node)
    return node if source is None else base[source]


def viewed(node: fx.Node) -> fx.Node | None:
    """Of what this is a view, by its name; None if it is none."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op in ("call_method", "call_function") and name in VIEWS and node.args:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    return None


def _is_read_later(alias: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    return any(order[user] > order[write] for user in alias.users)


def _redirect(old: fx.Node, new: fx.Node, order: dict[fx.Node, int], after: int | None = None) -> None:
    threshold = order[new] if after is None else after
    for user in list(old.users):
        if user is not new and order[user] > threshold:
            user.replace_input_with(old, new)
