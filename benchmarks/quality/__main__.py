"""Train every arm with every seed on every task; goes on where it was stopped.

    python -m benchmarks.quality [--tasks captions] [--arms dense regate random] [--seeds 0 1 2] [--out FOLDER]

Seed by seed, so that what is there at any time is paired. A run is one file in the folder; `python -m
benchmarks.quality.page FOLDER` adds them to the committed results and writes the page. What is committed is not run
again, unless --again asks for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from benchmarks import machine
from benchmarks.quality import results, summary
from benchmarks.quality.arms import ARMS
from benchmarks.quality.run import Run
from benchmarks.quality.tasks import Settings
from benchmarks.quality.tasks.registry import TASKS

HEADLINE = ("dense", "exact", "regate", "random", "reweighted")

_FEW = {
    "limit": 16,
    "settings": Settings(
        steps=4, batch_size=4, schedule={"warmup": 1, "cycle": 4, "full_steps": 0}, vision_steps=1, vision_batch_size=4,
        text_steps=1, evaluations=1, few=4, free=2,
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(summary.TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(HEADLINE))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="a few samples and steps, to try it")
    parser.add_argument("--again", action="store_true", help="also what is committed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = asked.stdout.strip() or "unknown"  # where files alone were copied
    made = machine.described("benchmarks.quality", "torch", "transformers") | {"commit": commit}
    tasks = {}
    committed = set() if args.again else results.ran()
    runs = [(seed, name, arm) for seed in args.seeds for name in args.tasks for arm in args.arms]
    if there := sum((name, arm, seed) in committed for seed, name, arm in runs):
        print(f"{there} of {len(runs)} runs are committed and are not made again; --again makes them")
    for seed, name, arm in tqdm(runs, desc="runs", mininterval=20):
        path = args.out / f"{name}-{arm}-{seed}.json"
        if path.exists() or (name, arm, seed) in committed:
            continue
        if name not in tasks:
            tasks[name] = TASKS[name](**(_FEW if args.short else {})).on(args.device)
        settings = dataclasses.asdict(tasks[name].settings)
        record = Run(tasks[name], arm, seed, starts=args.out / "starts").record()
        machine.write(record | {"settings": settings, "source": tasks[name].source, "made": made}, path)


if __name__ == "__main__":
    main()
