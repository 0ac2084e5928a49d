"""Hooks that a copied or pickled model does not take with it, and that keep nothing alive; stand-ins for a forward."""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from model_adapters.replaced import replaced
from model_adapters.signatures import signature


class Hook:
    """A hook that a copied or pickled model does not take with it.

    Profilers see it as a span named after its function: `regate.before`, `regate.after`.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.name = "regate." + function.__name__.strip("_")

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        with torch.profiler.record_function(self.name):
            return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_nothing)

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


@contextlib.contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calls of `module` run this forward, under the module's own hooks."""
    with replaced(module, forward=forward):
        yield


def run_inside(module: nn.Module, function: Callable[[], Any]) -> Any:
    """What `function` returns, run as the module's forward: under its hooks, which make parameters whole."""
    returned = []
    with standing_in(module, lambda: returned.append(function())):
        module()
    return returned[0]


def is_inside(module: nn.Module) -> bool:
    """Asked by a hook of a module that is being called: is the call one within another of the same module?"""
    calls, frame = 0, sys._getframe(1)
    while frame is not None:
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1


def is_recomputed() -> bool:
    """Does a checkpoint that was taken with its forward's graph (`use_reentrant=False`) run this once more?"""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "unpack_hook" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def call_weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A global hook must not keep the model alive."""
    reference_to = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (alive := reference_to()) is not None:
            alive(*args)

    return call


def through_peft(model: nn.Module) -> None:
    """Let PEFT call the model that it wraps. Before 0.21 it called that model's `forward`, past all hooks."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if (kind.__module__, kind.__name__) == ("peft.tuners.tuners_utils", "BaseTuner"):
                kind.forward = _call_inner  # type: ignore[attr-defined]


def _call_inner(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What `BaseTuner.forward` is from PEFT 0.21 on."""
    return self.model(*args, **kwargs)


def _nothing(*args: Any) -> None:
    """What a copied model's hook does."""


def owners(module: nn.Module) -> list[object]:
    """The objects whose methods hang on the module's forward as `Hook`s."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook)]
    return [owner for hook in hooks if (owner := getattr(hook.function, "__self__", None)) is not None]


@contextlib.contextmanager
def followable_peft() -> Iterator[None]:
    """Inside, what PEFT's layers do in ways that nobody captures is done in others, with the same results.

    DoRA's read plain weights as they are, where PEFT looks at their class. Adapters of parameters (LoRA of experts, by
    `target_parameters`) call the module with its adapted ones, where PEFT gives it another class for the call.
    """
    dora: Any = sys.modules.get("peft.tuners.lora.dora")
    of_parameters: Any = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None)
    with contextlib.ExitStack() as scope:
        for owner, name, function in (
            (dora, "dequantize_module_weight", _plain_weight),
            (of_parameters, "forward", _call_with_adapted),
        ):
            if owner is not None:
                scope.enter_context(replaced(owner, **{name: function}))
        yield


@contextlib.contextmanager
def without_cache(decoder: nn.Module, *, called_so: bool) -> Iterator[None]:
    """Inside, a decoder makes no cache by itself: keys of positions that are not computed cannot be cached.

    Where the model is `called_so`, its decoder is, too. Else the model goes by its config, which is changed meanwhile:
    hooks do not learn of Ctrl-C, after which it could be saved so.
    """
    config: Any = getattr(decoder, "config", None)
    if not getattr(config, "use_cache", False):
        yield
    elif called_so and "use_cache" in signature(decoder).parameters:
        hook = decoder.register_forward_pre_hook(Hook(_call_without_cache), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
    else:
        with replaced(config, use_cache=False):
            yield


def _call_without_cache(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parameters = signature(decoder).parameters
    place, kind = list(parameters).index("use_cache"), parameters["use_cache"].kind
    by_place = kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and len(args) > place
    told = args[place] if by_place else kwargs.get("use_cache")
    if told is not None and not torch.is_grad_enabled():  # a call aside, which may need one
        return None
    if by_place:
        return (*args[:place], False, *args[place + 1 :]), kwargs
    return args, kwargs | {"use_cache": False}


def _call_with_adapted(adapter: Any, *args: Any, **kwargs: Any) -> Any:
    """What `ParamWrapper.forward` returns; one that wraps another adapts one more parameter of the same module."""
    kind, module, adapted = type(adapter), adapter, {}
    while isinstance(module, kind):
        weight = module.get_param()
        for name in module.active_adapters:
            if name in module.lora_A and not (module.disable_adapters or module.merged):
                weight = weight + module.get_delta_weight(name)
        adapted[module.parameter_name] = weight
        module = module.base_layer
    return torch.func.functional_call(module, adapted, args, kwargs)


def _plain_weight(module: nn.Module) -> Any:
    if type(module.weight) is nn.Parameter:
        return module.weight
    integrations: Any = sys.modules["peft.utils.integrations"]
    return integrations.dequantize_module_weight(module)
