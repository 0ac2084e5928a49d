"""What Python processes below `regate run` do first: wait for `transformers.trainer`, and gate its trainers.

Nothing is imported before the process imports a trainer by itself; most processes of a launcher never do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AWAITED = "transformers.trainer"


class _Await(MetaPathFinder):
    """Lets others find the awaited module, once, and adds to what its import does."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_gate(module: ModuleType) -> None:
                execute(module)
                _gate()

            spec.loader.exec_module = execute_and_gate  # type: ignore[method-assign]
        return spec


def _gate() -> None:
    try:
        from regate.run import gate_trainers
    except ModuleNotFoundError as error:
        raise ImportError(
            f"`regate run` started {sys.executable}, which cannot import {error.name}: install regate there, or start "
            "the command with the Python that has it"
        ) from error
    gate_trainers()


def _run_the_next() -> None:
    """The sitecustomize that this one stands in front of, the environment's own."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != here])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":  # as Python imports it, and not as a part of this package
    if "REGATE_RUN" in os.environ:
        sys.meta_path.insert(0, _Await())
    _run_the_next()
