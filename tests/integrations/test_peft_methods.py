"""Every method of PEFT that adapts a language model: exact, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import regate
from model_adapters import conventional
from regate.errors import StoreMismatchError
from regate_patch import reference
from tests import oracle
from tests.zoo import CORE

pytestmark = pytest.mark.matrix
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
BATCH = oracle.double(CORE["llava"].batch("right"))
METHODS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS),
    "LoRA, dropout": lambda: peft.LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.3, **TARGETS),
    "LoRA, head saved": lambda: peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"], **TARGETS),
    "LoRA, all linear": lambda: peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"),
    "rsLoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, init_lora_weights=False, **TARGETS),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **TARGETS),
    "PiSSA": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, init_weights=False, **TARGETS),
}


def _adapted(method: str) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return peft.get_peft_model(CORE["llava"].build(), METHODS[method]()).double().train()


def _step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=2e-6, rtol=0)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-7, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def _assert_exact(model: Any, batch: dict[str, Any]) -> None:
    expected = _step(model, batch)
    gate = regate.apply(model, regate.Config(warmup=1, cycle=100, full_steps=0))
    _assert_same(_step(model, batch), expected)
    gate.step = 1
    got = _step(model, batch)
    last = gate.last
    assert last is not None
    assert not last.full
    regate.remove(model)
    with reference.masked(oracle.layers_of(conventional.decoder(model)), last.active):
        _assert_same(got, _step(model, batch | {"labels": last.labels_left}))


@pytest.mark.parametrize("method", [m for m in METHODS if "dropout" not in m])
def test_full_and_sparse_steps(method: str) -> None:
    _assert_exact(_adapted(method), BATCH)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_experts_whose_weights_are_parameters(parameters: list[str]) -> None:
    """As transformers writes them, for which PEFT has `target_parameters`; beside LoRA of layers."""
    torch._dynamo.reset()
    case = CORE["qwen3_vl_moe"]
    named = [f"mlp.experts.{name}" for name in parameters]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=named, init_lora_weights=False)
    model = peft.get_peft_model(case.double(), config).double().train()
    _assert_exact(model, oracle.double(case.batch("right")))


def test_dropout_of_adapters_does_not_hinder_the_proof() -> None:
    model = _adapted("LoRA, dropout")
    gate = regate.apply(model, regate.Config(warmup=1, cycle=100, full_steps=0), teacher=None)
    for step in range(2):
        gate.step = step
        loss, grads = _step(model, BATCH)
        assert torch.isfinite(loss)
        assert grads
    assert "every position" not in str(gate.report())
    assert gate.report()["recompiles"] == 0
    assert all(m.p == 0.3 for m in model.modules() if isinstance(m, nn.Dropout) and m.p)


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_the_base_model(method: str) -> None:
    """Adapters are off when it is asked, no copy is made, and its fingerprint is the plain model's."""
    plain = CORE["llava"].build().double()
    torch._dynamo.reset()
    of_plain = regate.apply(plain)
    assert of_plain._teacher is not None
    model = _adapted(method)
    if method == "PiSSA":  # it moves the largest directions out of the base weights
        with model.disable_adapter():
            pass
    gate = regate.apply(model)
    assert gate._teacher is not None
    assert gate._teacher.source == "live"
    if method != "PiSSA":
        assert gate._teacher.fingerprint() == of_plain._teacher.fingerprint()
        of_plain.precompute([BATCH], progress=False)
        gate.precompute([BATCH], progress=False)
        theirs, ours = dict(of_plain.store.items("reference")), dict(gate.store.items("reference"))
        assert theirs.keys() == ours.keys()
        for key, losses in theirs.items():
            assert ours[key] == pytest.approx(losses, abs=1e-2)


def test_one_store_for_the_same_base_model(tmp_path: Path) -> None:
    """A run saved and loaded again, its head trained: the teacher is the same, and so is the store."""
    model = _adapted("LoRA, head saved")
    gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0), store=str(tmp_path / "store"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _step(model, BATCH)
    optimizer.step()
    gate.flush()
    model.save_pretrained(tmp_path / "adapter")
    gate.remove()
    again = peft.PeftModel.from_pretrained(CORE["llava"].build().double(), tmp_path / "adapter", is_trainable=True)
    torch._dynamo.reset()
    regate.apply(again.train(), store=str(tmp_path / "store"))
    other = CORE["llava"].build().double()
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.down_proj.weight.add_(1.0)
    with pytest.raises(StoreMismatchError):
        regate.apply(peft.get_peft_model(other, METHODS["LoRA"]()), store=str(tmp_path / "store"))


def test_base_weights_that_change_are_noticed() -> None:
    model = _adapted("LoRA")
    regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0))
    _step(model, BATCH)
    with torch.no_grad():
        conventional.decoder(model).layers[0].mlp.up_proj.weight.mul_(2.0)
    _step(model, BATCH)  # its references are stored already
    with pytest.raises(StoreMismatchError, match="base weights trained or loaded"):
        model(**oracle.double(CORE["llava"].batch("right", seed=7)))


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_layers_that_take_part_at_random_are_refused_by_name(config: Any) -> None:
    torch._dynamo.reset()
    model = peft.get_peft_model(CORE["llava"].build(), config(r=4, **TARGETS))
    with pytest.raises(regate.RegateError, match=r"Lo(Ha|Kr)Config's layers draw a random number.*OFT"):
        regate.apply(model, teacher=None)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt tuning", "prefix tuning", "p-tuning"],
)
def test_virtual_tokens_are_refused_by_name(config: Any) -> None:
    torch._dynamo.reset()
    model = peft.get_peft_model(copy.deepcopy(CORE["llava"].build()), config())
    with pytest.raises(regate.RegateError, match=r"virtual tokens.*LoRA"):
        regate.apply(model, teacher=None)
