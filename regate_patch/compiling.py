"""Run a graph through a compiler: in one piece, or in parts that are compiled each on its own.

A part that is called often is compiled once. One artefact serves all sizes.
"""

from __future__ import annotations

import itertools
import logging
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch.torch_version import TorchVersion

from regate_patch.errors import UnknownBackendError

log = logging.getLogger("regate_patch")
Backend = str | Callable[..., Any]
_NUMBERS = itertools.count()
_ENTER = torch.amp.autocast_mode._enter_autocast
_COMPILES_AUTOCAST = TorchVersion(torch.__version__) >= TorchVersion("2.13")  # Dynamo goes through what enters it


def known(backend: Backend) -> Backend:
    """The same, if it is "auto", or torch has it.

    Raises:
        UnknownBackendError: it is a name that means nothing.
    """
    if callable(backend) or backend == "auto" or backend in torch._dynamo.list_backends(exclude_tags=()):
        return backend
    raise UnknownBackendError(
        f"no backend named {backend!r}. Choose 'auto', 'eager' or 'inductor'; torch has others "
        "(torch._dynamo.list_backends(exclude_tags=())), or give a function"
    )


def compiled(gm: fx.GraphModule, parts: Collection[str], backend: Backend) -> Callable[..., Any]:
    """The graph, compiled when it first runs.

    Args:
        gm: takes tensors and sizes.
        parts: names of its submodules, if they are all that it calls; then each is compiled when it is first called,
            and what stands between the calls runs as it is.
        backend: as `torch.compile` takes it.

    What this torch cannot compile, for autocast is entered there, runs as it is, and the log says so.
    """
    run = _in_parts(gm, parts, backend) if parts else _alone(gm, backend)

    def run_any_size(*inputs: Any) -> Any:
        with torch._dynamo.config.patch(specialize_int=False):  # here the ints are B and S
            return run(*inputs)

    return run_any_size


def _in_parts(gm: fx.GraphModule, parts: Collection[str], backend: Backend) -> Callable[..., Any]:
    run = fx.GraphModule(gm, gm.graph)
    for name in parts:
        setattr(run, name, _Part(_alone(getattr(gm, name), backend)))
    return run.forward


class _Part(nn.Module):
    """A function where a graph calls a module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


def _alone(gm: fx.GraphModule, backend: Backend) -> Callable[..., Any]:
    if not _COMPILES_AUTOCAST and _enters_autocast(gm):
        size = sum(node.op.startswith("call") for node in gm.graph.nodes)
        log.warning(
            "%d operations run uncompiled: torch %s compiles no graph in which autocast is switched, as rotary "
            "embeddings do in some releases of transformers; torch 2.13 does",
            size,
            torch.__version__,
        )
        return gm.forward

    def run(*inputs: Any) -> Any:
        return gm(*inputs)

    return torch.compile(with_own_code(run), backend=backend, dynamic=True, fullgraph=True)


def _enters_autocast(gm: fx.GraphModule) -> bool:
    parts = (part for part in gm.modules() if isinstance(part, fx.GraphModule))
    return any(node.target is _ENTER for part in parts for node in part.graph.nodes)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, or method of the same object, whose code is nobody else's.

    Dynamo keeps what it compiled with the code object, counts it, and looks through all of it at each call, also when
    the models that it was compiled for are gone: a process could gate only so many decoders of one class. What is given
    up in one decoder is not given up in another.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(with_own_code(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(_NUMBERS)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    own.__dict__.update(function.__dict__)
    return own
