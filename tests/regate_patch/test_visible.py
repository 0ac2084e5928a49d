"""Positions that are not computed but seen: the engine against the per-layer reference, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import regate_patch
from model_adapters import conventional
from model_adapters.checkpointing import followable_checkpoints
from regate_patch import Active, attention_visible, reference
from regate_patch.passes import causal
from tests import oracle
from tests.plain import Decoder, Style
from tests.zoo import CORE
from tests.zoo.common import Padding
from tests.zoo.releases import not_with


def _model(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = CORE[name].double()
    oracle.norms_in_double(model, monkeypatch)
    return model


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


@pytest.mark.parametrize("name", CORE)
def test_with_checkpointing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _model(name, monkeypatch), oracle.double(CORE[name].batch("right", seed=1))
    active, visible = oracle.random_active(batch, seed=1), batch["attention_mask"].bool()
    expected = oracle.masked(model, batch, active, visible=visible)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    oracle.assert_same(oracle.engine(model, batch, active, visible=visible, padding_elided=True), expected)


@pytest.mark.parametrize("padding_elided", [False, True], ids=["filled", "laid"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_inductor(name: str, padding_elided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not padding_elided:
        not_with("torch 2.11.0", "inductor writes C++ that does not compile")
    model, batch = _model(name, monkeypatch), oracle.double(CORE[name].batch("left", seed=1))
    active, visible = oracle.random_active(batch, seed=1), batch["attention_mask"].bool()
    expected = oracle.masked(model, batch, active, visible=visible)
    found = oracle.engine(model, batch, active, backend="inductor", visible=visible, padding_elided=padding_elided)
    oracle.assert_same(found, expected, tolerance=1e-6)  # rotary angles are float32


@pytest.mark.parametrize("checkpointed", [False, True])
def test_on_a_gpu_shared_heads_are_repeated_under_masks(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else attention would run on no fused kernel there, and hold all scores."""
    not_with("transformers 5.17.0", "its attention repeats them by itself")
    model, batch = _model("qwen3_vl", monkeypatch), oracle.double(CORE["qwen3_vl"].batch("none"))
    active, visible = oracle.random_active(batch), batch["attention_mask"].bool()
    del batch["attention_mask"]  # without it the decoder leaves sharing to the kernel
    expected = oracle.masked(model, batch, active, visible=visible)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    graphs: dict[str, str] = {}
    for on_gpu in (False, True):
        monkeypatch.setattr(causal, "_on_gpu", lambda query, on_gpu=on_gpu: on_gpu)
        found = oracle.engine(
            model, batch, active, visible=visible, padding_elided=True, disable=("end_to_end",),
            observe=lambda name, gm: graphs.update({name: str(gm.graph)}),
        )  # fmt: skip
        oracle.assert_same(found, expected)
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
