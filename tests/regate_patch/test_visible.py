"""Positions that are not computed but seen: the engine against the per-layer reference, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import regate_patch
from model_adapters import conventional
from model_adapters.checkpointing import followable_checkpoints
from regate_patch import Active, attention_visible, reference
from regate_patch.passes import causal
from tests import oracle
from tests.plain import Decoder, Style
from tests.zoo import CORE
from tests.zoo.common import Padding
from tests.zoo.releases import INDUCTOR_ON_CPU


def _model(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = CORE[name].double()
    oracle.norms_in_double(model, monkeypatch)
    return model


@pytest.mark.few(8)
@pytest.mark.parametrize("disable", [(), ("end_to_end",)], ids=["laid", "filled"])
@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("name", CORE)
def test_random_positions(
    name: str, padding: Padding, disable: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = _model(name, monkeypatch), oracle.double(CORE[name].batch(padding))
    active, visible = oracle.random_active(batch), batch["attention_mask"].bool()
    expected = oracle.masked(model, batch, active, visible=visible)
    found = oracle.engine(model, batch, active, visible=visible, padding_elided=True, disable=disable)
    oracle.assert_same(found, expected)
    hidden = oracle.masked(model, batch, active)
    assert not torch.allclose(expected.output, hidden.output)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", CORE)
def test_with_checkpointing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _model(name, monkeypatch), oracle.double(CORE[name].batch("right", seed=1))
    active, visible = oracle.random_active(batch, seed=1), batch["attention_mask"].bool()
    expected = oracle.masked(model, batch, active, visible=visible)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    oracle.assert_same(oracle.engine(model, batch, active, visible=visible, padding_elided=True), expected)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "padding_elided", [pytest.param(False, id="filled", marks=INDUCTOR_ON_CPU), pytest.param(True, id="laid")]
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_inductor(name: str, padding_elided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _model(name, monkeypatch), oracle.double(CORE[name].batch("left", seed=1))
    active, visible = oracle.random_active(batch, seed=1), batch["attention_mask"].bool()
    expected = oracle.masked(model, batch, active, visible=visible)
    found = oracle.engine(model, batch, active, backend="inductor", visible=visible, padding_elided=padding_elided)
    oracle.assert_same(found, expected, tolerance=1e-6)  # rotary angles are float32


class _SharedHeads(nn.Module):
    """A layer whose kernel is told that four heads of queries share two of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).split([16, 8, 8], -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + y.transpose(1, 2).flatten(2)


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(_SharedHeads() for _ in range(2)), False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


@pytest.mark.parametrize("checkpointed", [False, True])
def test_on_a_gpu_shared_heads_are_repeated_under_masks(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else attention would run on no fused kernel there, and hold all scores."""
    torch.manual_seed(0)
    decoder, x = _Layers().double(), torch.randn(3, 12, 16, dtype=torch.double)
    active, visible = torch.rand(3, 12) < 0.5, torch.ones(3, 12, dtype=torch.bool)

    def found() -> list[Tensor]:
        own = x.clone().requires_grad_()
        output = decoder(own)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
        loss = (output * weights * active[..., None]).sum()
        return [output[active], *torch.autograd.grad(loss, (own, *decoder.parameters()))]

    with reference.masked(decoder.layers, active, visible):
        expected = found()
    decoder.checkpointed = checkpointed
    graphs: dict[str, str] = {}
    for on_gpu in (False, True):
        monkeypatch.setattr(causal, "_on_gpu", lambda query, on_gpu=on_gpu: on_gpu)
        handle = regate_patch.patch(
            decoder, backend="eager", disable=("end_to_end",),
            observe=lambda name, gm: graphs.update({name: str(gm.graph)}),
        )  # fmt: skip
        with regate_patch.active(replace(Active.from_mask(active), visible=visible)):
            got = found()
        handle.remove()
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        assert graphs["insert"].count("enable_gqa: True") == 2
        assert graphs["heads"].count("enable_gqa: True") == (0 if on_gpu else 2)
        assert graphs["heads"].count("call_function[target=regate_patch.ops.repeat_heads]") == (4 if on_gpu else 0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_elsewhere_than_on_a_cpu_attention_alone_is_filled(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one mask for all layers."""
    model, batch = _model("qwen2_5_vl", monkeypatch), oracle.double(CORE["qwen2_5_vl"].batch("left"))
    active, visible = oracle.random_active(batch), batch["attention_mask"].bool()
    expected = oracle.masked(model, batch, active, visible=visible)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(attention_visible, "by_rows", lambda query: False)
    graphs: dict[str, str] = {}
    found = oracle.engine(
        model, batch, active, visible=visible, padding_elided=True,
        observe=lambda name, gm: graphs.update({name: str(gm.graph)}),
    )  # fmt: skip
    oracle.assert_same(found, expected)
    assert graphs["insert"].count("target=regate_patch.attention_visible.may_see]") == 1
    assert graphs["insert"].count("target=regate_patch.attention_visible.attend_filled]") == 2


def test_without_what_is_left_out_all_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _model("llava", monkeypatch), oracle.double(CORE["llava"].batch("left"))
    everything = batch["attention_mask"].bool()
    expected = oracle.dense(model, batch, everything)
    oracle.assert_same(oracle.engine(model, batch, everything, visible=everything), expected)


@pytest.mark.parametrize("style", ["pre_norm", "parallel", "parallel_two_adds", "gated", "one_head", "written_gelu"])
def test_decoders_of_other_designs(style: Style) -> None:
    decoder, x = Decoder(style).double(), torch.randn(3, 12, 16, dtype=torch.double)
    active, visible = torch.rand(3, 12) < 0.5, torch.ones(3, 12, dtype=torch.bool)
    with reference.masked(decoder.layers, active, visible):
        expected = decoder(x)
    regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(replace(Active.from_mask(active), visible=visible)):
        torch.testing.assert_close(decoder(x)[active], expected[active], atol=1e-12, rtol=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("padding_elided", [False, True], ids=["filled", "laid"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_graph_per_layer(checkpointing: bool, padding_elided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where parameters are sharded: visual features, which are added between graphs, move no position at rest."""
    model, batch = _model("qwen3_vl", monkeypatch), oracle.double(CORE["qwen3_vl"].batch("left"))
    active, visible = oracle.random_active(batch), batch["attention_mask"].bool()
    expected = oracle.masked(model, batch, active, visible=visible)
    oracle.cut_between_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"allow_graph_breaks": True, "padding_elided": padding_elided}
    with followable_checkpoints(conventional.decoder(model)):
        oracle.assert_same(oracle.engine(model, batch, active, visible=visible, **options), expected)
