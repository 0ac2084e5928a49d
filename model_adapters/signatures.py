"""What a module's forward takes, and a call of it by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn


def signature(module: nn.Module) -> inspect.Signature:
    """Of its forward, or of its class's where another stands in its place that takes whatever comes."""
    own = inspect.signature(module.forward)
    if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own.parameters.values()):
        return inspect.signature(MethodType(type(module).forward, module))
    return own


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the module's forward has for them; those without one are left out."""
    if not args:
        return dict(kwargs)
    own = signature(module)
    found = dict(own.bind_partial(*args).arguments)
    for parameter in own.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            found.pop(parameter.name, None)
    return found | dict(kwargs)
