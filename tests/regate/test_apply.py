"""What `regate.apply` does not take, it says: nothing that was asked for is passed over."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import regate
from regate import gate as gates
from regate.api import gate_of
from regate.errors import (
    ConfigError,
    GateNotAppliedError,
    LabelsError,
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
        ({"backend": "induktor"}, UnknownBackendError, r"'induktor'\. Choose 'auto', 'eager' or 'inductor'; torch has"),
        ({"keep": 0.5, "warmup": 3}, ConfigError, r"regate\.apply\(model, regate\.Config\(keep=0\.5, warmup=3\)\)"),
        ({"keep": 0.5, "teachr": None}, ConfigError, r"regate\.Config\(keep=0\.5\)"),
        ({"teachr": None}, ConfigError, "has no argument named 'teachr'"),
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
    with pytest.raises(ConfigError, match=r"new = regate\.apply\(model, config, store=gate\.store, teacher=untr"):
        gate.config = regate.Config(keep=0.25)
    for step in (-1, "3"):
        with pytest.raises(ConfigError, match="from 0, got"):
            gate.step = step  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"must be a regate\.Store, got 'x'; regate\.Store\(path\) opens one"):
        gate.store = "x"  # type: ignore[assignment]
    assert gate.step == 0
    assert gate.store.temporary


def _trained(model: nn.Module, teacher: Any = "auto", store: Any = None) -> regate.Gate:
    """A gate that has made two sparse steps."""
    gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0), teacher=teacher, store=store)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**CORE["llava"].batch()).loss.backward()
        optimizer.step()
    return gate


def test_other_settings_after_training(caplog: pytest.LogCaptureFixture) -> None:
    """As the message of `gate.config = ...` says; the store's references are those of before training."""
    model = CORE["llava"].build()
    untrained = copy.deepcopy(model)
    gate = _trained(model)
    step, references = gate.step, gate.store.count("reference")
    new = regate.apply(model, regate.Config(warmup=0, keep=0.25), store=gate.store, teacher=untrained)
    new.step = gate.step
    model(**CORE["llava"].batch()).loss.backward()
    assert new.step == step == 1
    assert new.store.count("reference") == references > 0
    assert new.report()["teacher_samples"] == 0
    assert "trained" not in caplog.text


@pytest.mark.parametrize("teacher", ["copy", "first"])
def test_a_trained_model_that_becomes_its_own_teacher_is_noted(teacher: Any) -> None:
    model = CORE["llava"].build()
    for made in (0, 2):
        gate = regate.apply(model, teacher=teacher)
        assert ("replaces has made" in str(gate.report())) == (made > 0)
        if not made:
            _trained(model, None)
    assert "has made 2 optimizer steps, and the teacher is the model as it is now, trained" in str(gate.report())
    assert "replaces" not in str(regate.apply(model, teacher=CORE["llava"].build()).report())


def test_the_model_of_before_may_be_its_teacher_again() -> None:
    model = CORE["llava"].build()
    weights = copy.deepcopy(model.state_dict())
    with regate.Store() as store:
        _trained(model, store=store)
        model.load_state_dict(weights)
        assert "replaces" not in str(regate.apply(model, store=store).report())


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


def test_a_gate_that_was_removed_chooses_and_learns_nothing() -> None:
    """Its teacher is gone, and other labels would be chosen without one."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    gate = regate.apply(model)
    state = gate.state_dict()
    gate.remove()
    for call in (lambda: gate.choose(batch), lambda: gate.precompute([batch]), lambda: gate.load_state_dict(state)):
        with pytest.raises(GateNotAppliedError, match="this gate was taken off LlavaForConditionalGeneration"):
            call()
    assert gate.state_dict().keys() == state.keys()
    assert gate.report()["steps_full"] == 0


@pytest.mark.parametrize("part", ["Parts", "Attached", "gather_by_layer"])
def test_a_gate_that_fails_leaves_the_model_as_it_was(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CORE["llava"].build()
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    monkeypatch.setattr(gates, part, lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        regate.apply(model)
    assert "forward" not in vars(model.model.language_model)
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert not any("_z3_leaf" in vars(m) for m in model.modules())


def test_precompute_needs_labels() -> None:
    gate, batch = regate.apply(CORE["llava"].build()), CORE["llava"].batch()
    del batch["labels"]
    with pytest.raises(LabelsError, match=r"for LlavaFor\w+ has no `labels`.*; it has input_ids, "):
        gate.precompute([batch], progress=False)
    with pytest.raises(LabelsError, match="has no `labels`"):
        gate.choose(batch)


@pytest.mark.parametrize(("elided", "noted"), [("hidden", True), ("visible", False)])
def test_hidden_visual_tokens_are_noted(elided: Any, noted: bool) -> None:
    config = regate.Config(visual_keep=0.5, elided=elided)
    report = regate.apply(CORE["llava"].build(), config, teacher=None).report()
    assert ("visual_keep=0.5 with elided='hidden'" in str(report)) == noted


@pytest.mark.parametrize("single", [True, False])
def test_precompute_takes_batches(single: bool) -> None:
    gate, batch = regate.apply(CORE["llava"].build()), CORE["llava"].batch()
    wrong: list[Any] = [batch, None, 3] if single else [["input_ids"], [tuple(batch.values())], torch.zeros(2, 3)]
    for batches in wrong:
        with pytest.raises(ConfigError, match=r"gate\.precompute takes what yields batches.*got \w+"):
            gate.precompute(batches, progress=False)
    assert gate.store.count("reference") == 0
