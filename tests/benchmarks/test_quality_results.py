"""What runs are made into: records gathered from folders, statistics that find known answers, targets, verdicts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import analysis, arms, defaults, findings, results, seconds, summary


def _ran(arm: str, *, steps: int = 1, loss: float = 2.0, seed: int = 0) -> dict[str, Any]:
    look = {"step": 0, "loss": loss, "grounded": 0.0}
    made = {"command": "", "commit": "0123456789abcdef", "device": {"cpu": "of the test", "load_average": 1}}
    return {
        "task": "t", "arm": arm, "seed": seed, "settings": {"steps": steps}, "source": "", "curve": [look],
        "final": {}, "calibration": [], "report": {}, "made": made,
    }  # fmt: skip


def _gather(folder: Path, *records: dict[str, Any]) -> set[tuple[str, str, int]]:
    """Of what lies in a new folder of runs, beside what was gathered before."""
    runs = folder / f"runs{len(list(folder.iterdir()))}"
    runs.mkdir()
    for record in records:
        (runs / f"{record['arm']}-{record['seed']}.json").write_text(json.dumps(record))
    results.gather(runs, folder / "results")
    return results.ran(folder / "results")


def test_runs_are_added_to_those_before(tmp_path: Path) -> None:
    _gather(tmp_path, _ran("dense"), _ran("regate"))
    found = _gather(tmp_path, _ran("dense", seed=1), _ran("regate", loss=2.0001))
    assert found == {("t", "dense", 0), ("t", "regate", 0), ("t", "dense", 1)}
    runs = results.load(tmp_path / "results")["t"]["runs"]
    assert [(run["arm"], run["seed"], run["curve"][0]["loss"]) for run in runs] == [
        ("dense", 0, 2.0), ("regate", 0, 2.0001), ("dense", 1, 2.0),
    ]  # fmt: skip
    assert all(run["made"] == {"commit": "012345678", "cpu": "of the test"} for run in runs)


def test_runs_of_different_settings_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(results.MixedRunsError, match="regate, seed 0"):
        _gather(tmp_path, _ran("dense"), _ran("regate", steps=2))
    _gather(tmp_path, _ran("dense"))
    with pytest.raises(results.MixedRunsError, match="other settings than"):
        _gather(tmp_path, _ran("regate", steps=2))


def test_runs_from_other_weights_are_not_mixed(tmp_path: Path) -> None:
    _gather(tmp_path, _ran("dense"))
    with pytest.raises(results.MixedRunsError, match="same weights"):
        _gather(tmp_path, _ran("regate", loss=2.1))


@pytest.mark.slow
def test_settings_that_came_later_have_their_defaults(tmp_path: Path) -> None:
    _gather(tmp_path, _ran("dense") | {"settings": {"steps": 1, "link_steps": 0}})
    assert _gather(tmp_path, _ran("regate")) == {("t", "dense", 0), ("t", "regate", 0)}


def _record(arm: str, seed: int, accuracy: list[float], cost: float = 10.0, *, answers: float = 1.0) -> dict[str, Any]:
    """`answers`: the share of its positions that are answer tokens."""
    curve = [
        {"step": i, "grounded": a, "answer_tokens": cost * i, "positions": cost * i / answers, "seconds": cost * i,
         "teacher_seconds": 1.0}
        for i, a in enumerate(accuracy)
    ]  # fmt: skip
    test = {"grounded": accuracy[-1], "other": 0.9}
    return {"arm": arm, "seed": seed, "curve": curve, "final": {"test": test, "free_running": 0.5}}


def test_differences_are_paired_by_seed() -> None:
    shared = {0: 0.5, 1: 0.7, 2: 0.9}  # seeds differ far more than arms
    runs = [_record("dense", seed, [0.0, a]) for seed, a in shared.items()]
    runs += [_record("regate", seed, [0.0, a + 0.01 * (seed + 1)]) for seed, a in shared.items()]
    runs.append(_record("regate", 9, [0.0, 0.0]))  # no partner
    found = analysis.paired(runs, "regate", analysis.final("grounded", "test"))
    assert found is not None
    assert list(found.by_seed) == [0, 1, 2]
    assert found.mean == pytest.approx(0.02)
    assert 0.0099 < found.low < 0.02 < found.high < 0.0301
    assert analysis.paired(runs, "random", analysis.final("grounded", "test")) is None


def test_runs_cost_what_their_steps_do_in_turns(tmp_path: Path) -> None:
    timed = {"dense": seconds.Cost(1.0, 1.0, 0.0), "cycled": seconds.Cost(1.1, 0.5, 3.0)}
    path = tmp_path / "seconds.json"
    path.write_text(json.dumps({"tasks": {"t": {arm: dataclasses.asdict(cost) for arm, cost in timed.items()}}}))
    settings = {"steps": 8, "schedule": {"warmup": 2, "cycle": 4, "full_steps": 1}}
    runs = [{"arm": arm, "curve": [{"step": step} for step in (0, 2, 8)]} for arm in timed]
    found = seconds.by_turns("t", {"settings": settings, "runs": runs}, path)["runs"]
    assert [look["seconds"] for look in found[0]["curve"]] == [0, 2, 8]
    full = [0, 1, 2, 6]  # warm-up, and one in four
    assert [look["seconds"] for look in found[1]["curve"]] == pytest.approx([0, 2.2, 1.1 * len(full) + 0.5 * 4])
    assert [look["teacher_seconds"] for look in found[1]["curve"]] == [3.0] * 3
    with pytest.raises(KeyError, match="not timed: regate"):
        seconds.by_turns("t", {"settings": settings, "runs": [{"arm": "regate", "curve": []}]}, path)


def test_defaults_are_those_of_the_library() -> None:
    for choice in defaults.CHOICES:
        for other in choice.others:
            own, changed = arms.ARMS["regate"].config or {}, arms.ARMS[other].config or {}
            differing = {name for name in {*own, *changed} if own.get(name) != changed.get(name)}
            assert {*choice.settings} & differing, f"{other} does not change {choice.settings}"


def test_interval_is_that_of_the_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    low, high = analysis.interval(values)
    centre, error = float(torch.tensor(values).mean()), float(torch.tensor(values).std()) / 20
    assert low == pytest.approx(centre - 1.96 * error, abs=0.01)
    assert high == pytest.approx(centre + 1.96 * error, abs=0.01)


def test_the_deepest_fall_on_the_way() -> None:
    looks = [{"other": x} for x in (0.5, 0.9, 0.7, 0.95, 0.94)]
    assert analysis.fall({"curve": looks}) == pytest.approx(0.2)


def test_cost_to_reach_and_area() -> None:
    dense, regate = _record("dense", 0, [0.0, 0.4, 0.8]), _record("regate", 0, [0.0, 0.8, 0.9], cost=5.0)
    assert analysis.cost_to_reach(regate, 0.8, "answer_tokens") == pytest.approx(5.0)
    assert analysis.cost_to_reach(dense, 0.6, "answer_tokens") == pytest.approx(15.0)
    assert analysis.cost_to_reach(dense, 0.81, "answer_tokens") is None
    assert analysis.reached([dense, regate], "regate", "answer_tokens").shares == {0: pytest.approx(0.25)}
    assert analysis.reached([dense, regate], "regate", "all_seconds").shares == {0: pytest.approx(6 / 21)}
    there = [_record(arm, 1, [0.8, 0.8]) for arm in ("dense", "regate")]  # says nothing of what it costs to get there
    assert analysis.reached([dense, regate, *there], "regate", "answer_tokens").seeds == 1
    areas = analysis.areas([dense, regate], "dense", "answer_tokens")
    assert areas == {0: pytest.approx(0.2)}  # up to 10, regate's all
    assert analysis.ahead([dense, regate, there[0]], "regate", "answer_tokens") == {0: True}
    assert analysis.ahead([dense, regate], "dense", "answer_tokens", base="regate") == {0: False}


def test_targets_are_held_to_what_runs_show() -> None:
    runs = [_record("dense", seed, [0.0, 0.4, 0.8], answers=0.5) for seed in range(10)]
    runs += [_record("regate", seed, [0.0, 0.79, 0.82], cost=5.0, answers=0.5) for seed in range(10)]
    runs += [_record("random", seed, [0.0, 0.4, 0.9], cost=5.0, answers=0.5) for seed in range(10)]
    rows = {
        told.strip(): cell.strip()
        for line in summary.targets({"captions": {"runs": runs}}, "test").splitlines()[4:]
        for told, cell in [line.strip("|").split("|")]
    }
    told = {target: cell.rpartition(": ")[2] for target, cell in rows.items()}
    assert set(told.values()) == {"met", "missed"}
    assert told["`regate` is ahead of `random`"] == "missed"
    assert told["98% of dense's accuracy by half of its answer tokens"] == "met"
    plateau = "dense is on its plateau: it learnt at most 2% of what it knows in its last quarter"
    assert rows[plateau] == "0 of 10 seeds: missed"
    assert len(rows) == 7, "targets of arms that were not run are not told"
    short = summary.headline({"captions": {"runs": runs}}, "test").splitlines()
    assert len(short) == 3
    assert short[2] == (
        "| drawings with captions | 50% | +2.0 [+2.0, +2.0], 10 seeds | +10.0 [+10.0, +10.0], 10 seeds | 50% | 52% | "
        "25%, 10 of 10 got there |"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.02] * 10, "better than dense"),
        ([-0.02] * 10, "worse than dense"),
        ([-0.004] * 10, "worse than dense, by no more than a point"),
        ([-0.005, 0.006] * 5, "not worse than dense by more than a point"),
        ([-0.05, 0.05] * 5, "not told apart from dense"),
        ([0.02] * 4, "so far better than dense"),
        ([0.02] * 2, "too few seeds to compare with dense"),
    ],
)
def test_verdicts(values: list[float], expected: str) -> None:
    found = analysis.Difference(dict(enumerate(values)), *analysis.interval(values))
    assert findings.verdict(found) == expected
