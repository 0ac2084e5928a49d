"""What each arm's steps cost, timed in turns, and the runs' costs in seconds by that.

    python -m benchmarks.quality.seconds [--tasks captions] [--arms random] [--seed 0] [--starts FOLDER] [--turns 24]

Runs are made side by side on shared machines: three that did the same steps as three others took 73, 75 and 69 s, where
those took 80, 81 and 80. Here all arms of a task take one step each, on the same batch, before the next batch; an arm's
steps cost the median over batches of its seconds over dense's. A run's seconds are then those of its full and sparse
steps, and its teacher's, in units of a dense step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from benchmarks import machine
from benchmarks.quality import results
from benchmarks.quality.analysis import Record
from benchmarks.quality.arms import ARMS
from benchmarks.quality.run import Run
from benchmarks.quality.start import endless
from benchmarks.quality.tasks import Batch, Settings, Task, arguments
from benchmarks.quality.tasks.registry import TASKS

PATH = results.FOLDER.parents[1] / "results" / "seconds.json"
_TAUGHT = 256  # samples whose references are timed


@dataclass(frozen=True)
class Cost:
    """Of an arm, in dense steps.

    Attributes:
        full, sparse: a step; an arm without a gate has full ones alone.
        teacher: the references of all training samples.
    """

    full: float
    sparse: float
    teacher: float

    def of_steps(self, arm: str, settings: Settings, n: int) -> float:
        """Of the first `n` steps of a run, without the teacher."""
        config = ARMS[arm].settings(settings, 0) if ARMS[arm].config is not None else None
        full = n if config is None else sum(config.is_full(step) for step in range(n))
        return full * self.full + (n - full) * self.sparse


def by_turns(task: str, result: dict[str, Any], path: Path = PATH) -> dict[str, Any]:
    """The committed result of a task with its curves' seconds in dense steps, as timed in turns.

    Raises:
        KeyError: an arm was not timed.
    """
    timed = json.loads(path.read_text())["tasks"][task]
    settings = Settings(**result["settings"])
    if missing := sorted({run["arm"] for run in result["runs"]} - timed.keys()):
        raise KeyError(f"{task}: not timed: {', '.join(missing)}; python -m benchmarks.quality.seconds --tasks {task}")
    return result | {"runs": [_told(run, Cost(**timed[run["arm"]]), settings) for run in result["runs"]]}


def _told(run: Record, cost: Cost, settings: Settings) -> Record:
    curve = []
    for look in run["curve"]:
        seconds = cost.of_steps(run["arm"], settings, look["step"])
        curve.append(look | {"seconds": seconds, "teacher_seconds": cost.teacher})
    return run | {"curve": curve, "longer": ARMS[run["arm"]].longer}


class _Turn(Run):
    """An arm that takes a step when it is told to."""

    def __init__(self, task: Task, name: str, seed: int, *, starts: Path) -> None:
        super().__init__(task, name, seed, starts=starts)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings.lr)
        steps = range(self.settings.steps)
        self._sparse = None if self.gate is None else next((i for i in steps if not self.gate.config.is_full(i)), None)

    def teach(self) -> float:
        """Seconds that the references of all training samples take."""
        if self.gate is None or not self.gate.config.uses_references:
            return 0.0
        some = self.task.train.first(_TAUGHT)
        batches = list(some.batches(self.settings.batch_size))
        self.gate.precompute(map(arguments, batches[:1]), progress=False)  # what is done once
        start = self._seconds()
        self.gate.precompute(map(arguments, batches[1:]), progress=False)
        looked_up = len(some) - len(batches[0]["labels"])
        return (self._seconds() - start) * len(self.task.train) / max(1, looked_up)

    def step(self, batch: Batch, *, full: bool) -> float:
        """Its seconds."""
        if self.gate is not None and self._sparse is not None:
            self.gate.step = 0 if full else self._sparse
        if self._gradients is not None:
            self._gradients.look(self.model, batch)
        start = self._seconds()
        with self._elided():
            self._loss(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self._seconds() - start


def measure(task: Task, arms: list[str], *, seed: int = 0, starts: Path, turns: int) -> dict[str, dict[str, float]]:
    """The cost of each of `arms`, of which the first is dense."""
    bar = tqdm(arms, desc=f"{task.name}: arms", mininterval=20)
    running = {arm: _Turn(task, arm, seed, starts=starts) for arm in bar}
    taught = {arm: turn.teach() for arm, turn in running.items()}
    batches = endless(task.train.batches(task.settings.batch_size, seed=1))
    found: dict[bool, dict[str, list[float]]] = {}
    for full in (True, False):
        for _ in range(2):  # what is captured and proven is done once
            batch = next(batches)
            for turn in running.values():
                turn.step(batch, full=full)
        found[full] = {arm: [] for arm in arms}
        for _ in tqdm(range(turns), desc=f"{task.name}: {'full' if full else 'sparse'} steps", mininterval=20):
            batch = next(batches)
            for arm, turn in running.items():
                found[full][arm].append(turn.step(batch, full=full))
    dense = {full: found[full][arms[0]] for full in found}
    step = statistics.median([*dense[True], *dense[False]])
    return {
        arm: asdict(
            Cost(
                *(statistics.median(_over(found[full][arm], dense[full])) for full in (True, False)),
                teacher=taught[arm] / step,
            )
        )
        for arm in arms
    }


def _over(seconds: list[float], dense: list[float]) -> Iterator[float]:
    return (one / other for one, other in zip(seconds, dense, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(results.load()))
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="those alone, beside dense; the others stay")
    parser.add_argument("--seed", type=int, default=0, help="whose start is trained")
    parser.add_argument("--starts", type=Path, default=Path("runs/quality/starts"))
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    committed = results.load()
    made = machine.described("benchmarks.quality.seconds", "torch", "transformers")
    before = json.loads(args.out.read_text()) if args.out.exists() else {"tasks": {}}
    tasks = before["tasks"]
    known = {"torch": made["torch"], "transformers": made["transformers"], "turns": args.turns}
    then = {name: before.get(name) for name in known}
    if tasks and then != known:
        parser.error(f"what stays in {args.out} was timed otherwise, {then}, not {known}; give another --out")
    for name in args.tasks:
        wanted = {"dense", *args.arms} if args.arms else {run["arm"] for run in committed[name]["runs"]}
        arms = [arm for arm in ARMS if arm in wanted]
        stay = tasks.get(name, {}) if args.arms else {}
        tasks[name] = stay | measure(TASKS[name](), arms, seed=args.seed, starts=args.starts, turns=args.turns)
        machine.write(made | {"turns": args.turns, "tasks": tasks}, args.out)


if __name__ == "__main__":
    main()
