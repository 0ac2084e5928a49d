"""Passes are switched off by name, and what only saves work changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regate
import regate_patch
from regate_patch.passes.rewrite import DISABLE, OPTIONAL, PASSES
from tests import oracle
from tests.zoo import CORE


def test_the_list() -> None:
    names = [p.name for p in PASSES]
    assert len(set(names)) == len(names)
    assert set(OPTIONAL) == {"causal", "tail", "end_to_end", "heads", "layers"}
    assert names.index("check") < names.index("insert") < names.index("layers") < names.index("outline")


@pytest.mark.few(6)
@pytest.mark.parametrize("off", sorted({*OPTIONAL} - {"heads", "layers"}))  # which have tests of their own
@pytest.mark.parametrize("name", CORE)
def test_without_one_of_them(name: str, off: str) -> None:
    """Exact, and the pass really did not run."""
    torch._dynamo.reset()
    model, batch = CORE[name].double(), oracle.double(CORE[name].batch("right"))
    active = oracle.random_active(batch)
    ran: list[str] = []
    options: dict[str, Any] = {"padding_elided": True, "observe": lambda name, gm: ran.append(name)}
    got = oracle.engine(model, batch, active, disable=(off,), **options)
    assert ran[0] == "captured"
    assert ran[1:] == [p.name for p in PASSES if p.name not in (off, "layers")]  # nothing is compiled
    tolerance = 1e-10 if name not in ("gemma3", "qwen3_vl_moe") else 1e-6  # float32 norms and routers
    oracle.assert_same(got, oracle.masked(model, batch, active), tolerance=tolerance)


def test_what_was_found_says_so() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    found = []
    for disable in ((), ("causal",), ("tail",), ("causal", "tail")):
        torch._dynamo.reset()
        gate = regate.apply(model, regate.Config(warmup=9, disable=disable), teacher=None)
        model(**batch)
        (graph,) = gate._parts.handle.statistics.graphs
        found.append((graph.causal > 0, graph.tail))
        gate.remove()
    assert found == [(True, True), (False, True), (True, False), (False, False)]


def test_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv(DISABLE, "tail, causal")
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    gate = regate.apply(model, regate.Config(warmup=9), teacher=None)
    model(**batch)
    (graph,) = gate._parts.handle.statistics.graphs
    assert not graph.causal
    assert not graph.tail


@pytest.mark.parametrize("name", ["tial", "insert"])
def test_no_such_pass(name: str) -> None:
    with pytest.raises(regate_patch.UnknownPassError, match=f"'{name}' can be switched off .* 'causal', 'tail'"):
        regate_patch.patch(torch.nn.Linear(2, 2), disable=(name,))
    with pytest.raises(regate.RegateError, match="only save work"):
        regate.apply(CORE["llava"].build(), regate.Config(disable=(name,)), teacher=None)
