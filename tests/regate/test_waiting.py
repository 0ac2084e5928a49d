"""Gating waits for the device once per forward, before it. What comes later asks the device for no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import regate
from regate.memory.store import Store
from regate.scoring.visual import thinned
from tests.zoo import CORE

# What a GPU's host would wait for: a value, or the size of a result that depends on values.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def _reads(step: Callable[[], Any]) -> list[str]:
    """Reads of `step`, those of the gate's look at the batch left out."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events() or []
    before = [e.time_range for e in events if e.name == "regate.before"]
    inside = [any(r.start <= e.time_range.start <= r.end for r in before) for e in events]
    return sorted(e.name for e, seen in zip(events, inside, strict=True) if e.name in READS and not seen)


@pytest.mark.few(2)
@pytest.mark.parametrize("logits", ["kept", "all"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_gated_step_reads_no_more_than_a_dense_one(name: str, logits: Any) -> None:
    torch._dynamo.reset()
    model = CORE[name].build()
    batch = CORE[name].batch("right")

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()

    dense = _reads(step)
    regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0, logits=logits))
    step()  # captures, teaches, proves
    gated = _reads(step)
    for read in READS:
        assert gated.count(read) <= dense.count(read), (read, gated, dense)


def test_the_gates_own_reads_are_seen() -> None:
    """The count above would notice a wait: the look at the batch itself is one."""
    torch._dynamo.reset()
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    regate.apply(model, SPARSE, teacher=None)
    model(**batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(**batch)
    names = [e.name for e in profiler.events() or []]
    assert READS.intersection(names)
    assert {"regate.before", "regate.after"} <= set(names)


class _OnDevice(Tensor):
    """Values that the host must not ask for."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = function in (Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.__bool__, Tensor.__int__, torch.nonzero)
        by_mask = function in (Tensor.__getitem__, Tensor.__setitem__) and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in (args[1] if isinstance(args[1], tuple) else args)
        )
        assert not asked, function
        assert not by_mask, "a mask is counted before it selects"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_thinning_asks_the_device_for_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    embeddings, visual = torch.randn(3, 40, 8, generator=random), torch.rand(3, 40, generator=random) < 0.6
    stay = thinned(embeddings.as_subclass(_OnDevice), visual, 0.3)
    assert isinstance(embeddings.as_subclass(_OnDevice).argsort(), _OnDevice)
    with pytest.raises(AssertionError, match="counted"):
        embeddings.as_subclass(_OnDevice)[embeddings.as_subclass(_OnDevice) > 0]
    assert torch.equal(stay.as_subclass(Tensor), thinned(embeddings, visual, 0.3))


def test_difficulties_are_stored_while_the_next_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sample's next choice is made by is the newest difficulty, be it stored yet or not."""
    torch._dynamo.reset()
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    gate = regate.apply(model, SPARSE, teacher=None)
    written: list[str] = []
    put = Store.put

    def recorded(store: Store, table: Any, records: Any) -> None:
        written.append("after" if gate._attached._forward is None else "before")
        put(store, table, records)

    monkeypatch.setattr(Store, "put", recorded)
    for _ in range(3):
        model(**batch)
    assert written == ["after", "after"]
    chosen = gate.choose(batch)  # flushes
    assert len(written) == 3
    gate.flush()
    assert len(written) == 3
    assert torch.equal(gate.choose(batch), chosen)
