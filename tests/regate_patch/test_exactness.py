"""The engine against the per-layer masked reference, in float64, outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from tests import oracle
from tests.zoo import CORE
from tests.zoo.common import Padding


@pytest.fixture(autouse=True)
def _no_single_precision_islands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norm computes in float32 whatever it is given; to compare to 1e-10 it must not."""

    def forward(self: Gemma3RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x) * (1.0 + self.weight)

    monkeypatch.setattr(Gemma3RMSNorm, "forward", forward)


def _model(name: str) -> torch.nn.Module:
    return CORE[name].double()


@pytest.mark.few(5)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CORE)
def test_random_positions(name: str, padding: Padding) -> None:
    model, batch = _model(name), oracle.double(CORE[name].batch(padding))
    active = oracle.random_active(batch)
    oracle.assert_same(oracle.engine(model, batch, active), oracle.masked(model, batch, active))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", CORE)
def test_random_positions_with_checkpointing(name: str) -> None:
    model, batch = _model(name), oracle.double(CORE[name].batch("right", seed=1))
    active = oracle.random_active(batch, seed=1)
    expected = oracle.masked(model, batch, active)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    oracle.assert_same(oracle.engine(model, batch, active), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", CORE)
def test_all_positions_is_dense(name: str) -> None:
    model, batch = _model(name), oracle.double(CORE[name].batch("none"))
    active = batch["attention_mask"].bool()
    oracle.assert_same(oracle.engine(model, batch, active), oracle.dense(model, batch, active))
