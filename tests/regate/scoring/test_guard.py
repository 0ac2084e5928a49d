"""The gate widens where what it leaves out gets worse, and is sparse again when that is over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from regate.memory.sharing import Exchange
from regate.memory.store import Store
from regate.scoring import guard
from regate.scoring.guard import WINDOW, Guard
from tests.zoo import CORE

CONFIG = regate.Config(warmup=0, cycle=4, full_steps=1, guard=0.1)
ROWS, LABELS = 8, 10
ENOUGH = 6 * WINDOW // ROWS  # forwards, until what was before is forgotten


def _see(some: Guard, easy: Any, *, hard: float = 2.0, whole: int = ROWS, times: int = 1) -> None:
    """Forwards in which the half of the labels that was difficult has one loss, and the others another, [N] or all."""
    m = torch.linspace(0, 1, LABELS).expand(ROWS, LABELS)
    losses = torch.where(m > 0.5, hard, torch.as_tensor(easy).reshape(-1, 1))
    for _ in range(times):
        some.see(m, losses, torch.ones(ROWS, LABELS, dtype=torch.bool), torch.arange(ROWS) < whole)
        some.take([some.give()])


def _seen(*easy: float) -> Guard:
    some = Guard(CONFIG)
    for loss in easy:
        _see(some, loss, times=ENOUGH)
    return some


def test_opens_where_easy_labels_get_worse() -> None:
    assert not _seen(0.5, 0.2, 0.29).step(sparse_next=True), "by less than 0.1"
    some = _seen(0.5, 0.2, 0.32)
    assert not some.step(sparse_next=False), "the schedule is full as it is"
    assert some.step(sparse_next=True)
    assert some.open
    assert not some.step(sparse_next=True), "once"
    assert some.open


def test_hard_labels_and_sparse_samples_tell_nothing() -> None:
    some = _seen(0.2)
    _see(some, 0.2, hard=9.0, times=ENOUGH)
    _see(some, 9.0, whole=0, times=ENOUGH)
    _see(some, float("nan"), times=ENOUGH)
    assert not some.step(sparse_next=True)


def test_it_takes_a_window_of_samples() -> None:
    some = Guard(CONFIG)
    _see(some, 0.2)
    _see(some, 5.0, times=2)
    assert not some.step(sparse_next=True)


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_noise_does_not_open_it(spread: float) -> None:
    """Samples differ, and no two see alike; the lowest average of many is lower than what they have."""
    random = torch.Generator().manual_seed(0)
    some = Guard(CONFIG)
    for _ in range(3000):
        _see(some, spread * (torch.randn(ROWS, generator=random) * 0.5).exp(), whole=2)
        assert not some.step(sparse_next=True)
    _see(some, 3 * spread, times=ENOUGH)
    assert some.step(sparse_next=True), "a rise is seen through it"


def test_closes_when_half_of_the_rise_is_gone() -> None:
    some = _seen(0.2, 0.4)
    assert some.step(sparse_next=True)
    for loss in (0.26, 0.24):
        assert some.open
        _see(some, loss, times=ENOUGH)
        some.step(sparse_next=True)
    assert not some.open


def test_what_full_steps_do_not_cure_is_the_lowest_from_then_on() -> None:
    some = _seen(0.2, 0.4)
    some.step(sparse_next=True)
    opened = [some.open]
    for _ in range(CONFIG.cycle):
        some.step(sparse_next=True)
        opened.append(some.open)
    assert opened == [True] * CONFIG.cycle + [False]
    assert not some.step(sparse_next=True)
    _see(some, 0.49, times=ENOUGH)
    assert not some.step(sparse_next=True)
    _see(some, 0.51, times=ENOUGH)
    assert some.step(sparse_next=True)


def test_a_budget_of_the_batch_leaves_out_the_easiest_of_all() -> None:
    """But for the hardest of each sample, and unless each keeps a share of its own."""
    m = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.7, 0.8, 0.9]])
    kept, left = torch.full((2, 4), 2.0), torch.ones(2, 4, dtype=torch.bool)
    easy = {False: [(0, 0), (0, 1), (0, 2), (1, 0)], True: [(0, 0), (0, 1), (1, 0), (1, 1)]}
    for apart, places in easy.items():
        some = Guard(regate.Config(guard=0.1, budget="batch"))
        for low in (0.2, 0.5):
            losses = kept.clone()
            losses[tuple(zip(*places, strict=True))] = low
            for _ in range(ENOUGH * ROWS):
                some.see(m, losses, left, torch.tensor([True, True]), apart=apart)
                some.take([some.give()])
            assert some.state_dict()["mean"] == pytest.approx(low, abs=0.01)
        assert some.step(sparse_next=True)


def test_ranks_see_together() -> None:
    ranks = [_seen(0.2), _seen(0.2)]
    for _ in range(ENOUGH):
        _see_apart(ranks[0], 0.2)
        _see_apart(ranks[1], 0.6)
        told = [rank.give() for rank in ranks]
        for rank in ranks:
            rank.take(told)
    assert [rank.step(sparse_next=True) for rank in ranks] == [True, True]
    assert ranks[0].state_dict() == ranks[1].state_dict()


def _see_apart(some: Guard, easy: float) -> None:
    losses = torch.full((ROWS, LABELS), easy)
    some.see(losses, losses, torch.ones(ROWS, LABELS, dtype=torch.bool), torch.ones(ROWS, dtype=torch.bool))


def test_a_process_alone_tells_itself() -> None:
    some = _seen(0.2)
    exchange = Exchange(Store(), beside=some)
    for step in range(ENOUGH):
        _see_apart(some, 0.5)
        exchange.tick(step)
    assert some.step(sparse_next=True)


def _foreseen(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As labels, what the model predicts: it has nothing easier."""
    with torch.no_grad():
        said = model.eval()(**batch).logits.argmax(-1)
    model.train()
    return torch.where(batch["labels"] == -100, -100, said.roll(1, 1))


def _run(model: nn.Module, gate: regate.Gate, batch: dict[str, Tensor], steps: int) -> list[bool]:
    """Which steps were full."""
    optimizer, full = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        assert gate.last is not None
        full.append(gate.last.full)
    return full


def test_a_gate_is_full_until_what_it_leaves_out_is_learnt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 4)
    monkeypatch.setattr(guard, "_SURE", 1)  # of so few samples
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that it is sure of something
    easy = batch | {"labels": _foreseen(model, batch)}
    config = regate.Config(warmup=0, cycle=100, full_steps=50, guard=0.1)
    other, untouched = copy.deepcopy(model), copy.deepcopy(model)
    gate = regate.apply(model, config, teacher=None)
    assert not any(_run(model, gate, easy, 8))
    full = _run(model, gate, batch, 8)
    assert not full[0], "labels must have been seen to be worse"
    assert all(full[4:])
    assert gate.report()["steps_guarded"] == sum(full)
    assert "labels that sparse steps leave out got worse" in str(gate.report())
    assert f"{sum(full)} of the full steps, since what is left out had got worse" in str(gate.report())
    state = gate.state_dict()
    full = _run(model, gate, easy, 12)
    assert full[0]
    assert not any(full[-4:]), "long before the cycle ends"
    # Resumed while it is open, a guard is open; a gate without one is not full for it.
    resumed = regate.apply(other, config, teacher=None)
    resumed.load_state_dict(state)
    assert _run(other, resumed, easy, 12) == full
    without = regate.apply(untouched, regate.Config(warmup=0, cycle=100, full_steps=50), teacher=None)
    without.load_state_dict(state)
    assert not any(_run(untouched, without, easy, 4))
    del state["guard"]  # of a run before there were guards
    resumed.load_state_dict(state)
    assert not resumed.scorer.guard.open


@pytest.mark.parametrize(
    "changes",
    [
        {"guard": 0.0}, {"guard": float("inf")}, {"guard": True}, {"full_steps": 0}, {"keep": 1.0},
        {"keep": 1.0, "visual_keep": 0.5},
        {"selection": "random"}, {"student_weight": -1.0}, {"student_weight": 0.0}, {"score": lambda m, ref, prior: m},
    ],
)  # fmt: skip
def test_settings_that_make_no_guard(changes: dict[str, Any]) -> None:
    with pytest.raises(regate.RegateError, match=r"Config\.guard"):
        regate.Config(**({"guard": 0.1} | changes))
