"""The call around the call: what a model was given whose inner language model is gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from model_adapters import Batch
from model_adapters.conventional import unwrap
from model_adapters.signatures import by_name, signature
from regate.errors import UnsupportedShardingError
from regate.training.hooks import Hook
from regate_patch import is_sharded


class OuterCall:
    """The arguments of the running forward of `model`, where the gated `target` is a module inside it.

    An encoder and a projector around a language model have the images, the language model's own call does not. The
    wrapper may be called with `sample_ids`, too, which are taken out.

    Attributes:
        arguments: by name, also of what mappings among them hold; empty where the model is the target itself, or is not
            running.
    """

    def __init__(self, model: nn.Module, target: nn.Module) -> None:
        self.arguments: dict[str, Any] = {}
        self._hooks = []
        outer = unwrap(model)
        if outer is not target:
            self._hooks = [
                outer.register_forward_pre_hook(Hook(self._called), with_kwargs=True),
                outer.register_forward_hook(Hook(self._returned), always_call=True),
            ]

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.arguments = _spread(by_name(module, args, kwargs))
        return args, {name: value for name, value in kwargs.items() if name != "sample_ids"}

    def _returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.arguments = {}

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _spread(call: dict[str, Any]) -> dict[str, Any]:
    """The call with the entries of its mappings: of a batch as one argument, or of a list of samples."""
    found = dict(call)
    for value in call.values():
        if isinstance(value, Mapping):
            found |= {name: entry for name, entry in value.items() if isinstance(name, str)}
        elif isinstance(value, list | tuple) and value and all(isinstance(sample, Mapping) for sample in value):
            names = [name for name in value[0] if isinstance(name, str) and all(name in sample for sample in value)]
            found |= {name: [[sample[name]] for sample in value] for name in names}
    return found


class _Reached(Exception):
    """Ends a forward where the inner module is called."""


def inner_call(model: nn.Module, target: nn.Module, batch: Batch) -> Batch:
    """The arguments with which `target`, somewhere inside, is called where `model` is called with this batch.

    The forward of `model` runs up to there, without gradients. A batch that is none of its calls is given back: it is
    the target's own.

    Raises:
        UnsupportedShardingError: the model is split over ranks, which then must end each forward that they begin.
    """
    outer = unwrap(model)
    if outer is target or not _fits(outer, batch):
        return batch
    if is_sharded(model):
        raise UnsupportedShardingError(
            f"what {type(outer).__name__} gives its language model is only known from its own forward, which cannot be "
            "left half-way where FSDP2 or DeepSpeed ZeRO-3 has split it: call gate.precompute before the model is "
            "split, or with the arguments of the language model's call, or keep a copy (teacher='copy' or '4bit')"
        )
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(by_name(module, args, kwargs))
        raise _Reached

    running = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]  # whose statistics are state
    hook = target.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for module in running:
            module.eval()
        with torch.no_grad():
            model(**batch)
    except _Reached:
        return seen
    finally:
        hook.remove()
        for module in running:
            module.train()
    return batch


def _fits(module: nn.Module, batch: Batch) -> bool:
    """Can the module be called with it?"""
    try:
        signature(module).bind(**batch)
    except TypeError:
        return False
    return True
