"""Records of runs, gathered into one file per task, which is committed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality.analysis import Record
from benchmarks.quality.tasks import Settings

FOLDER = Path(__file__).parent / "results"
REPORTED = (
    "steps_full", "steps_sparse", "steps_guarded", "labels_kept", "labels_seen", "positions_computed", "positions_seen",
    "flops_computed", "flops_dense", "gate_seconds",
)  # fmt: skip


class MixedRunsError(ValueError):
    """Runs of one task differ in more than arm and seed."""


def gather(runs: Path, into: Path = FOLDER) -> None:
    """Add the runs whose files lie in `runs` to `into/TASK.json`; a run that is there already is replaced.

    Raises:
        MixedRunsError: runs of a task were made with different settings, or a seed's from different weights.
    """
    tasks: dict[str, list[Record]] = defaultdict(list)
    for path in sorted(runs.glob("*.json")):
        record = json.loads(path.read_text())
        tasks[record["task"]].append(record | {"settings": _whole(record["settings"])})
    committed = load(into)
    for name, records in tasks.items():
        old = committed.get(name, {"runs": [], "made": []})
        common = {"task": name, "settings": records[0]["settings"], "source": records[0]["source"]}
        if old["runs"] and _whole(old["settings"]) != common["settings"]:
            raise MixedRunsError(
                f"{name}: {runs} has other settings than {into}; delete {into / name}.json to begin anew"
            )
        for record in records:
            if record["settings"] != common["settings"]:
                raise MixedRunsError(
                    f"{name}, {record['arm']}, seed {record['seed']} was made with other settings than "
                    f"{records[0]['arm']}, seed {records[0]['seed']}; delete one kind from {runs} and run again"
                )
        found = {(run["seed"], run["arm"]): run for run in (*old["runs"], *map(_short, records))}
        _from_the_same_weights(name, found.values())
        made = {json.dumps(x, sort_keys=True) for x in (*old["made"], *(_made(record["made"]) for record in records))}
        into.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(found[run], separators=(",", ":")) for run in sorted(found))
        head = json.dumps(common | {"made": [json.loads(x) for x in sorted(made)]}, indent=1)
        (into / f"{name}.json").write_text(f'{head[:-2]},\n "runs": [\n{lines}\n]}}\n')


def _from_the_same_weights(task: str, runs: Iterable[Record]) -> None:
    """Before its first step a seed's model is the same in every arm, on whatever machine its weights were made."""
    starts: dict[int, Record] = {}
    for run in runs:
        first = starts.setdefault(run["seed"], run)
        one, other = (x["curve"][0]["loss"] for x in (first, run))
        if not math.isclose(one, other, rel_tol=1e-3):
            raise MixedRunsError(
                f"{task}, seed {run['seed']}: {first['arm']} started from a loss of {one:g} and {run['arm']} from "
                f"{other:g}, so they did not start from the same weights; run both again with one `starts` folder"
            )


def _whole(settings: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of settings that there were not when the run was made."""
    return dataclasses.asdict(Settings(**settings))


def load(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The committed results by task."""
    results = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {result["task"]: result for result in results}


def ran(folder: Path = FOLDER) -> set[tuple[str, str, int]]:
    """Task, arm and seed of every committed run."""
    return {(task, run["arm"], run["seed"]) for task, result in load(folder).items() for run in result["runs"]}


def _made(made: dict[str, Any]) -> dict[str, Any]:
    """Without what is another in each process."""
    device = {name: value for name, value in made["device"].items() if name != "load_average"}
    return {name: value for name, value in made.items() if name != "command"} | {"device": device}


def _short(record: Record) -> Record:
    report = {name: record["report"][name] for name in REPORTED if name in record["report"]}
    kept = ("arm", "seed", "curve", "final", "calibration", "context")
    short = {name: record[name] for name in kept if name in record} | {"report": report}
    made = {"commit": record["made"]["commit"][:9], "cpu": record["made"]["device"]["cpu"]}
    return {name: _rounded(value) for name, value in short.items()} | {"made": made}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return round(value, 6) if isinstance(value, float) else value
