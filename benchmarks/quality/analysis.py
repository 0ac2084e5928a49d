"""What the records say: differences paired by seed, and what it cost to get as far as dense did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

import numpy as np

Record = dict[str, Any]
Measure = Callable[[Record], float]
Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Difference:
    """An arm's measure minus another's, by seed.

    Attributes:
        by_seed: the differences.
        low, high: of the 95% bootstrap interval of their mean.
    """

    by_seed: dict[int, float]
    low: float
    high: float

    @property
    def mean(self) -> float:
        return mean(self.by_seed.values())


def paired(records: Iterable[Record], arm: str, measure: Measure, *, base: str = "dense") -> Difference | None:
    """Over the seeds that both arms have; None where they share none."""
    of = {(record["arm"], record["seed"]): measure(record) for record in records}
    seeds = sorted(seed for name, seed in of if name == arm and (base, seed) in of)
    if not seeds:
        return None
    by_seed = {seed: of[arm, seed] - of[base, seed] for seed in seeds}
    return Difference(by_seed, *interval(list(by_seed.values())))


def interval(values: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """95% bootstrap interval of the mean: percentiles of the means of samples drawn with replacement."""
    random = np.random.default_rng(0)
    means = np.asarray(values)[random.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def curve(record: Record, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """(costs, accuracy on grounded words) at each look.

    "all_seconds" are those of steps and of the teacher, "flops" shares of those of dense training, which may take fewer
    steps than a run that is so many times `longer`.
    """
    points, longer = record["curve"], record.get("longer", 1)
    if cost == "all_seconds":
        costs = [point["seconds"] + point["teacher_seconds"] for point in points]
    elif cost == "flops" and "flops_dense" in record["report"]:
        costs = [longer * point["flops"] / record["report"]["flops_dense"] for point in points]
    elif cost == "flops":  # trained without a gate, which counts them
        costs = [longer * point["step"] / points[-1]["step"] for point in points]
    else:
        costs = [point[cost] for point in points]
    return np.asarray(costs, float), np.asarray([point["grounded"] for point in points], float)


def cost_to_reach(record: Record, target: float, cost: str) -> float | None:
    """Where the curve first reaches `target`, linear between looks; None if it never does."""
    costs, accuracy = curve(record, cost)
    if not (accuracy >= target).any():
        return None
    i = int((accuracy >= target).argmax())
    if i == 0:
        return float(costs[0])
    share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(costs[i - 1] + share * (costs[i] - costs[i - 1]))


def area(record: Record, budget: float, cost: str) -> float:
    """The mean accuracy on the way from cost 0 to `budget`, linear between looks."""
    costs, accuracy = curve(record, cost)
    grid = np.linspace(0, budget, 1001)
    return float(np.interp(grid, costs, accuracy).mean())


def late(record: Record) -> float:
    """What accuracy on grounded words still rose in the last quarter of a run, as a share of what it was in the end."""
    points = record["curve"]
    before = max((p for p in points if p["step"] <= 0.75 * points[-1]["step"]), key=lambda p: p["step"])
    last = points[-1]["grounded"]
    return float((last - before["grounded"]) / last) if last else 0.0


def fall(record: Record) -> float:
    """The most that accuracy on words that are not grounded was below what it had been before, on the way."""
    other = np.asarray([point["other"] for point in record["curve"]], float)
    return float((np.maximum.accumulate(other) - other).max())


@dataclass(frozen=True)
class Reached:
    """What it cost an arm to get as far as dense, as shares of dense's whole cost, one per seed that got there."""

    shares: dict[int, float]
    seeds: int


def reached(records: Sequence[Record], arm: str, cost: str, *, of_final: float = 1.0) -> Reached:
    """The cost at which an arm has `of_final` of dense's last accuracy, of each seed that begins below it."""
    dense = {record["seed"]: record for record in records if record["arm"] == "dense"}
    looks = {seed: curve(record, cost)[1] for seed, record in dense.items()}
    dense = {seed: record for seed, record in dense.items() if looks[seed][0] < of_final * looks[seed][-1]}
    some = [record for record in records if record["arm"] == arm and record["seed"] in dense]
    shares = {}
    for record in some:
        costs, _ = curve(dense[record["seed"]], cost)
        spent = cost_to_reach(record, of_final * looks[record["seed"]][-1], cost)
        if spent is not None:
            shares[record["seed"]] = spent / costs[-1]
    return Reached(shares, len(some))


def areas(records: Sequence[Record], arm: str, cost: str) -> dict[int, float]:
    """By seed, up to what the cheapest arm of that seed spent in all."""
    budgets: dict[int, float] = {}
    for record in records:
        total = float(curve(record, cost)[0][-1])
        budgets[record["seed"]] = min(total, budgets.get(record["seed"], total))
    return {r["seed"]: area(r, budgets[r["seed"]], cost) for r in records if r["arm"] == arm}


def ahead(records: Sequence[Record], arm: str, cost: str, *, base: str = "dense") -> dict[int, bool]:
    """Is an arm's area larger than another's, up to what the cheaper of the two spent? By the seeds that both have."""
    both = [record for record in records if record["arm"] in (arm, base)]
    own, others = areas(both, arm, cost), areas(both, base, cost)
    return {seed: own[seed] > others[seed] for seed in own if seed in others}


def final(name: str, part: Part) -> Measure:
    """A trained model's "grounded", "other" or "loss" on `part`; "free_running", made on test samples alone."""
    if name == "free_running":
        return lambda record: float(record["final"]["free_running"])
    return lambda record: float(record["final"][part][name])


def spent(cost: str) -> Measure:
    """A run's whole cost."""
    return lambda record: float(curve(record, cost)[0][-1])
