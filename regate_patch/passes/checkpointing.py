"""Passes: flatten activation-checkpointed bodies before the rewrite, and restore them after it.

Dynamo captures `torch.utils.checkpoint.checkpoint(f, *args)` as one higher-order call whose body is a graph
of its own. `inline` copies the body into the outer graph and tags its nodes, so that every other pass sees
one flat graph. `outline` cuts the tagged nodes out again and calls them through `torch.utils.checkpoint`,
which an eager run executes as it is and which an inner compiler captures again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from regate_patch.analysis.graph import sort_topologically, where
from regate_patch.errors import UnsupportedGraphError
from regate_patch.passes.layers import Slice, body_of, replace_by

_HOP = torch.ops.higher_order.tag_activation_checkpoint


@dataclass(frozen=True, eq=False)
class Region:
    """One checkpointed call: the options it was made with."""

    options: dict[str, Any]


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace each checkpoint call by its body; the nodes carry their `Region` in `meta["checkpoint"]`."""
    graph = gm.graph
    for call in list(graph.nodes):
        if call.op != "call_function" or call.target is not _HOP:
            continue
        body = getattr(gm, call.args[0].target)
        options, kwargs = _HOP.divide_kwargs(dict(call.kwargs))
        if kwargs:
            raise UnsupportedGraphError(f"a checkpointed body with keyword inputs: {where(call)}")
        if "_checkpoint_context_fn" in body.meta:
            options["context_fn"] = body.meta["_checkpoint_context_fn"]
        region = Region({"use_reentrant": False} | options)
        outputs = _copy_body(gm, body, call, region)
        for user in list(call.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(call)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    graph.lint()
    return gm


def _copy_body(gm: fx.GraphModule, body: fx.GraphModule, call: fx.Node, region: Region) -> tuple[fx.Node, ...]:
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    copied: dict[fx.Node, Any] = dict(zip(placeholders, call.args[1:], strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: copied[n])
            new = gm.graph.node_copy(node, lambda n: copied[n])
            if node.op == "get_attr":
                new.target = f"{call.name}_{node.target}".replace(".", "_")
                setattr(gm, new.target, _attribute(body, node.target))
            else:
                new.meta["checkpoint"] = region
            copied[node] = new
    raise AssertionError("a graph without output")


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def outline(gm: fx.GraphModule) -> fx.GraphModule:
    """Cut the tagged nodes out again, each region a submodule called through `checkpoint`."""
    regions: dict[Region, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if "checkpoint" in node.meta and node.op != "get_attr":
            regions.setdefault(node.meta["checkpoint"], []).append(node)
    for number, (region, nodes) in enumerate(regions.items()):
        _cut(gm, f"checkpoint_{number}", region, Slice(nodes))
    sort_topologically(gm.graph)
    gm.graph.lint()
    return gm


def _cut(gm: fx.GraphModule, name: str, region: Region, part: Slice) -> None:
    if not part.outputs:
        return
    gm.add_submodule(name, body_of(gm, part))
    with gm.graph.inserting_after(part.nodes[-1]):
        module = gm.graph.get_attr(name)
    with gm.graph.inserting_after(module):
        call = gm.graph.call_function(checkpoint, (module, *part.inputs), dict(region.options))
    replace_by(gm.graph, part, call)
