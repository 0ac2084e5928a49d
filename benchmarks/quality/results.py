"""Records of runs, gathered into one file per task, which is committed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.quality.analysis import Record

FOLDER = Path(__file__).parent / "results"
REPORTED = (
    "steps_full", "steps_sparse", "labels_kept", "labels_seen", "positions_computed", "positions_seen",
    "flops_computed", "flops_dense", "gate_seconds",
)  # fmt: skip


class MixedRunsError(ValueError):
    """Runs of one task differ in more than arm and seed."""


def gather(runs: Path, into: Path = FOLDER) -> None:
    """Write `into/TASK.json` from the files that runs left in `runs`.

    Raises:
        MixedRunsError: runs of a task were made with different settings.
    """
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(runs.glob("*.json")):
        record = json.loads(path.read_text())
        tasks[record["task"]].append(record)
    for name, records in tasks.items():
        common = {"task": name, "settings": records[0]["settings"], "source": records[0]["source"]}
        for record in records:
            if record["settings"] != common["settings"]:
                raise MixedRunsError(
                    f"{name}, {record['arm']}, seed {record['seed']} was made with other settings than "
                    f"{records[0]['arm']}, seed {records[0]['seed']}; delete one kind from {runs} and run again"
                )
        made = {json.dumps(_made(record["made"]), sort_keys=True) for record in records}
        records.sort(key=lambda record: (record["seed"], record["arm"]))
        into.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(_short(record), separators=(",", ":")) for record in records)
        head = json.dumps(common | {"made": [json.loads(x) for x in sorted(made)]}, indent=1)
        (into / f"{name}.json").write_text(f'{head[:-2]},\n "runs": [\n{lines}\n]}}\n')


def load(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The committed results by task."""
    results = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {result["task"]: result for result in results}


def _made(made: dict[str, Any]) -> dict[str, Any]:
    """Without what is another in each process."""
    device = {name: value for name, value in made["device"].items() if name != "load_average"}
    return {name: value for name, value in made.items() if name != "command"} | {"device": device}


def _short(record: Record) -> Record:
    report = {name: record["report"][name] for name in REPORTED if name in record["report"]}
    short = {name: record[name] for name in ("arm", "seed", "curve", "final", "calibration")} | {"report": report}
    return {name: _rounded(value) for name, value in short.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return round(value, 6) if isinstance(value, float) else value
