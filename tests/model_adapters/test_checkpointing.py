"""Layers of older releases checkpoint their forward, and not the hooks around it, while they are followed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from model_adapters import checkpointing
from model_adapters.checkpointing import followable_checkpoints


class _Layer(GradientCheckpointingLayer):
    """Called as layers of transformers 5.17 are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(4, 4), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(nn.Module.__call__, self, **kwargs), *args)
        return nn.Module.__call__(self, *args, **kwargs)


def _forward(self: _Layer, x: Tensor) -> Tensor:
    self.runs += 1
    return self.linear(x).sigmoid()


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(checkpointing, "_OF_CALLS", True)
    monkeypatch.setattr(_Layer, "forward", _forward)  # newer releases wrap what a class brings
    decoder = nn.Sequential(_Layer(), _Layer())
    for layer in decoder:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return decoder


def _step(decoder: nn.Module, *, followed: bool) -> tuple[int, int]:
    """How often a hook of the first layer and its forward run in a step."""
    hooked: list[None] = []
    hook = decoder[0].register_forward_pre_hook(lambda *_: hooked.append(None))
    runs = decoder[0].runs
    x = torch.randn(2, 4)
    if followed:
        with followable_checkpoints(decoder):
            y = decoder(x)
    else:
        y = decoder(x)
    y.sum().backward()
    hook.remove()
    return len(hooked), decoder[0].runs - runs


def test_hooks_are_outside(decoder: nn.Module) -> None:
    assert _step(decoder, followed=False) == (2, 2)
    assert _step(decoder, followed=True) == (1, 2)
    assert _step(decoder, followed=False) == (2, 2)  # as it was
    decoder.eval()
    assert _step(decoder, followed=True) == (1, 1)


def test_gradients_are_the_same(decoder: nn.Module) -> None:
    torch.manual_seed(0)
    found = []
    for followed in (False, True):
        decoder.zero_grad()
        torch.manual_seed(1)
        _step(decoder, followed=followed)
        found.append([p.grad.clone() for p in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layers_without_hooks_stay(decoder: nn.Module) -> None:
    with followable_checkpoints(decoder):
        assert "__call__" in vars(_Layer)
        assert _Layer.forward is _forward


def test_one_within_another(decoder: nn.Module) -> None:
    """No checkpoint within a checkpoint."""
    calls: list[None] = []

    def counted(*args: Any) -> Any:
        calls.append(None)
        return checkpoint(*args, use_reentrant=False)

    for layer in decoder:
        layer._gradient_checkpointing_func = counted
        layer.register_forward_hook(lambda *_: None)
    with followable_checkpoints(decoder):
        assert _step(decoder, followed=True) == (1, 2)
    assert len(calls) == 2
    assert _Layer.forward is _forward
