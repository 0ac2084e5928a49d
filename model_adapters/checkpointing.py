"""Checkpointed layers with hooks that nobody can capture, as FSDP2's and ZeRO-3's.

A checkpoint that cannot be captured whole is not captured at all, and the layer in it would compute every position.
So what is checkpointed must be a layer's forward, with hooks outside, as newer releases of transformers 5 do it. Two
others put the hooks inside: older releases, which checkpoint a layer's call, and torch's `checkpoint_wrapper`, which
accelerate puts around layers that FSDP2 then splits (`activation_checkpointing`). Here forwards are checkpointed, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, OffloadWrapper
from transformers.modeling_layers import GradientCheckpointingLayer

from model_adapters.replaced import replaced
from model_adapters.walk import every_part

_OF_CALLS = "__call__" in vars(GradientCheckpointingLayer)


@contextlib.contextmanager
def followable_checkpoints(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder's layers checkpoint their forward, where something hooks onto them."""
    with contextlib.ExitStack() as scope:
        for wrapper in _around_layers(decoder):
            if _can_stand_aside(wrapper) and _has_hooks(_layer_in(wrapper)):
                scope.enter_context(_aside(wrapper))
        if _OF_CALLS:
            for kind in {type(part) for part in every_part(decoder) if _hooked(part)}:
                scope.enter_context(_changed(kind))
        yield


def within_checkpoints(decoder: nn.Module) -> Iterator[nn.Module]:
    """The parts of a decoder whose hooks stand inside checkpoints all the same."""
    around_layers = list(_around_layers(decoder))
    for wrapper in every_part(decoder):
        if isinstance(wrapper, CheckpointWrapper):
            layer, *parts = every_part(_layer_in(wrapper))
            yield from parts
            served = _can_stand_aside(wrapper) and wrapper in around_layers
            if not (served and isinstance(layer, GradientCheckpointingLayer)):
                yield layer


def _around_layers(decoder: nn.Module) -> Iterator[CheckpointWrapper]:
    """Wrappers of a decoder's layers; `every_part` would be long, before each forward."""
    for child in decoder.children():
        if isinstance(child, CheckpointWrapper):
            yield child
        elif isinstance(child, nn.ModuleList | OffloadWrapper):
            yield from _around_layers(child)


def _can_stand_aside(wrapper: CheckpointWrapper) -> bool:
    """Does it checkpoint as torch's does? It may have a class of FSDP2's, which accelerate lets split wrappers, too."""
    return type(wrapper).forward is CheckpointWrapper.forward


@functools.cache
def _standing_aside(kind: type[CheckpointWrapper]) -> type[CheckpointWrapper]:
    """Of wrappers that leave it to their layer; one class for each, lest it is captured anew at every call."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_wrapped_module(*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


@contextlib.contextmanager
def _aside(wrapper: CheckpointWrapper) -> Iterator[None]:
    """Inside, the wrapped layer checkpoints its forward by itself, as if it had been told to."""
    kind = type(wrapper)
    wrapper.__class__ = _standing_aside(kind)
    told = {"gradient_checkpointing": True, "_gradient_checkpointing_func": wrapper.checkpoint_fn}
    try:
        with replaced(_layer_in(wrapper), **told):
            yield
    finally:
        wrapper.__class__ = kind


def _layer_in(wrapper: CheckpointWrapper) -> nn.Module:
    layer = wrapper._checkpoint_wrapped_module
    assert isinstance(layer, nn.Module)
    return layer


def _has_hooks(part: nn.Module) -> bool:
    return isinstance(part, GradientCheckpointingLayer) and bool(part._forward_pre_hooks or part._forward_hooks)


def _hooked(part: nn.Module) -> bool:
    if not _has_hooks(part) or "forward" in vars(part):
        return False
    if type(part).__call__ is nn.Module.__call__:  # within another of these scopes
        return False
    return bool(part.gradient_checkpointing)


@contextlib.contextmanager
def _changed(kind: Any) -> Iterator[None]:
    with replaced(kind, forward=_checkpointed(kind.forward), __call__=nn.Module.__call__):
        yield


@functools.cache
def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One function for each, lest it is captured anew at every call."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(forward, self, **kwargs), *args)
        return forward(self, *args, **kwargs)

    return run
