"""The call around the call: what a model was given whose inner language model is gated."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from model_adapters.conventional import unwrap
from regate.training.hooks import Hook


class OuterCall:
    """The arguments of the running forward of `model`, where the gated `target` is a module inside it.

    An encoder and a projector around a language model have the images, the language model's own call does not. The
    wrapper may be called with `sample_ids`, too, which are taken out.

    Attributes:
        arguments: by name; empty where the model is the target itself, or is not running.
    """

    def __init__(self, model: nn.Module, target: nn.Module) -> None:
        self.arguments: dict[str, Any] = {}
        self._hooks = []
        outer = unwrap(model)
        if outer is not target:
            self._signature = inspect.signature(outer.forward)
            self._hooks = [
                outer.register_forward_pre_hook(Hook(self._called), with_kwargs=True),
                outer.register_forward_hook(Hook(self._returned), always_call=True),
            ]

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(self._signature.bind_partial(*args).arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                named.pop(parameter.name, None)
        self.arguments = named | kwargs
        return args, {name: value for name, value in kwargs.items() if name != "sample_ids"}

    def _returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.arguments = {}

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
