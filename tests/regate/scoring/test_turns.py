"""Full turns beside sparse samples: who has them and how often, and that such a step is exact."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import regate
from model_adapters import Layout
from regate.memory.sharing import Exchange
from regate.memory.store import Store
from regate.scoring import turns
from regate.scoring.scorer import Samples
from regate.scoring.turns import Turns
from regate.training.segments import Segments
from regate_patch import reference
from tests import oracle
from tests.packing import packed, rows_of
from tests.zoo import CORE

HALF = regate.Config(warmup=0, cycle=2, full_steps=1, schedule="interleaved")


def samples(numbers: list[int], *, unlabelled: frozenset[int] = frozenset()) -> Samples:
    """A batch of samples, known by number."""
    names = [number.to_bytes(16, "big") for number in numbers]
    labels = torch.tensor([[-100, -100 if number in unlabelled else 7] for number in numbers])
    valid = torch.ones_like(labels, dtype=torch.bool)
    layout = Layout(labels.clamp(min=0), labels, valid, ~valid)
    return Samples(names, names, layout, {}, Segments((len(numbers), 2)))


class Run:
    """Forwards of some epochs, and who had a full turn in them."""

    def __init__(self, full_steps: int, cycle: int, *, seed: int = 0) -> None:
        config = regate.Config(cycle=cycle, full_steps=full_steps, schedule="interleaved", seed=seed)
        self.share = Fraction(full_steps, cycle)
        self.rule = Turns(config, Exchange(Store()))
        self.visits: Counter[int] = Counter()
        self.turns: Counter[int] = Counter()
        self.of_forwards: list[tuple[int, int]] = []  # rows, full ones

    def forward(self, numbers: list[int]) -> None:
        batch = samples(numbers)
        whole = self.rule.of(batch)
        assert whole is not None
        self.rule.took(batch, whole)
        self.visits.update(numbers)
        self.turns.update(number for number, had in zip(numbers, whole.tolist(), strict=True) if had)
        self.of_forwards.append((len(numbers), int(whole.sum())))

    def epochs(self, number: int, *, samples: int, rows: int, shuffled: bool, seed: int) -> None:
        order, draw = list(range(samples)), random.Random(seed)
        for _ in range(number):
            if shuffled:
                draw.shuffle(order)
            for start in range(0, samples, rows):
                self.forward(order[start : start + rows])

    def assert_even(self) -> None:
        owed = Fraction(0)
        for rows, whole in self.of_forwards:
            assert whole in (math.floor(rows * self.share), math.ceil(rows * self.share))
            owed += rows * self.share - whole
            assert abs(owed) < 2
        for number, visits in self.visits.items():
            assert abs(self.turns[number] - visits * self.share) < 3
        stored = dict(self.rule.exchange.store.items("owed"))
        assert len(stored) == len(self.visits)
        assert all(abs(float(turns[0])) < 4 for turns in stored.values())  # whatever the share's denominator


@settings(max_examples=25, deadline=None)
@given(
    cycle=st.sampled_from([2, 7, 8, 128]),
    full=st.integers(1, 127),
    number=st.integers(1, 40),
    rows=st.integers(1, 12),
    shuffled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_turns_are_even_over_steps_and_over_samples(
    cycle: int, full: int, number: int, rows: int, shuffled: bool, seed: int
) -> None:
    run = Run(full % cycle or 1, cycle, seed=seed)
    run.epochs(12, samples=number, rows=rows, shuffled=shuffled, seed=seed)
    run.assert_even()


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 64])
def test_an_epoch_that_divides_the_cycle(rows: int) -> None:
    """Steps that meet the same samples at the same place of each cycle must not give them all turns, or none."""
    run = Run(16, 128)
    run.epochs(16, samples=64, rows=rows, shuffled=False, seed=0)
    run.assert_even()
    assert all(1 <= run.turns[number] <= 3 for number in range(64))
    assert sum(run.turns.values()) == pytest.approx(128, abs=2)


def test_a_share_of_few_turns_in_many_visits() -> None:
    """What one visit is worth is less than 16 bits tell of a turn."""
    run = Run(1, 5000)
    for _ in range(5000):
        run.forward([7])
    assert run.turns[7] == 1


def test_samples_that_come_once_leave_turns_to_those_that_come_again() -> None:
    """Half of each batch is a stream, half a small set that is seen over and over."""
    run = Run(1, 8)
    for step in range(400):
        again = [(4 * step + i) % 20 for i in range(4)]
        run.forward([*again, *range(1000 + 4 * step, 1004 + 4 * step)])
    run.assert_even()
    assert sum(run.turns[number] for number in range(20)) == pytest.approx(200, abs=20)


def test_the_order_of_a_batch_does_not_matter() -> None:
    run = Run(3, 8)
    run.epochs(3, samples=30, rows=6, shuffled=True, seed=0)
    numbers = list(range(11))

    def chosen() -> list[int]:
        whole = run.rule.of(samples(numbers))
        assert whole is not None
        return sorted(number for number, had in zip(numbers, whole.tolist(), strict=True) if had)

    expected = chosen()
    assert len(expected) in (4, 5)
    for seed in range(5):
        random.Random(seed).shuffle(numbers)
        assert chosen() == expected


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_turns_at_once(micro_batches: int) -> None:
    """All of a forward's samples or none, as often as the share says, each in a cycle where an epoch divides it."""
    rule, had, forwards = Turns(regate.Config(cycle=8, full_steps=1), Exchange(Store())), Counter[int](), 0
    for step in range(320):
        for _micro in range(micro_batches):
            rule.forward(step)
            numbers = [4 * (step % 8) + i for i in range(4)]
            whole = rule.of(samples(numbers), at_once=True)
            assert whole is not None
            assert whole.all() == whole.any()
            had.update(number for number in numbers if whole[0])
            forwards += bool(whole[0])
    assert forwards == pytest.approx(40 * micro_batches, abs=4)
    assert len(had) == 32


@pytest.mark.parametrize("rows", [1, 3, 8, 12])
def test_ranks_give_turns_in_the_same_forwards(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever each has had before, lest all wait in every step for the one with a full row."""
    monkeypatch.setattr(turns, "ranks", lambda: 3)
    rules = [Turns(regate.Config(cycle=8, full_steps=1), Exchange(Store())) for _ in range(3)]
    given: list[int] = []
    for step in range(200):
        each = []
        for rank, rule in enumerate(rules):
            batch = samples([100 * rank + (rows * step + i) % (20 + rank) for i in range(rows)])
            rule.forward(step)
            whole = rule.of(batch)
            assert whole is not None
            rule.took(batch, whole)
            each.append(int(whole.sum()))
        assert each == each[:1] * 3
        assert each[0] in (rows // 8, -(-rows // 8))
        given.append(each[0])
    assert sum(given) == pytest.approx(200 * rows / 8, abs=13)  # a cycle of eight may begin within a turn
    assert sum(given[:64]) == pytest.approx(8 * rows, abs=5)


def test_a_forward_that_failed_took_no_turn() -> None:
    run = Run(1, 2)
    run.epochs(2, samples=8, rows=4, shuffled=True, seed=0)
    first, second = (run.rule.of(samples([0, 1, 2, 3])) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_samples_without_labels_have_no_turn() -> None:
    rule = Turns(HALF, Exchange(Store()))
    for numbers, expected in (([1, 2, 3, 4], 1), ([1, 2], 0)):
        whole = rule.of(samples(numbers, unlabelled=frozenset({1, 2})))
        assert whole is not None
        assert not whole[:2].any()
        assert int(whole.sum()) == expected


# -- on models --------------------------------------------------------------------------------------------


def _step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


ORACLES: list[tuple[str, dict[str, Any]]] = [
    ("llava", {}),
    ("llava", {"visual_keep": 0.5}),
    ("llava", {"alignment": "both", "explore": 0.5}),
    ("qwen2_5_vl", {"visual_keep": 0.5}),
    ("qwen2_5_vl", {"visual_keep": 0.5, "elided": "visible"}),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "changes"), ORACLES)
def test_a_step_with_full_rows_is_the_oracles(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the per-layer masked reference with masked labels; full rows keep all, the others their share."""
    torch._dynamo.reset()
    model, batch = CORE[name].build().double(), oracle.double(CORE[name].batch("right", rows=4))
    oracle.norms_in_double(model, monkeypatch)
    plain = copy.deepcopy(model)
    gate = regate.apply(model, replace(HALF, logits="all", **changes))
    valid = batch["attention_mask"].bool() if "elided" in changes else None
    image, labels = gate.adapter.layout(model, batch).visual, batch["labels"][:, 1:] != -100
    had = []
    for _ in range(2):
        loss, grads = _step(model, batch)
        last = gate.last
        assert last is not None
        assert not last.full
        whole = last.whole.all(1)
        had += whole.nonzero().flatten().tolist()
        assert last.kept[whole].sum() == labels[whole].sum()
        assert last.kept[~whole].sum() == math.ceil(int(labels[~whole].sum()) / 2)
        seen = (image & last.active).sum(1) / image.sum(1)
        assert (seen[whole] == 1).all()
        assert (seen[~whole] < 0.7).all() == ("visual_keep" in changes)
        masked = {**batch, "labels": torch.where(last.kept, batch["labels"], -100)}
        with reference.masked(plain.model.language_model.layers, last.active, valid):
            expected, expected_grads = _step(plain, masked)
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
        for n, grad in expected_grads.items():
            torch.testing.assert_close(grads[n], grad, atol=1e-10, rtol=0)
    assert sorted(had) == [0, 1, 2, 3]
    report = gate.report()
    assert (report["samples_whole"], report["samples_sparse"]) == (4, 4)
    assert (report["steps_sparse"], report["recompiles"]) == (1, 0)
    assert "4 of 8 in sparse steps were full samples, with every label kept (50%)" in str(report)
    assert "laid end to end" not in str(report)


def test_with_logits_at_kept_labels_alone() -> None:
    """The same loss and gradients, and losses of all labels of full rows are learnt from."""
    found = []
    for logits in ("all", "kept"):
        torch._dynamo.reset()
        model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("right", rows=4))
        gate = regate.apply(model, replace(HALF, logits=logits, budget="sample"), teacher=None)
        found.append((*_step(model, batch), gate))
    (loss, grads, gate), (short, gradients, other) = found
    torch.testing.assert_close(short, loss, atol=1e-6, rtol=0)  # transformers' losses are float32
    for n, grad in grads.items():
        torch.testing.assert_close(gradients[n], grad, atol=1e-6, rtol=1e-5)
    assert gate.last is not None
    for one in (gate, other):
        one.flush()
        unseen = [bool((losses == -1).any()) for _, losses in one.store.items("difficulty")]
        assert sorted(unseen) == [False, False, True, True]


def test_packed_samples_have_the_turns_of_rows_of_their_own() -> None:
    found = []
    for pack in (False, True):
        torch._dynamo.reset()
        model = CORE["llava"].build().double()
        gate = regate.apply(model, replace(HALF, visual_keep=0.5), teacher=None)
        steps = []
        for step in range(4):
            batch = rows_of("llava", 4, step % 2)
            loss, _ = _step(model, packed(model, batch) if pack else batch)
            last = gate.last
            assert last is not None
            steps.append((float(loss), last.labels_left[last.kept].tolist(), int((last.whole & last.valid).sum())))
        found.append(steps)
    for (loss, kept, whole), (its_loss, its_kept, its_whole) in zip(*found, strict=True):
        assert loss == pytest.approx(its_loss, abs=2e-6)
        assert kept == its_kept
        assert whole == its_whole > 0


def test_micro_batches_of_one_row_share_a_steps_turns() -> None:
    torch._dynamo.reset()
    model = CORE["llava"].build()
    config = regate.Config(warmup=1, cycle=4, full_steps=1, schedule="interleaved", final_full_steps=1, total_steps=6)
    gate = regate.apply(model, config, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = []
    for _ in range(6):
        rows = []
        for micro in range(8):
            model(**CORE["llava"].batch("none", rows=1, seed=micro)).loss.backward()
            assert gate.last is not None
            assert gate.last.whole.all() == gate.last.whole.any()
            rows.append(bool(gate.last.whole.any()))
        whole.append(sum(rows))
        optimizer.step()
        optimizer.zero_grad()
    assert whole[0] == whole[5] == 8
    assert all(1 <= n <= 3 for n in whole[1:5])
    assert sum(whole[1:5]) == pytest.approx(8, abs=1)
    assert gate.report()["steps_full"] == 2


def test_rows_that_are_filled_up_have_their_turns_at_once() -> None:
    """Gemma 3's images see themselves both ways: its rows cannot be laid end to end."""
    torch._dynamo.reset()
    model, batch = CORE["gemma3"].build(), CORE["gemma3"].batch("right", rows=2)
    gate = regate.apply(model, regate.Config(warmup=1, cycle=4, full_steps=1), teacher=None)
    optimizer, whole = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(9):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert gate.last is not None
        whole.append(gate.last.whole.any(1).tolist())
    assert whole[0] == [True, True]
    known = whole[2:]  # the first sparse step finds it out
    assert all(rows in ([False, False], [True, True]) for rows in known)
    assert 1 <= known.count([True, True]) <= 3
    assert "all samples of some forwards keep every label" in str(gate.report())


@pytest.mark.parametrize("schedule", ["interleaved", "cycled"])
def test_rows_that_are_filled_up_keep_a_share_of_their_own(schedule: Any) -> None:
    """Where the batch's whole budget would go to one row, the others would be filled up to it."""
    torch._dynamo.reset()
    model, batch = CORE["gemma3"].build(), CORE["gemma3"].batch("right", rows=2)
    config = regate.Config(warmup=0, full_steps=0, schedule=schedule, score=lambda m, ref, prior: _by_row(m))
    gate = regate.apply(model, config, teacher=None)
    labels, found = (batch["labels"][:, 1:] != -100).sum(1), []
    for _ in range(2):
        model(**batch).loss.backward()
        assert gate.last is not None
        found.append(gate.last.kept.sum(1))
    half = math.ceil(int(labels.sum()) / 2)
    assert found[0].tolist() == [1, half - 1]
    assert found[1].tolist() == torch.ceil(labels / 2).tolist() == gate.choose(batch).sum(1).tolist()
    assert 'each sample\'s own, as with budget="sample"' in str(gate.report())
    other = regate.apply(copy.deepcopy(model), config, teacher=None)
    other.load_state_dict(gate.state_dict())
    assert other.choose(batch).sum(1).tolist() == found[1].tolist()


def _by_row(m: Tensor) -> Tensor:
    """The last row first."""
    return torch.arange(len(m))[:, None].expand_as(m).float()


def test_stopping_and_resuming(tmp_path: Path) -> None:
    """What is owed and how far ahead the process is come back, for another choice would be another run."""

    def run(gate: regate.Gate, steps: range) -> list[list[bool]]:
        optimizer = torch.optim.SGD(gate.model.parameters(), lr=0.1)
        found = []
        for step in steps:
            gate.model(**CORE["llava"].batch("right", rows=3, seed=step % 3)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert gate.last is not None
            found.append(gate.last.whole.any(1).tolist())
        return found

    config = regate.Config(warmup=1, cycle=4, full_steps=1, schedule="interleaved")
    torch._dynamo.reset()
    whole = run(regate.apply(CORE["llava"].build(), config, teacher=None), range(12))
    gate = regate.apply(CORE["llava"].build(), config, teacher=None)
    first = run(gate, range(6))
    gate.save(tmp_path)
    other = regate.apply(CORE["llava"].build(), config, teacher=None)
    other.load(tmp_path)
    assert other.turns.ahead == gate.turns.ahead != 0
    assert other.store.count("owed") == 9
    assert first + run(other, range(6, 12)) == whole
    cycled = regate.apply(CORE["llava"].build(), regate.Config(), teacher=None)
    cycled.load_state_dict(regate.apply(CORE["llava"].build(), regate.Config(), teacher=None).state_dict())
    assert cycled.store.count("owed") == 0
