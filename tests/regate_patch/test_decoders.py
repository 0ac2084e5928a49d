"""Decoders of other designs, against the per-layer masked reference; and relations that need no oracle."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import regate_patch
from regate_patch import reference
from tests.plain import Decoder, Style

STYLES = get_args(Style)


def _grads(decoder: Decoder, x: Tensor, active: Tensor, scope: object) -> tuple[Tensor, Tensor, list[Tensor]]:
    decoder.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with scope:  # type: ignore[attr-defined]
        y = decoder(x)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    (y * weight * active[..., None]).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, [p.grad for p in decoder.parameters() if p.grad is not None]


def _random(rows: int = 3, length: int = 12) -> tuple[Tensor, Tensor]:
    active = torch.rand(rows, length) < 0.5
    active[:, 0] = True
    return torch.randn(rows, length, 16, dtype=torch.double), active


@pytest.mark.few(5)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_exact(style: Style, rows: int) -> None:
    decoder = Decoder(style).double()
    x, active = _random(rows)
    expected = _grads(decoder, x, active, reference.masked(decoder.layers, active))
    regate_patch.patch(decoder, backend="eager", allow_graph_breaks=style == "broken")
    got = _grads(decoder, x, active, regate_patch.active(active))
    torch.testing.assert_close(got[0][active], expected[0][active], atol=1e-10, rtol=0)
    torch.testing.assert_close(got[1:], expected[1:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("style", ["pre_norm", "parallel", "gated", "softmax", "broken"])
def test_inactive_positions_pass_unchanged(style: Style) -> None:
    decoder = Decoder(style).double()
    x, active = _random()
    regate_patch.patch(decoder, backend="eager", allow_graph_breaks=style == "broken")
    with regate_patch.active(active):
        y = decoder(x)
    torch.testing.assert_close(y[~active], decoder.norm(x)[~active], atol=0, rtol=0)


def test_first_positions_are_dense_on_a_prefix() -> None:
    decoder = Decoder().double()
    x, _ = _random()
    expected = decoder(x[:, :5])
    regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(torch.arange(5).expand(3, 5)):
        got = decoder(x)[:, :5]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_inactive_content_reaches_nothing() -> None:
    decoder = Decoder().double()
    x, active = _random()
    regate_patch.patch(decoder, backend="eager")
    first = _grads(decoder, x, active, regate_patch.active(active))
    other = torch.where(active[..., None], x, torch.randn_like(x))
    second = _grads(decoder, other, active, regate_patch.active(active))
    torch.testing.assert_close(first[0][active], second[0][active], atol=0, rtol=0)
    torch.testing.assert_close(first[1:], second[1:], atol=0, rtol=0)
    assert not first[1][~active].any()


def test_flops_fall_with_positions() -> None:
    """Counted on what runs, and equal to what the engine says of itself."""
    decoder = Decoder()
    counter = FlopCounterMode(display=False)

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            with counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows products, not fused attention
                return gm.forward(*args)

        return run

    handle = regate_patch.patch(decoder, backend=counting, disable=["end_to_end"])  # whose attention it does not know
    x, counted = torch.randn(2, 64, 16), {}
    for k in (64, 32, 16):
        with regate_patch.active(torch.arange(k).expand(2, k)):
            decoder(x)
        counted[k] = counter.get_total_flops()
    assert counted[32] < 0.55 * counted[64]
    assert counted[16] < 0.3 * counted[64]
    (graph,) = (
        handle.statistics.graphs
    )  # which counts a causal kernel's half of the products; the math backend computes all
    assert {k: 2 * (graph.flops_linear * k + 2 * graph.flops_quadratic * k * k) for k in counted} == counted


def test_checkpoints_that_are_kept_on_the_host_are_refused_by_name() -> None:
    class Offloaded(Decoder):
        def forward(self, hidden_states: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                y: Tensor = checkpoint(super().forward, hidden_states, use_reentrant=False)
                return y

    decoder = Offloaded()
    regate_patch.patch(decoder, backend="eager")
    x, active = _random()
    with regate_patch.active(active), pytest.raises(regate_patch.UnsupportedGraphError, match="without offload=True"):
        decoder(x.float())


def test_graph_broken_at_every_layer_is_rewritten_layer_by_layer() -> None:
    decoder = Decoder("broken")
    handle = regate_patch.patch(decoder, backend="eager", allow_graph_breaks=True)
    x, active = _random()
    with regate_patch.active(active):
        expected = decoder(x.float())
    assert (handle.statistics.attention, handle.statistics.mlp) == (3, 3)
    assert all(graph.scatters == 1 for graph in handle.statistics.last)
    # What Dynamo gave up in this decoder says nothing of another one.
    other = copy.deepcopy(decoder)
    regate_patch.patch(other, backend="eager")
    with regate_patch.active(active), pytest.raises(regate_patch.UnsupportedGraphError, match="graph_break"):
        other(x.float())
    read = active & (active.cumsum(1) > 2)  # every layer reads what the one before gives at all positions
    for _ in range(3):
        with regate_patch.active(regate_patch.Active.from_mask(active).reading(read)):
            torch.testing.assert_close(decoder(x.float())[read], expected[read], atol=0, rtol=0)
    assert len(handle.statistics.last) == 3
