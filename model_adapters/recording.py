"""Hidden states, attentions and router scores that transformers records by hooks, in a form that can be captured.

Its hooks hand what they see to a collector, which is a context variable outside `torch.compile` and a plain one inside.
Two things then fail in a decoder that is captured alone: where a module around the decoder collects, the hooks ask a
context variable, which nobody can follow; and where a part of the decoder collects for itself, it leaves no collector
behind. So while a gated forward runs, the collector is one that nests and can be followed, and holds what was there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from model_adapters.conventional import way_to

_MODULE = "transformers.utils.output_capturing"
_INSTALLED = "_output_capturing_hooks_installed"


class _Collector:
    """As transformers' own; the token of `set` is what was there before."""

    def __init__(self) -> None:
        self.now: dict[str, list[Any]] | None = None

    def get(self) -> dict[str, list[Any]] | None:
        return self.now

    def set(self, collected: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
        before, self.now = self.now, collected
        return before

    def reset(self, token: dict[str, list[Any]] | None) -> None:
        self.now = token


_COLLECTOR = _Collector()  # always the same: captured code is of this one


@contextlib.contextmanager
def followable_recording() -> Iterator[None]:
    """Inside, what is recorded of a decoder can be captured. In one thread at a time, as under `torch.compile`."""
    recording: Any = sys.modules.get(_MODULE)
    own = getattr(recording, "_active_collector", None)
    if own is None or own is _COLLECTOR:
        yield
        return
    recording._active_collector = _COLLECTOR
    before = _COLLECTOR.set(own.get())
    try:
        yield
    finally:
        _COLLECTOR.reset(before)
        recording._active_collector = own


def install_recording(model: nn.Module, decoder: nn.Module) -> None:
    """Let transformers install its hooks now; later it does so behind a lock, which nobody can capture.

    On the outermost module that collects: it is the one that would install them, in all its parts at once, and once
    more in parts that have some.
    """
    recording: Any = sys.modules.get(_MODULE)
    if recording is None:
        return
    for module in (*way_to(model, decoder)[:-1], decoder):
        if getattr(module, _INSTALLED, False):
            return
        if module is decoder or (_collects(module) and not any(hasattr(part, _INSTALLED) for part in module.modules())):
            recording.maybe_install_capturing_hooks(module)
            return


def _collects(module: nn.Module) -> bool:
    """Is the module's forward decorated so?"""
    function: Any = type(module).forward
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__") == _MODULE:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
