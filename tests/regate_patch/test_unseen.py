"""Where Dynamo sees nothing, because it is switched off or a function forbids it, the error says so and what to do."""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import regate_patch
from regate_patch import NoBlocksError, UnsupportedGraphError
from tests.plain import Decoder


def _switch_off(how: str, context: contextlib.ExitStack) -> str:
    if how == "environment":
        context.enter_context(mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"))
        return "TORCHDYNAMO_DISABLE is 1"
    if how == "config":
        context.enter_context(torch._dynamo.config.patch(disable=True))
        return "TORCH_COMPILE_DISABLE"
    context.enter_context(torch.compiler.set_stance(how))
    return f"'{how}'.*set_stance"


OFF = ["environment", "config", "force_eager"]


@pytest.mark.parametrize("how", OFF)
def test_a_compiler_that_is_switched_off_is_named(how: str) -> None:
    x, decoder = torch.randn(2, 6, 16), Decoder()
    regate_patch.patch(decoder, backend="eager")
    with contextlib.ExitStack() as context:
        cause = _switch_off(how, context)
        with pytest.raises(NoBlocksError, match=cause), regate_patch.active(torch.arange(4).expand(2, 4)):
            decoder(x)
        with pytest.raises(NoBlocksError, match=cause):
            regate_patch.inspect(Decoder(), x)


def test_it_is_named_when_it_is_switched_off_later() -> None:
    x, decoder = torch.randn(2, 6, 16), Decoder()
    regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(torch.arange(4).expand(2, 4)):
        expected = decoder(x)
        with torch.compiler.set_stance("force_eager"), pytest.raises(NoBlocksError, match="'force_eager'"):
            decoder(x)
        torch.testing.assert_close(decoder(x), expected)


@torch.compiler.disable
def turned(x: Tensor) -> Tensor:
    return x.roll(1, -1)


class _Calling(Decoder):
    """Its input goes through a function of a package of kernels."""

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        return super().forward(turned(hidden_states), **others)


@pytest.mark.parametrize("package", ["some_kernels", None])
def test_a_function_that_forbids_to_look_into_it_is_named_with_its_package(
    package: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = r"turned forbids torch\.compile to look into it: let the model's code call"
    monkeypatch.setattr(turned, "__module__", None)
    if package is not None:
        told = (
            r"turned of some_kernels forbids torch\.compile to look into it: uninstall some_kernels, if .* or let the"
        )
        monkeypatch.setattr(turned, "__module__", f"{package}.ops.turned")
    with pytest.raises(UnsupportedGraphError, match=told):
        regate_patch.inspect(_Calling(), torch.randn(2, 6, 16))


class _Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("mode", [FlopCounterMode(display=False), _Looking()])
def test_a_mode_that_is_active_is_named(mode: Any) -> None:
    """Before the first capture and later; without it the decoder runs as if it had not been there."""
    x, decoder = torch.randn(2, 6, 16), Decoder()
    regate_patch.patch(decoder, backend="eager")
    told = rf"{type(mode).__name__.strip('_')} is active around it"
    with mode, pytest.raises(NoBlocksError, match=told):
        regate_patch.inspect(Decoder(), x)
    with regate_patch.active(torch.arange(4).expand(2, 4)):
        with mode, pytest.raises(NoBlocksError, match=told):
            decoder(x)
        expected = decoder(x)
        with mode, pytest.raises(NoBlocksError, match=told):
            decoder(x)
        torch.testing.assert_close(decoder(x), expected)
