"""One form for a call, so that every other question about a graph has one place to look at.

`F.linear(weight=w, input=x)` is `F.linear(x, w)`, and `x.softmax(axis=1)`, as NumPy says it, `x.softmax(dim=1)`.
"""

from __future__ import annotations

import inspect
import types
from functools import cache
from typing import Any

import torch
from torch import fx

from regate_patch.analysis.graph import is_tensor
from regate_patch.analysis.mixers import SDPA

_FIRST = ("self", "input", "x", "a", "x1")  # names of one parameter, by schemas, functions and NumPy
_ALIASES = {"axis": "dim", "keepdims": "keepdim", "x2": "other"}


def put_in_place(gm: fx.GraphModule) -> fx.GraphModule:
    """Give a call's leading tensors by place, and axes by torch's name for them. Changes `gm` and returns it.

    Attention is left as it is: it is read by its arguments' names, however they were given.
    """
    for node in gm.graph.nodes:
        if node.kwargs and node.op in ("call_function", "call_method") and node.target not in SDPA:
            for placed, named in _parameters(node.op, node.target):
                if _fit(node, placed, named):
                    break
    return gm


def _fit(node: fx.Node, placed: tuple[str, ...], named: frozenset[str]) -> bool:
    """Do so by one overload's parameters; False if the call is of another."""
    left = {_known(name, placed, named): name for name in node.kwargs}
    if not left.keys() <= named - set(placed[: len(node.args)]):
        return False
    args = list(node.args)
    for name in placed[len(args) :]:
        if name not in left or not _holds_tensors(node.kwargs[left[name]]):
            break
        args.append(node.kwargs[left.pop(name)])
    renamed = {own if own in _FIRST else name: node.kwargs[own] for name, own in left.items()}
    node.args, node.kwargs = tuple(args), renamed
    return True


def _known(name: str, placed: tuple[str, ...], named: frozenset[str]) -> str:
    """What the parameter of this name is called among these."""
    if name not in named and name in _FIRST and placed and placed[0] in _FIRST:
        return placed[0]
    return name if name in named else _ALIASES.get(name, name)


def _holds_tensors(x: Any) -> bool:
    return is_tensor(x) or (isinstance(x, (tuple, list)) and bool(x) and all(map(is_tensor, x)))


@cache
def _parameters(op: str, target: Any) -> list[tuple[tuple[str, ...], frozenset[str]]]:
    """For each overload the parameters that can be given by place, in order, and all; none where nobody says."""
    if isinstance(target, types.FunctionType):
        signature = inspect.signature(target).parameters.values()
        return [_split([(p.name, p.kind is p.POSITIONAL_OR_KEYWORD) for p in signature])]
    if isinstance(target, torch._ops.OpOverload):
        schemas = [target._schema]
    else:
        packet = getattr(torch.ops.aten, target if op == "call_method" else getattr(target, "__name__", ""), None)
        schemas = [getattr(packet, name)._schema for name in packet.overloads()] if packet is not None else []
    return [_split([(argument.name, not argument.kwarg_only) for argument in s.arguments]) for s in schemas]


def _split(parameters: list[tuple[str, bool]]) -> tuple[tuple[str, ...], frozenset[str]]:
    return tuple(name for name, by_place in parameters if by_place), frozenset(name for name, _ in parameters)
