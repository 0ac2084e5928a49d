"""Through a real compiler: the same numbers as the per-layer masked reference, at float32 tolerances."""

from __future__ import annotations

import pytest

from tests import oracle
from tests.zoo import CORE


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_inductor(name: str) -> None:
    model, batch = CORE[name].build(), CORE[name].batch("right")
    active = oracle.random_active(batch)
    got = oracle.engine(model, batch, active, backend="inductor")
    oracle.assert_same(got, oracle.masked(model, batch, active), tolerance=2e-4)


@pytest.mark.matrix
def test_inductor_with_checkpointing() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    active = oracle.random_active(batch)
    expected = oracle.masked(model, batch, active)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    oracle.assert_same(oracle.engine(model, batch, active, backend="inductor"), expected, tolerance=2e-4)
