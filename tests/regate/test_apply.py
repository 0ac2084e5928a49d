"""What `regate.apply` does not take, it says: nothing that was asked for is passed over."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import regate
from regate.api import gate_of
from regate.errors import (
    ConfigError,
    GateNotAppliedError,
    StoreError,
    StoreMismatchError,
    UnknownArchitectureError,
)
from regate_patch import NotElidedError, UnknownBackendError
from tests.zoo import CORE


@pytest.mark.parametrize("model", [None, [], "llava"])
def test_a_model_is_a_module(model: Any) -> None:
    with pytest.raises(UnknownArchitectureError, match=r"got \w+; a trainer's is trainer\.model"):
        regate.apply(model)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"config": {"keep": 0.5}}, ConfigError, r"regate\.Config\(keep=\.\.\., \.\.\.\), got dict"),
        ({"teacher": "4bits"}, ConfigError, "'4bit', 'first', 'precomputed'.*got '4bits'"),
        ({"teacher": 3, "config": regate.Config(keep=1.0)}, ConfigError, "got 3"),
        ({"teacher": nn.Linear(2, 2)}, UnknownArchitectureError, "this is no teacher: no adapter serves Linear"),
        ({"on_unsupported": "ignore"}, ConfigError, "'raise', 'warn'"),
        ({"adapter": "llava"}, ConfigError, r"adapter must be a regate\.ModelAdapter.*got 'llava'"),
        ({"adapter": {}}, ConfigError, r"adapter must be .*got \{\}"),
        ({"adapter": regate.ModelAdapter}, ConfigError, "adapter must be .*got <class"),
        ({"store": ""}, StoreError, "the name of a directory.*got ''"),
        ({"store": True}, StoreError, "got True"),
        ({"backend": "induktor"}, UnknownBackendError, "'induktor'; torch has .*'inductor'"),
    ],
)
def test_a_choice_is_one_of_those_there_are(asked: dict[str, Any], error: type[Exception], said: str) -> None:
    model = CORE["llava"].build()
    with pytest.raises(error, match=said):
        regate.apply(model, **asked)
    assert gate_of(model) is None
    assert "forward" not in vars(model.model.language_model)


@pytest.mark.parametrize("refused", ["backend", "store"])
def test_a_teacher_that_was_given_to_what_is_refused_is_as_it_was(refused: str) -> None:
    model, teacher = CORE["llava"].build(), CORE["llava"].build().train()
    with regate.Store() as store:
        store.bind({"weights": "of another", "architecture": "another"})
        asked = {"backend": "induktor"} if refused == "backend" else {"store": store}
        with pytest.raises(UnknownBackendError if refused == "backend" else StoreMismatchError):
            regate.apply(model, teacher=teacher, **asked)
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(part.training for part in teacher.modules())
    assert all("forward" not in vars(of.model.language_model) for of in (model, teacher))


def test_another_tokenizers_teacher_that_nobody_knows() -> None:
    other = SimpleNamespace(is_fast=True, all_special_ids=[], decode=str, get_vocab=lambda: {"a": 1})
    teacher = regate.CrossTokenizerTeacher(nn.Linear(2, 2), other, other)
    with pytest.raises(UnknownArchitectureError, match="this is no teacher: no adapter serves Linear"):
        regate.apply(CORE["llava"].build(), teacher=teacher)
    with pytest.raises(UnknownArchitectureError, match="no adapter serves Linear"):
        regate.count_tokens(nn.Linear(2, 2), [])


def test_what_cannot_be_set_on_a_gate() -> None:
    gate = regate.apply(CORE["llava"].build())
    with pytest.raises(ConfigError, match=r"regate\.apply\(model, config, store=gate\.store\)"):
        gate.config = regate.Config(keep=0.25)
    for step in (-1, "3"):
        with pytest.raises(ConfigError, match="from 0, got"):
            gate.step = step  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"must be a regate\.Store, got 'x'; regate\.Store\(path\) opens one"):
        gate.store = "x"  # type: ignore[assignment]
    assert gate.step == 0
    assert gate.store.temporary


@pytest.mark.parametrize("logits", ["kept", "all"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_decoder_that_is_replaced_later(logits: Any, steps: int) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    regate.apply(model, regate.Config(warmup=1000, logits=logits), teacher=None)
    for _ in range(steps):
        model(**batch).loss.backward()
    model.model.language_model = copy.deepcopy(model.model.language_model)
    with pytest.raises(NotElidedError, match=r"was replaced after regate.apply.*call regate.apply\(model\) again"):
        model(**batch)
    regate.apply(model, teacher=None)
    model(**batch).loss.backward()


@pytest.mark.parametrize("model", [None, 3, "llava"])
def test_nothing_to_remove_a_gate_from(model: Any) -> None:
    with pytest.raises(GateNotAppliedError, match="no gate is applied to this"):
        regate.remove(model)


@pytest.mark.parametrize("single", [True, False])
def test_precompute_takes_batches(single: bool) -> None:
    gate, batch = regate.apply(CORE["llava"].build()), CORE["llava"].batch()
    wrong: list[Any] = [batch, None, 3] if single else [["input_ids"], [tuple(batch.values())], torch.zeros(2, 3)]
    for batches in wrong:
        with pytest.raises(ConfigError, match=r"gate\.precompute takes what yields batches.*got \w+"):
            gate.precompute(batches, progress=False)
    assert gate.store.count("reference") == 0
