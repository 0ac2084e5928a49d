"""Checkpointed layers with hooks that nobody can capture, as FSDP2's and ZeRO-3's.

Older releases of transformers 5 checkpoint a layer's call, hooks and all. A checkpoint that cannot be captured whole is
not captured at all, and the layer in it would compute every position. Newer ones checkpoint its forward, so that hooks
stay outside; here the older do so, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from model_adapters.walk import every_part

_OF_CALLS = "__call__" in vars(GradientCheckpointingLayer)


@contextlib.contextmanager
def followable_checkpoints(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder's layers checkpoint their forward, where something hooks onto them."""
    with contextlib.ExitStack() as scope:
        if _OF_CALLS:
            for kind in {type(part) for part in every_part(decoder) if _hooked(part)}:
                scope.enter_context(_changed(kind))
        yield


def _hooked(part: nn.Module) -> bool:
    if not isinstance(part, GradientCheckpointingLayer) or "forward" in vars(part):
        return False
    if type(part).__call__ is nn.Module.__call__:  # within another of these scopes
        return False
    return part.gradient_checkpointing and bool(part._forward_pre_hooks or part._forward_hooks)


@contextlib.contextmanager
def _changed(kind: Any) -> Iterator[None]:
    own = {name: method for name in ("forward", "__call__") if (method := vars(kind).get(name)) is not None}
    kind.forward, kind.__call__ = _checkpointed(kind.forward), nn.Module.__call__
    try:
        yield
    finally:
        del kind.forward, kind.__call__
        for name, method in own.items():
            setattr(kind, name, method)


@functools.cache
def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One function for each, lest it is captured anew at every call."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(forward, self, **kwargs), *args)
        return forward(self, *args, **kwargs)

    return run
