"""After the last attention only positions that are read are computed: same numbers there, same gradients, less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

import regate_patch
from model_adapters import conventional
from regate_patch import Active
from tests import oracle
from tests.zoo import CORE


def _some(active: Tensor, share: float) -> Tensor:
    """Random ones of the active positions, at least one in all."""
    some = active & (torch.rand(active.shape, generator=torch.Generator().manual_seed(3)) < share)
    some[0] |= active[0] & (active[0].cumsum(0) == 1)
    return some


# Where norms compute in float32 whatever they are given, sums over fewer positions round differently.
@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("llava", 1e-10), ("qwen2_5_vl", 1e-10), ("qwen3_vl", 1e-10), ("qwen3_vl_moe", 1e-6), ("gemma3", 1e-6)],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_exact_where_it_is_read(name: str, tolerance: float, checkpointing: bool) -> None:
    torch._dynamo.reset()
    model = CORE[name].double()
    batch = oracle.double(CORE[name].batch("right"))
    active = oracle.random_active(batch)
    read = _some(active, 0.4)
    expected = oracle.run(model, batch, regate_patch.reference.masked(_layers(model), active), read)
    expected_everywhere = oracle.masked(model, batch, active)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = regate_patch.patch(conventional.decoder(model), backend="eager")
    chosen = Active.from_mask(active).reading(read)
    for _ in range(2):  # the second time by fewer positions
        got = oracle.run(model, batch, regate_patch.active(chosen), read)
        oracle.assert_same(got, expected, tolerance=tolerance)
    assert [graph.tail for graph in handle.statistics.graphs] == [True]
    everything = oracle.run(model, batch, regate_patch.active(active), active)  # by the same graph
    handle.remove()
    oracle.assert_same(everything, expected_everywhere, tolerance=tolerance)
    assert handle.statistics.recompiles == 0


def _layers(model: Any) -> Any:
    return oracle.layers_of(conventional.decoder(model))


def test_work_is_saved() -> None:
    """Counted on what runs, and equal to what the engine says of itself."""
    torch._dynamo.reset()
    counter = FlopCounterMode(display=False)

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            with counter:
                return gm.forward(*args)

        return run

    model = CORE["llava"].build().eval()
    batch = {k: v for k, v in CORE["llava"].batch("none").items() if k != "labels"}
    handle = regate_patch.patch(conventional.decoder(model), backend=counting)
    active = Active.from_mask(torch.ones_like(batch["input_ids"], dtype=torch.bool))
    read = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    read[:, -2:] = True
    counted = []
    for chosen in (active, active.reading(read)):
        with regate_patch.active(chosen), torch.no_grad():
            model(**batch, use_cache=False)
        counted.append(counter.get_total_flops())
    (rows, length), statistics = read.shape, handle.statistics
    assert counted[0] - counted[1] == rows * (statistics.flops(length) - statistics.flops(length, 2)) > 0


def test_attention_of_several_operations_stays_whole() -> None:
    """The product after a softmax adds up values of all positions: the tail cannot begin before it."""
    torch._dynamo.reset()
    model = CORE["llava"].double()
    model.set_attn_implementation("eager")
    batch = oracle.double(CORE["llava"].batch("right"))
    active = oracle.random_active(batch)
    read = _some(active, 0.4)
    handle = regate_patch.patch(conventional.decoder(model), backend="eager")
    for _ in range(2):
        got = oracle.run(model, batch, regate_patch.active(Active.from_mask(active).reading(read)), read)
    assert [graph.tail for graph in handle.statistics.graphs] == [False]
    handle.remove()
    expected = oracle.run(model, batch, regate_patch.reference.masked(_layers(model), active), read)
    oracle.assert_same(got, expected, tolerance=1e-5)  # transformers' eager softmax is in float32
