"""What decides which labels are kept: scores of the student's losses, the teacher's, or a user's function of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from regate.errors import ConfigError
from regate.scoring.difficulty import UNSEEN, update
from tests.steps import step
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)


@pytest.mark.parametrize(("student", "reference"), [(1.0, 0.5), (-1.0, 1.0), (0.0, -1.0)])
def test_scores_are_weighted_sums(student: float, reference: float) -> None:
    """On the second sight of a sample: student_weight*m + reference_weight*ref, top half kept."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=1)
    weights = {"student_weight": student, "reference_weight": reference}
    gate = regate.apply(model, regate.Config(warmup=1, cycle=100, full_steps=0, **weights))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    model.train()
    step(model, batch)
    optimizer.step()
    step(model, batch)
    m = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="none")
    gate.flush()
    (ref,) = [v for _, v in gate.store.items("reference")]
    (stored,) = [v for _, v in gate.store.items("difficulty")]
    at = (batch["labels"][0] != -100).nonzero()[:, 0]
    torch.testing.assert_close(torch.from_numpy(stored), m[at - 1], atol=2e-3, rtol=2e-3)
    d = student * m[at - 1] + reference * torch.from_numpy(ref)
    assert gate.last is not None
    best = at[d.argsort(descending=True)[: (len(at) + 1) // 2]].sort().values
    assert gate.last.kept[0].nonzero()[:, 0].tolist() == best.tolist()


def test_scores_by_a_function() -> None:
    """It gets what the sum is made of, and what it returns decides."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none")
    told: list[Tensor] = []

    def least(m: Tensor, ref: Tensor, prior: Tensor) -> Tensor:
        told[:] = [m, ref, prior]
        return -torch.maximum(m, ref)

    gate = regate.apply(model, regate.Config(warmup=1, cycle=100, full_steps=0, score=least))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        step(model, batch)
        optimizer.step()
    m, ref, prior = told
    assert gate.last is not None
    kept = gate.last.kept
    for row, labels in enumerate(batch["labels"] != -100):
        worst = torch.maximum(m, ref)[row]
        assert worst[kept[row]].max() <= worst[labels & ~kept[row]].min()
        assert (prior[row, labels] > 0).all()
        assert not torch.equal(m[row, labels], prior[row, labels])


@pytest.mark.parametrize("budget", ["batch", "sample"])
def test_scores_may_be_of_any_dtype(budget: Any) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right", rows=2)
    harder = regate.Config(warmup=0, full_steps=0, budget=budget, score=lambda m, ref, prior: m.argsort().argsort())
    gate = regate.apply(model, harder, teacher=None)
    model(**batch).loss.backward()
    assert gate.last is not None
    assert 0 < gate.last.labels_kept < int((batch["labels"] != -100).sum())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda m, ref, prior: m.sum(), r"got \[\]"),
        (lambda m, ref, prior: m / 0, "finite"),
        (lambda *x: None, "NoneType"),
    ],
)
def test_wrong_scores_are_named(wrong: Any, told: str) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none")
    regate.apply(model, regate.Config(warmup=0, cycle=100, full_steps=0, score=wrong), teacher=None)
    with pytest.raises(ConfigError, match=told):
        step(model, batch)


def test_exploring_draws_by_seed_andstep() -> None:
    """The same choice for a seed at a step, another at the next, as many labels each time."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=1)
    kept: dict[int, list[tuple[int, ...]]] = {}
    for seed in (0, 0, 1):
        gate = regate.apply(model, regate.Config(warmup=0, full_steps=0, explore=0.5, seed=seed), teacher=None)
        choices = []
        for _ in range(4):
            step(model, batch)
            assert gate.last is not None
            choices.append(tuple(gate.last.kept[0].nonzero()[:, 0].tolist()))
        assert kept.get(seed, choices) == choices
        kept[seed] = choices
        assert len(set(map(len, choices))) == 1
        regate.remove(model)
    assert len(set(kept[0])) > 2
    assert kept[0] != kept[1]


@pytest.mark.parametrize("seed", [1_796_016_379_050_586_131, 2**63, 2**70, -(2**70)])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=1)
    gate = regate.apply(model, regate.Config(warmup=0, full_steps=0, explore=0.5, seed=seed), teacher=None)
    step(model, batch)
    assert gate.last is not None
    assert 0 < int(gate.last.kept.sum()) < int((batch["labels"] != -100).sum())


def test_nonfinite_student_losses_are_not_remembered() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none")
    gate = regate.apply(model, FULL, teacher=None)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model(**batch)
    gate.flush()
    assert gate.report()["nonfinite_losses"] > 0
    assert all((v == -1).all() for _, v in gate.store.items("difficulty"))
    assert torch.isfinite(gate.scorer.prior.mean).all()


def test_copies_of_a_sample_in_a_batch_add_up() -> None:
    """Of four, one in its full turn shows every label, and the others half of them: both go into the average."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=1, answer=12)
    batch = {name: x.repeat(4, *[1] * (x.dim() - 1)) for name, x in batch.items()}
    gate = regate.apply(
        model, regate.Config(warmup=0, cycle=4, full_steps=1, ema_decay=0.75, budget="sample"), teacher=None
    )
    step(model, batch)
    assert gate.last is not None
    assert sorted(gate.last.kept.sum(1).tolist()) == [6, 6, 6, 12]
    (pending,) = gate.scorer._pending
    losses = torch.zeros(pending.kept.shape)
    losses[pending.kept] = pending.losses
    expected = torch.full(losses.shape[1:], UNSEEN)
    for row, kept in zip(losses, pending.kept, strict=True):
        expected = update(expected, row, kept, decay=0.75)
    gate.flush()
    ((_, stored),) = gate.store.items("difficulty")
    torch.testing.assert_close(torch.from_numpy(stored), expected[pending.samples.candidates[0]], atol=2e-3, rtol=2e-3)
    assert (stored != UNSEEN).all()
