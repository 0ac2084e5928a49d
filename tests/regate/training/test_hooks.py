"""Hooks fire however PEFT calls the model inside."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

import regate
from tests.zoo import CORE

SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def test_peft_before_0_21_goes_past_the_inner_models_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # as PEFT 0.20 has it
        return self.model.forward(*args, **kwargs)

    monkeypatch.setattr(BaseTuner, "forward", forward)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    model, batch = get_peft_model(CORE["llava"].build(), lora), CORE["llava"].batch()
    model(**batch)  # as often, once before
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**batch).loss.backward()
    report = gate.report()
    assert report["labels_kept"] < report["labels_seen"]
    assert report["positions_computed"] < report["positions_seen"]
