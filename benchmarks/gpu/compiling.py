"""How long does compilation take, cold and warm, and is it over after the first steps?"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks import compilation, first_step
from benchmarks.gpu.part import Check, Record

SECONDS = {"dense": (150, 60), "strongest": (150, 60), "regate": (100, 40)}  # cold, warm


def checks(size: str, device: str, folder: Path) -> list[Check]:
    """Of a model of that size; what compilers keep is kept in `folder`."""
    found = []
    for arm in ("regate", "dense", "strongest"):
        for start, seconds in zip(("cold", "warm"), SECONDS[arm], strict=True):
            run = partial(first_steps, size, device, arm, folder / f"{size}-{arm}", warm=start == "warm")
            found.append(Check(f"{start} start, {arm}, {size}", run, seconds))
    small = "tiny" if size == "tiny" else "small"
    return [*found, Check(f"batches of many lengths, {small}", partial(many_lengths, small, device), 120)]


def first_steps(size: str, device: str, arm: str, cache: Path, *, warm: bool) -> Record:
    """In a process of its own."""
    if not warm:
        shutil.rmtree(cache, ignore_errors=True)
    elif not cache.exists():
        raise FileNotFoundError("a cold start comes before a warm one")
    options = ["--model", size, "--device", device, "--dtype", "bfloat16", "--arm", arm, "--cache", str(cache)]
    command = [sys.executable, "-m", first_step.__name__, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-1500:]}")
    found: Record = json.loads(done.stdout.splitlines()[-1])
    return {"arm": arm, "start": "warm" if warm else "cold", "model": size} | found


def many_lengths(size: str, device: str) -> Record:
    """`benchmarks.compilation`'s, with fewer batches."""
    steps = 4 if size == "tiny" else 60
    args = argparse.Namespace(model=size, rows=2, steps=steps, dtype="bfloat16", device=device)
    runs = dict(compilation.runs(args))
    late = [step for step in runs["regate"]["steps_that_compiled"] if step > 2]
    if late or runs["regate"]["recompiles_of_the_decoder"]:
        raise AssertionError(f"compiled again in steps {late}: {runs['regate']}")
    return {"compilation": {"settings": vars(args), "runs": runs}}
