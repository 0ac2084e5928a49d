"""Decoders that are split over ranks: whole only a layer at a time, while the layer's own forward runs.

FSDP2 and DeepSpeed ZeRO-3 gather a layer's parameters in a hook before its forward and drop them in one after it, and
do so again for the backward pass. Dynamo cannot capture such hooks, so the decoder is captured in pieces: each layer is
a graph of its own, which takes its parameters as inputs and finds them whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_LINEAR: Callable[..., Any] = torch._C._nn.linear  # what `F.linear` is, unless somebody replaced it


def is_sharded(module: nn.Module) -> bool:
    """Has FSDP2 or DeepSpeed ZeRO-3 split it? Then hooks of theirs, which Dynamo cannot capture, hang on the parts, and
    parameters are whole only while the part's own forward runs."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def uncaptured(module: nn.Module) -> None:
    """Let nobody capture the hooks by which ZeRO-3 gathers the parameters of the module and its parts.

    FSDP2 says so of its own. ZeRO-3's are one closure a module, and each would be captured anew.
    """
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key, hook in hooks.items():
                if getattr(hook, "__module__", "").startswith("deepspeed.") and not hasattr(
                    hook, "_torchdynamo_disable"
                ):
                    hooks[key] = torch.compiler.disable(hook)


@contextlib.contextmanager
def usual_linear() -> Iterator[Callable[..., Any]]:
    """Inside, `F.linear` is torch's own, which graphs show as one operation; yields what stood in its place.

    ZeRO-3 puts an autograd function there that remembers the parameter itself for the backward pass. torch's remembers
    a view of what the parameter held, which would keep every gathered layer until then.
    """
    standing = F.linear
    F.linear = _LINEAR
    try:
        yield standing
    finally:
        F.linear = standing


def run_linear_by(gm: fx.GraphModule, linear: Callable[..., Any]) -> None:
    """Let the graph's linear operations run through this function."""
    if linear is _LINEAR:
        return
    for part in gm.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.target is _LINEAR:
                    node.target = linear
            part.recompile()
