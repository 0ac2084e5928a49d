"""What the experiments show, in short: the README's table, and the targets that were set before they ran."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from statistics import mean, median
from typing import Any

from benchmarks.quality import analysis
from benchmarks.quality.analysis import Difference, Measure, Part, Record
from benchmarks.quality.markdown import shown, table

TASKS = {"captions": "drawings with captions", "clips": "short clips", "photos": "photographs"}
Cell = str
MET, MISSED = "met", "missed"
FEW = 3  # seeds, below which nothing is told
ENOUGH = 10  # of a headline arm
MARGIN = 0.01  # what counts as not worse
SETTLED = 0.02  # the share of its accuracy that a run on its plateau still learns in its last quarter, at most


def headline(found: dict[str, dict[str, Any]], part: Part) -> str:
    """The recommended settings beside dense training and beside a gate that draws labels, a row a task."""
    grounded = analysis.final("grounded", part)
    head = ["task", "answers, of positions", "words that need the image, minus dense", "random labels, minus dense"]
    costs = ["answer tokens learnt from", "seconds, teacher included", "98% of dense's accuracy by, of its tokens"]
    lines = [head + costs]
    for name, told in TASKS.items():
        runs = found[name]["runs"] if name in found else []
        paired = {arm: analysis.paired(runs, arm, grounded) for arm in ("regate", "random")}
        if paired["regate"] is None:
            continue
        differences = [_seeded(difference) for difference in paired.values()]
        spent = f"{_tokens(runs):.0%}", f"{mean(_seconds(runs, 'regate')):.0%}"
        by = _share_reached(runs, "regate", "answer_tokens")[1]
        lines.append([told, f"{_answers(runs):.0%}", *differences, *spent, by])
    return table(lines)


def targets(found: dict[str, dict[str, Any]], part: Part) -> str:
    """A row for each target, a column for each task; empty where it has no such runs, or the target is not of it."""
    tasks = [name for name in TASKS if name in found]
    grounded, other, whole = (analysis.final(name, part) for name in ("grounded", "other", "free_running"))
    rows: list[tuple[str, Callable[[list[Record]], Cell]]] = [
        ("dense is on its plateau: it learnt at most 2% of what it knows in its last quarter", _all_settled),
        (
            "`regate` is no more than a point below dense on grounded words, its interval included",
            lambda runs: _above(analysis.paired(runs, "regate", grounded), -MARGIN),
        ),
        ("the same where dense was on its plateau", lambda runs: _above(_of_settled(runs, grounded), -MARGIN)),
        ("and has 0.99 of its accuracy on other words", lambda runs: _share_of_dense(runs, other, 0.99)),
        *(
            [("and no fewer whole answers", lambda runs: _not_below(analysis.paired(runs, "regate", whole)))]
            if part == "test"
            else []
        ),
        (
            "`regate` is ahead of `random`",
            lambda runs: _above(analysis.paired(runs, "regate", grounded, base="random"), 0.0),
        ),
        (
            "the sum of both scores (`sample`) is not behind the `student`'s alone",
            lambda runs: _not_below(analysis.paired(runs, "sample", grounded, base="student")),
        ),
        (
            "nor behind the `reference`'s alone",
            lambda runs: _not_below(analysis.paired(runs, "sample", grounded, base="reference")),
        ),
        (
            "98% of dense's accuracy by half of its answer tokens",
            lambda runs: _reached(runs, "regate", "answer_tokens", 0.50),
        ),
        (
            "and by 65% of its seconds, where answers are 40% of positions",
            lambda runs: _reached(runs, "regate", "all_seconds", 0.65) if _answers(runs) >= 0.4 else "",
        ),
        (
            "the same with `keep25`",
            lambda runs: _reached(runs, "keep25", "all_seconds", 0.65) if _answers(runs) >= 0.4 else "",
        ),
        (
            "a quarter of the visual tokens, the others visible, costs no more than a point, its interval included",
            lambda runs: _above(analysis.paired(runs, "visual25-visible", grounded), -MARGIN),
        ),
        ("and takes half of dense's seconds", lambda runs: _at_most(_seconds(runs, "visual25-visible"), 0.50)),
    ]  # fmt: skip
    lines = [["target", *tasks]]
    lines += [[told, *(measure(found[task]["runs"]) for task in tasks)] for told, measure in rows]
    return "## What was to be shown\n\n" + table([line for line in lines if any(line[1:])])


def _above(found: Difference | None, least: float) -> Cell:
    """Is the whole interval?"""
    if found is None or len(found.by_seed) < FEW:
        return ""
    return f"{_seeded(found)}: {MET if found.low > least else MISSED}"


def _not_below(found: Difference | None) -> Cell:
    """By no more than a point, where the seeds tell."""
    if found is None or len(found.by_seed) < FEW:
        return ""
    verdict = MET if found.low > -MARGIN else MISSED if found.high < 0 else "not told"
    return f"{_seeded(found)}: {verdict}"


def _settled(runs: list[Record]) -> dict[int, bool]:
    """Of each seed: was dense training on its plateau in the end?"""
    return {run["seed"]: analysis.late(run) <= SETTLED for run in runs if run["arm"] == "dense"}


def _all_settled(runs: list[Record]) -> Cell:
    settled = _settled(runs)
    if len(settled) < FEW:
        return ""
    return f"{sum(settled.values())} of {len(settled)} seeds: {MET if all(settled.values()) else MISSED}"


def _of_settled(runs: list[Record], measure: Measure) -> Difference | None:
    settled = _settled(runs)
    return analysis.paired([run for run in runs if settled.get(run["seed"])], "regate", measure)


def _seconds(runs: list[Record], arm: str) -> list[float]:
    """A run's, teacher included, over dense's, by seed."""
    spent = {(run["arm"], run["seed"]): analysis.spent("all_seconds")(run) for run in runs}
    return [spent[arm, seed] / n for (name, seed), n in spent.items() if name == "dense" and (arm, seed) in spent]


def _at_most(shares: list[float], most: float) -> Cell:
    return f"{mean(shares):.0%}: {MET if mean(shares) <= most else MISSED}" if len(shares) >= FEW else ""


def _seeded(found: Difference | None) -> Cell:
    return "" if found is None else f"{shown(found)}, {len(found.by_seed)} seeds"


def _share_of_dense(runs: list[Record], measure: Measure, least: float) -> Cell:
    of = {(run["arm"], run["seed"]): measure(run) for run in runs}
    seeds = [seed for arm, seed in of if arm == "regate" and of.get(("dense", seed))]
    if len(seeds) < FEW:
        return ""
    share = mean(of["regate", seed] / of["dense", seed] for seed in seeds)
    return f"{share:.3f}: {MET if share >= least else MISSED}"


def _reached(runs: list[Record], arm: str, cost: str, most: float) -> Cell:
    share, told = _share_reached(runs, arm, cost)
    return f"{told}: {MET if share <= most else MISSED}" if told else ""


def _share_reached(runs: list[Record], arm: str, cost: str) -> tuple[float, Cell]:
    """The median over seeds, of which some may never get there, and in words."""
    found = analysis.reached(runs, arm, cost, of_final=0.98)
    if found.seeds < FEW:
        return inf, ""
    share = median([*found.shares.values(), *[inf] * (found.seeds - len(found.shares))])
    shown_ = "never" if share == inf else f"{share:.0%}"
    return share, f"{shown_}, {len(found.shares)} of {found.seeds} got there"


def _tokens(runs: list[Record]) -> float:
    """Answer tokens that `regate` learns from, over dense's."""
    spent = {(run["arm"], run["seed"]): run["curve"][-1]["answer_tokens"] for run in runs}
    return mean(
        spent["regate", seed] / n for (arm, seed), n in spent.items() if arm == "dense" and ("regate", seed) in spent
    )


def _answers(runs: list[Record]) -> float:
    """Answer tokens over positions of dense training."""
    ends = [run["curve"][-1] for run in runs if run["arm"] == "dense"]
    return mean(end["answer_tokens"] / end["positions"] for end in ends) if ends else 0.0
