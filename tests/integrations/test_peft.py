"""PEFT: adapters switched and merged while the gate is on; students in 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import regate
from model_adapters import conventional
from regate_patch import reference
from tests import oracle
from tests.zoo import CORE

pytestmark = pytest.mark.matrix
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0, logits="all")
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def _step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_is_the_reference(model: nn.Module, gate: regate.Gate, batch: dict[str, Tensor]) -> None:
    """A sparse step is the per-layer masked reference, adapters and all."""
    loss, grads = _step(model, batch)
    assert gate.last is not None
    last = gate.last
    assert int(last.active.sum()) < int(batch["attention_mask"].sum())
    with torch.no_grad():
        ungated = nn.Module.train(model, False)(**batch).loss  # evaluation is not gated
    model.train()
    assert abs(float(ungated) - float(loss)) > 1e-6
    masked = batch | {"labels": torch.where(last.kept, batch["labels"], -100)}
    decoder = conventional.decoder(model)
    regate.remove(model)
    with reference.masked(decoder.layers, last.active):
        expected, expected_grads = _step(model, masked)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    assert grads.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("after", ["first", "second", "merged", "disabled"])
def test_adapters_switched_under_the_gate(after: str) -> None:
    """The gate saw `first` run; what is computed afterwards is what PEFT was last told."""
    torch.manual_seed(0)
    model: Any = get_peft_model(CORE["llava"].build(), LORA, adapter_name="first")
    model.add_adapter("second", LORA)
    model.double()
    gate = regate.apply(model, SPARSE, teacher=None)
    batch = oracle.double(CORE["llava"].batch("right"))
    first, _ = _step(model, batch)
    if after == "second":
        model.set_adapter("second")
    elif after == "merged":
        model.merge_adapter()
        for parameter in model.base_model.model.lm_head.parameters():
            parameter.requires_grad_(True)  # merged weights are frozen: something has to get a gradient
    elif after == "disabled":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.base_model.disable_adapter_layers()
    again, _ = _step(model, batch)
    if after in ("second", "disabled"):
        assert abs(float(again) - float(first)) > 1e-6
    _assert_is_the_reference(model, gate, batch)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_student(bits: int, tmp_path: Path) -> None:
    """LoRA on a student of 8 or 4 bits trains gated, and its teacher is the quantized base model without LoRA."""
    name = "llava"
    CORE[name].build().save_pretrained(tmp_path)
    model: Any = type(CORE[name].build()).from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32
        ),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    quantized = [m for m in model.modules() if type(m).__name__.startswith("Linear") and type(m) is not nn.Linear]
    assert len(quantized) >= 14  # two layers of seven
    model = get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), LORA)
    model.train()
    gate = regate.apply(model, SPARSE)
    batch = CORE[name].batch("right")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    report = gate.report()
    assert report["steps_sparse"] == 4
    assert report["positions_computed"] < report["positions_seen"]
    assert report["attention_blocks"] == report["mlp_blocks"] == 2
    assert report["speedup_possible"] > 1.05
    assert report["teacher_samples"] == len(batch["input_ids"])
    assert losses[-1] < losses[0]
