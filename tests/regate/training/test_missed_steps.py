"""An update without gating is an error as soon as it can be known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regate
from regate.errors import NotGatedError
from tests.zoo import CORE

TWO = regate.Config(warmup=2, cycle=100, full_steps=0)
BATCH = CORE["llava"].batch("none", rows=1)


def test_labels_that_never_come_are_missed_at_the_first_update() -> None:
    """Not at the first sparse step, a hundred updates later."""
    model = CORE["llava"].build()
    regate.apply(model, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    logits = model(**{k: v for k, v in BATCH.items() if k != "labels"}).logits
    logits.mean().backward()
    with pytest.raises(NotGatedError, match=r"no forward has been gated so far.*got no `labels`"):
        optimizer.step()


def test_training_in_eval_mode_is_called_so() -> None:
    model = CORE["llava"].build().eval()
    regate.apply(model, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(**BATCH).loss.backward()
    with pytest.raises(NotGatedError, match=r"ran in eval mode.*model\.train\(\)"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["labels", "eval"])
def test_updates_by_hand_that_miss_the_gate(mode: str) -> None:
    """Known at the next forward."""
    model = CORE["llava"].build()
    regate.apply(model, teacher=None)
    model.train(mode == "labels")
    batch = {k: v for k, v in BATCH.items() if k != "labels"} if mode == "labels" else BATCH
    model(**batch).logits.mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(1e-3)
    with pytest.raises(NotGatedError, match="no forward has been gated so far"):
        model(**batch)


def test_a_model_that_is_never_called() -> None:
    model = CORE["llava"].build()
    regate.apply(model, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.forward(**BATCH).loss.backward()
    optimizer.step()
    with pytest.raises(NotGatedError, match="no training forward of LlavaForConditionalGeneration was called"):
        optimizer.step()


def test_evaluation_between_steps_is_no_miss() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(4):
        model.eval()
        model(**BATCH)  # with gradients, as some evaluate
        model.train()
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gate.report()["steps_missed"] == 0
    assert gate.report()["steps_sparse"] == 2


# -- other losses beside the gated one ------------------------------------------------------------------


def _train_projector(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """By a loss of its own."""
    optimizer.zero_grad()
    features: Tensor = model.model.multi_modal_projector(torch.randn(2, 4, 16))
    features.pow(2).mean().backward()
    optimizer.step()


def test_an_optimizer_of_another_loss_beside_is_not_counted() -> None:
    model: Any = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    beside = torch.optim.SGD(model.model.multi_modal_projector.parameters(), lr=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        assert gate.step == step
        optimizer.step()
        for _ in range(3):
            _train_projector(model, beside)
    assert gate.report()["steps_missed"] == 0
    (note,) = (line for line in str(gate.report()).splitlines() if line.startswith("note"))
    assert "SGD (of model.multi_modal_projector.linear_1.weight and 3 others) steps without a gated" in note


@pytest.mark.parametrize("on_unsupported", ["raise", "warn"])
def test_one_optimizer_of_both_losses_is_named(on_unsupported: Any) -> None:
    model: Any = CORE["llava"].build()
    gate = regate.apply(model, regate.Config(warmup=0), teacher=None, on_unsupported=on_unsupported)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(**BATCH).loss.backward()
    optimizer.step()
    if on_unsupported == "warn":
        _train_projector(model, optimizer)
        assert gate.report()["steps_missed"] == 1
        return
    with pytest.raises(NotGatedError, match=r"SGD \(of model\.\S+ and \d+ others\).*on_unsupported='warn'\) goes on"):
        _train_projector(model, optimizer)


def test_labels_that_stop_coming_are_missed_though_another_optimizer_stepped_before() -> None:
    """A second stage of training, with an optimizer of its own."""
    model: Any = CORE["llava"].build()
    regate.apply(model, regate.Config(warmup=0), teacher=None)
    first, second = (torch.optim.SGD(model.parameters(), lr=1e-3) for _ in range(2))
    model(**BATCH).loss.backward()
    first.step()
    unlabelled = {k: v for k, v in BATCH.items() if k != "labels"}
    model(**unlabelled).logits.mean().backward()
    second.step()
    model(**unlabelled).logits.mean().backward()
    with pytest.raises(NotGatedError, match="got no `labels`"):
        second.step()
