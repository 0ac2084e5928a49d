"""Does a model learn as well? The experiments of `benchmarks.quality` with all their seeds at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu.part import Check, Record, SkippedError
from benchmarks.quality.tasks import photos

ARMS = {
    "photos": [
        ["dense", "regate", "random", "visual25-visible", "exact"],
        ["visual50-visible", "visual10-visible", "cycled", "short", "visible", "reweighted"],
    ],
    "captions": [
        ["dense", "regate", "random", "exact", "visible", "reweighted"],
        ["paper", "sample", "keep25", "student", "reference", "cycled"],
    ],
    "clips": [["dense", "regate", "random", "exact"]],
    "captions-large": [["dense", "regate", "random"]],
}  # what matters most first
SEEDS = range(10)
FEWER = {"captions-large": (range(3), 240)}  # seeds, and the seconds of a check; 120 of others


def checks(size: str | None, device: str, folder: Path) -> list[Check]:
    """One for each task and list of arms; records of runs lie in `folder`, for `benchmarks.quality.page`."""
    tiny = size == "tiny"
    some = [(task, arms) for turn in range(2) for task, lists in ARMS.items() for arms in lists[turn : turn + 1]]
    if tiny:
        some = [("captions", ["dense", "regate"])]
    found = []
    for task, arms in some:
        seeds, seconds = FEWER.get(task, (SEEDS, 120))
        run_ = partial(run, task, arms, range(2) if tiny else seeds, device, folder, short=tiny)
        found.append(Check(f"{task}: {', '.join(arms)}", run_, seconds))
    return found


def run(task: str, arms: list[str], seeds: range, device: str, folder: Path, *, short: bool = False) -> Record:
    """A process for each seed, all at the same time; a run that is there already is not made again."""
    if task == "photos" and not photos.FOLDER.exists():
        raise SkippedError(f"there are no photographs in {photos.FOLDER}; FASHION_MNIST says where else they are")
    options = ["--tasks", task, "--arms", *arms, "--out", str(folder), "--device", device, "--again"]
    options += ["--short"] if short else []
    start = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    running = {}
    for seed in seeds:
        with (folder / f"{task}-{seed}.log").open("w") as log:
            command = [sys.executable, "-m", "benchmarks.quality", *options, "--seeds", str(seed)]
            running[seed] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    if wrong := [seed for seed, process in running.items() if process.wait()]:
        said = (folder / f"{task}-{wrong[0]}.log").read_text()
        raise RuntimeError(f"seeds {wrong} failed, the first with: {said[-1500:]}")
    records = [json.loads((folder / f"{task}-{arm}-{seed}.json").read_text()) for arm in arms for seed in seeds]
    means = {arm: [r["final"]["validation"]["grounded"] for r in records if r["arm"] == arm] for arm in arms}
    return {"grounded": means, "wall_seconds": time.time() - start}
