"""The gate widens where what it leaves out gets worse, and is sparse again when that is over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regate
from regate.scoring import guard
from regate.scoring.guard import WINDOW, Guard
from tests.zoo import CORE

CONFIG = regate.Config(warmup=0, cycle=4, full_steps=1, guard=0.1, total_steps=1000)
ROWS, LABELS = 8, 64


def _see(some: Guard, easy: float, hard: float = 2.0, whole: int = ROWS) -> None:
    """A forward in which the half of the labels that was difficult has one loss, and the other another."""
    m = torch.linspace(0, 1, LABELS).expand(ROWS, LABELS)
    losses = torch.where(m > 0.5, hard, easy)
    some.see(m, losses, torch.ones(ROWS, LABELS, dtype=torch.bool), torch.arange(ROWS) < whole)


def _seen(*easy: float) -> Guard:
    some = Guard(CONFIG)
    for loss in easy:
        for _ in range(WINDOW * 2 // (ROWS * LABELS) * 8):
            _see(some, loss)
    return some


def test_opens_where_easy_labels_get_worse() -> None:
    assert not _seen(0.5, 0.2, 0.29).step(), "by less than 0.1"
    some = _seen(0.5, 0.2, 0.32)
    assert some.step()
    assert some.open
    assert not some.step(), "once"
    assert some.open


def test_hard_labels_and_sparse_samples_tell_nothing() -> None:
    some = _seen(0.2)
    for _ in range(100):
        _see(some, 0.2, hard=9.0)
        _see(some, 9.0, whole=0)
    assert not some.step()
    _see(some, float("nan"))
    assert not some.step()


def test_it_takes_a_window_of_labels() -> None:
    some = Guard(CONFIG)
    _see(some, 0.2)
    for _ in range(2):
        _see(some, 5.0)
    assert not some.step()


def test_closes_when_half_of_the_rise_is_gone() -> None:
    some = _seen(0.2, 0.4)
    assert some.step()
    for loss in (0.26, 0.24):
        assert some.open
        for _ in range(100):
            _see(some, loss)
        some.step()
    assert not some.open


def test_what_full_steps_do_not_cure_is_the_lowest_from_then_on() -> None:
    some = _seen(0.2, 0.4)
    some.step()
    opened = [some.open]
    for _ in range(CONFIG.cycle):
        some.step()
        opened.append(some.open)
    assert opened == [True] * CONFIG.cycle + [False]
    assert not some.step()
    for _ in range(100):
        _see(some, 0.49)
    assert not some.step()
    for _ in range(100):
        _see(some, 0.51)
    assert some.step()


def test_ranks_open_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def any_rank(here: bool) -> bool:
        asked.append(here)
        return True

    monkeypatch.setattr(guard, "any_rank", any_rank)
    some = _seen(0.2)
    assert some.step()
    assert some.open
    assert asked == [False]
    Guard(regate.Config()).step()
    assert asked == [False], "without a guard nobody is asked"


def test_goes_on_where_it_was() -> None:
    some, other = _seen(0.2, 0.4), Guard(CONFIG)
    some.step()
    other.load_state_dict(some.state_dict())
    for one in (some, other):
        _see(one, 0.1)
        one.step()
    assert other.state_dict() == some.state_dict()
    assert other.open


def _foreseen(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As labels, what the model predicts: it has nothing easier."""
    with torch.no_grad():
        said = model.eval()(**batch).logits.argmax(-1)
    model.train()
    return torch.where(batch["labels"] == -100, -100, said.roll(1, 1))


def test_a_gate_is_full_until_what_it_leaves_out_is_learnt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 16)
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that it is sure of something
    easy = batch | {"labels": _foreseen(model, batch)}
    gate = regate.apply(model, CONFIG, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    full = []

    def run(some: dict[str, Tensor], steps: int) -> None:
        for _ in range(steps):
            model(**some).loss.backward()
            optimizer.step()
            assert gate.last is not None
            full.append(gate.last.full)

    run(easy, 8)
    assert not any(full)
    run(batch, 8)
    opened = full.index(True)
    assert opened > 8, "labels must have been seen to be worse"
    assert all(full[opened : opened + CONFIG.cycle]), full
    assert gate.report()["steps_guarded"] == sum(full)
    assert "labels that sparse steps leave out got worse" in str(gate.report())
    assert "guard" in str(gate.report())
    state = gate.state_dict()
    run(easy, 12)
    assert not any(full[-4:])
    gate.load_state_dict(state)
    assert gate.scorer.guard.state_dict() == state["guard"]


@pytest.mark.parametrize("changes", [{"guard": 0.0}, {"guard": float("inf")}, {"guard": True}, {"full_steps": 0}])
def test_settings_that_make_no_guard(changes: dict[str, Any]) -> None:
    with pytest.raises(regate.RegateError, match=r"Config\.guard"):
        regate.Config(**({"guard": 0.1} | changes))
