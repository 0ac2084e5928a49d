"""Flash attention: the user's kernels stay where nothing is gated, and gated steps compute what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations import flex_attention

import regate
from regate.errors import PackedRowsError
from regate_patch import UnsupportedGraphError
from tests import flash, oracle
from tests.packing import packed, rows_of
from tests.zoo import CORE, members

FULL = regate.Config(warmup=1000, reference_weight=0)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0, reference_weight=0)
VISIBLE = replace(SPARSE, elided="visible", visual_keep=0.5)
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[str]]:
    torch._dynamo.reset()
    with flash.installed() as calls:
        yield calls


def _step(model: Any, batch: dict[str, Any], config: regate.Config | None = None) -> Step:
    gate = None if config is None else regate.apply(model, config)
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    if gate is not None:
        regate.remove(model)
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same(got: Step, expected: Step) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=2e-6, rtol=1e-6)  # transformers' losses are float32
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-8, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def _chosen(model: Any) -> Any:
    return model.config.get_text_config()._attn_implementation


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("name", "padding"),
    [
        *((name, "right") for name in CORE if name != "gemma3"),
        ("llava", "left"),
        ("qwen3_vl", "left"),
        ("llava", "none"),
    ],
)
def test_steps_are_those_of_the_same_model_with_kernels_that_can_be_followed(
    name: str, padding: Any, calls: list[str]
) -> None:
    """Full steps against the untouched model with flash attention; sparse ones against the gated model with SDPA."""
    batch = oracle.double(CORE[name].batch(padding))
    model = flash.use(CORE[name].double())
    untouched = _step(model, batch)
    assert calls
    _assert_same(_step(model, batch, FULL), untouched)
    assert _chosen(model) == "flash_attention_2"
    sparse = [_step(model, batch, config) for config in (SPARSE, VISIBLE)]
    model.set_attn_implementation({"text_config": "sdpa"})
    assert _chosen(model) == "sdpa"
    for step, config in zip(sparse, (SPARSE, VISIBLE), strict=True):
        _assert_same(step, _step(model, batch, config))


@pytest.mark.parametrize("implementation", ["flash_attention_3", "flash_attention_4", flash.OF_THE_HUB])
def test_other_packages_and_the_hub(implementation: str) -> None:
    batch = oracle.double(CORE["llava"].batch("right"))
    model = flash.use(CORE["llava"].double(), implementation)
    _assert_same(_step(model, batch, FULL), _step(model, batch))
    assert _chosen(model) == implementation


@pytest.mark.parametrize("padding", ["right", "left"])
def test_flex_attention(padding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", flash.flex)
    batch = oracle.double(CORE["llava"].batch(padding))
    model = CORE["llava"].double()
    model.model.language_model.set_attn_implementation("flex_attention")
    _assert_same(_step(model, batch, FULL), _step(model, batch))
    assert _chosen(model) == "flex_attention"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_packed_rows(name: str) -> None:
    rows = rows_of(name, 3, seed=0)
    model = flash.use(CORE[name].build().double())
    batch = packed(model, rows)
    _assert_same(_step(model, batch, FULL), _step(model, batch))


_HANDED_ON = pytest.mark.skipif(
    transformers.__version__ == "5.17.0", reason="its vision tower is handed the decoder's boundaries beside its own"
)


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=_HANDED_ON)])
def test_packed_rows_with_boundaries(name: str) -> None:
    rows = rows_of(name, 3, seed=0)
    model = flash.use(CORE[name].build().double())
    batch = packed(model, rows)
    boundaries = torch.nn.functional.pad(rows["attention_mask"].sum(1).cumsum(0), (1, 0)).int()
    longest = int(rows["attention_mask"].sum(1).max())
    kernel = {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    _assert_same(_step(model, batch | kernel, FULL), _step(model, batch | kernel))
    without = {k: v for k, v in batch.items() if k != "position_ids"}
    with pytest.raises(PackedRowsError, match="pass position_ids, too"):
        _step(model, without | kernel, FULL)


def test_boundaries_that_differ_between_batches_are_one_artefact() -> None:
    model = flash.use(CORE["llava"].build().double())
    gate = regate.apply(model, FULL)
    for seed in range(4):
        rows = rows_of("llava", 2 + seed, seed)
        longest = int(rows["attention_mask"].sum(1).max())
        model(**packed(model, rows), max_length_q=longest, max_length_k=longest).loss.backward()
    assert gate.report()["recompiles"] == 0


@pytest.mark.parametrize("window", [3, 30])
def test_windows(window: int) -> None:
    """Of Mistral's layers, narrower than the rows and wider."""
    model = flash.use(CORE["mistral3"].build().double())
    model.config.text_config.sliding_window = window
    batch = oracle.double(CORE["mistral3"].batch("right"))
    _assert_same(_step(model, batch, FULL), _step(model, batch))


def test_masks_that_say_more_than_the_kernels_know_are_refused() -> None:
    """Gemma 3's image tokens see one another; flash attention leaves that out, without a word."""
    specimen = members()["gemma3"]
    model = flash.use(specimen.build().double())
    with pytest.raises(UnsupportedGraphError, match="attn_implementation='sdpa'"):
        _step(model, oracle.double(specimen.batch("right")), FULL)
    assert _chosen(model) == "flash_attention_2"
