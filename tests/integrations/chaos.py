"""Kill training and precompute at random moments, again and again, and hold what is left to an undisturbed run.

    python -m tests.integrations.chaos FOLDER KILLS

One process imports and captures once; each life is a fork of it, so that a life costs a second. It never runs a
backward pass itself, which autograd would not let its forks repeat.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import regate
from tests.zoo import CORE

STEPS, EVERY = 12, 2  # optimizer steps of a run, and between checkpoints
BATCHES = [CORE["llava"].batch("right", seed=seed) for seed in range(4)]
MORE = [CORE["llava"].batch("right", seed=seed) for seed in range(60)]  # to precompute
CONFIG = regate.Config(warmup=1, cycle=4, full_steps=1)


class Run:
    """A model, its gate and a folder. This process never trains, so every life begins from the same weights."""

    def __init__(self, folder: Path) -> None:
        self.model = CORE["llava"].build()
        self.gate = regate.apply(self.model, CONFIG)
        self.fresh = self.gate.state_dict()
        self.gate.step = 2  # a sparse step, which captures the teacher, too
        self.model(**CORE["llava"].batch("right", seed=99))
        self.gate.load_state_dict(self.fresh)
        self.move(folder)

    def move(self, folder: Path) -> None:
        """Another run, with nothing done yet."""
        self.folder = folder
        self.gate.store = regate.Store(folder / "store")

    def train(self) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        start = 0
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            start = state["step"]
            self.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.gate.load_state_dict(state["gate"])
        else:  # one that was killed before its first checkpoint left difficulties and turns: not this one's
            self.gate.load_state_dict(self.fresh)
        with (self.folder / "log").open("ab", buffering=0) as log:
            for step in range(start, STEPS):
                loss = self.model(**BATCHES[step % len(BATCHES)]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                log.write(f"{step} {float(loss.detach()).hex()}\n".encode())  # one write: a whole line or none
                if (step + 1) % EVERY == 0:
                    state = {"step": step + 1, "model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save(state | {"gate": self.gate.state_dict()}, checkpoint.with_suffix(".new"))
                    checkpoint.with_suffix(".new").replace(checkpoint)

    def precompute(self) -> None:
        self.gate.precompute(MORE, progress=False)

    def history(self) -> list[tuple[int, float]]:
        lines = (self.folder / "log").read_text().splitlines() if (self.folder / "log").exists() else []
        return [(int(step), float.fromhex(loss)) for step, loss in map(str.split, lines)]

    def result(self) -> Any:
        """Final weights and all records, comparable."""
        weights = torch.load(self.folder / "checkpoint.pt", weights_only=True)["model"]
        return {k: v.tolist() for k, v in weights.items()}, self.records("reference"), self.records("difficulty")

    def records(self, table: Any) -> dict[str, list[float]]:
        with regate.Store(self.folder / "store") as store:
            return {key.hex(): np.asarray(losses).tolist() for key, losses in store.items(table)}


def live(work: Callable[[], None], killed_after: float | None) -> bool:
    """Fork, work, and be killed after so many seconds; was the kill in time?"""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(pid, signal.SIGKILL)  # harmless if it has ended: it is not waited for yet
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), "a life failed by itself"
    return status != 0


def timed(work: Callable[[], None]) -> float:
    """Seconds of a life that nobody disturbs."""
    start = time.perf_counter()
    live(work, None)
    return time.perf_counter() - start


def check_history(history: list[tuple[int, float]], expected: dict[int, float]) -> None:
    """Each step, also one that was done again, has the undisturbed run's loss; few were done again."""
    assert dict(history) == expected
    assert all(loss == expected[step] for step, loss in history)
    for (before, _), (after, _) in zip(history, history[1:], strict=False):
        assert before - EVERY < after <= before + 1, "more was lost than since the last checkpoint"


def main(folder: Path, kills: int) -> dict[str, int]:
    torch.set_num_threads(1)
    random_ = random.Random(0)
    run = Run(folder / "whole")
    seconds = timed(run.train)
    expected, result = dict(run.history()), run.result()
    assert len(expected) == STEPS
    found = {"training_kills": 0, "kills_mid_run": 0, "precompute_kills": 0, "runs": 0}
    while found["training_kills"] < kills * 2 // 3:
        run.move(folder / f"run{found['runs']}")
        moments = []
        while live(run.train, random_.uniform(0, seconds)):
            moments.append(len(run.history()))
            run.records("reference"), run.records("difficulty")  # every record can be read
        check_history(run.history(), expected)
        assert run.result() == result
        found["runs"] += 1
        found["training_kills"] += len(moments)
        found["kills_mid_run"] += sum(0 < moment < STEPS for moment in moments)

    run.move(folder / "precomputed")
    seconds, references = timed(run.precompute), run.records("reference")
    assert len(references) == 2 * len(MORE)
    while found["precompute_kills"] < kills - kills * 2 // 3:
        run.move(folder / f"run{found['runs']}")
        counts = []
        while live(run.precompute, random_.uniform(0, seconds)):
            counts.append(len(run.records("reference")))
        assert counts == sorted(counts), "a record was lost"
        assert run.records("reference") == references
        found["runs"] += 1
        found["precompute_kills"] += len(counts)
        found["kills_mid_run"] += sum(0 < count < len(references) for count in counts)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
