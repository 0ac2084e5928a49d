"""One run: a task, an arm, a seed; what it learnt and what that cost, as one record.

Seconds are the processor's, of this process with one thread: the machine may be shared. On a GPU they are the clock's.
They are of steps alone, without evaluations; the teacher's are apart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import regate
from benchmarks.quality.arms import ARMS, Arm
from benchmarks.quality.context import losses_of_kept
from benchmarks.quality.elision import (
    Gradients,
    at_random,
    by_change,
    everything_computed,
    led_by_references,
    visual_by,
)
from benchmarks.quality.evaluate import evaluate, free_running, with_blank, with_shuffled
from benchmarks.quality.start import endless, started, teacher
from benchmarks.quality.tasks import Batch, Settings, Task, arguments

Record = dict[str, Any]


class Run:
    """One arm of one seed, step by step."""

    def __init__(self, task: Task, name: str, seed: int, *, starts: Path) -> None:
        self.task, self.name, self.seed = task, name, seed
        self.arm: Arm = ARMS[name]
        self.settings: Settings = replace(task.settings, steps=task.settings.steps * self.arm.longer)
        self.model = started(task, seed, starts).train()
        self.answer_tokens = self.positions = 0
        self.seconds = self.teacher_seconds = 0.0
        self.gate: regate.Gate | None = None
        self._gradients = Gradients() if self.arm.visual_by == "gradient" else None
        self.train = task.train.first(round(self.arm.samples * len(task.train))).mixed_up(self.arm.wrong, seed)
        if self.arm.config is not None:
            size = self.arm.teacher
            teaching = "auto" if size is None else teacher(task, seed, starts, size)
            self.gate = regate.apply(
                self.model, self.arm.settings(self.settings, seed), backend="eager", teacher=teaching
            )
        self.choices: list[tuple[int, int, int, int]] = []  # sparse steps: step, kept, grounded, both
        self.curve: list[Record] = []

    def record(self) -> Record:
        """Train, evaluate, and tell."""
        for i in range(len(self.train)):
            self.train[i]  # encoded once, so that nobody's seconds are those of reading images
        torch.manual_seed(self.seed)
        if self.gate is not None and self.gate.config.uses_references:
            start = self._seconds()
            batches = self.train.batches(self.settings.batch_size)
            self.gate.precompute(map(arguments, batches), progress=False)
            self.teacher_seconds = self._seconds() - start
        with self._elided():
            self._train()
            report = {} if self.gate is None else dict(self.gate.report())
            context = self._context()
        if self.gate is not None:
            regate.remove(self.model)
        return {
            "task": self.task.name,
            "arm": self.name,
            "seed": self.seed,
            "curve": self.curve,
            "final": self._final(),
            "calibration": calibration(self.choices, self.settings.steps),
            "context": context,
            "report": report,
        }

    @contextlib.contextmanager
    def _elided(self) -> Iterator[None]:
        """Inside, sparse steps leave out what the arm says, in its way."""
        with contextlib.ExitStack() as scope:
            if not self.arm.elides:
                scope.enter_context(everything_computed())
            if self.arm.visual_by != "likeness":
                changes = by_change(self.task.per_frame) if self.arm.visual_by == "change" else None
                scope.enter_context(visual_by(self._gradients or changes or at_random(self.seed)))
            if self.arm.visual_led:
                scope.enter_context(led_by_references())
            yield

    def _train(self) -> None:
        settings, model = self.settings, self.model
        batches = endless(self.train.batches(settings.batch_size, seed=self.seed + 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
        every = max(1, settings.steps // settings.evaluations)
        self._look(0)
        bar = tqdm(range(settings.steps), desc=f"{self.task.name} {self.name} {self.seed}", mininterval=20)
        for step in bar:
            batch = next(batches)
            if self._gradients is not None:
                self._gradients.look(model, batch)
            start = self._seconds()
            self._loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            self.seconds += self._seconds() - start
            self._count(batch, step)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                self._look(step + 1)

    def _seconds(self) -> float:
        if self.task.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _loss(self, batch: Batch) -> Tensor:
        output = self.model(**arguments(batch), use_cache=False)
        if not self.arm.reweighted:
            loss: Tensor = output.loss
            return loss
        return reweighted(output.logits, batch["labels"], batch["grounded"], self.settings.grounded_share)

    def _count(self, batch: Batch, step: int) -> None:
        if self.gate is None or self.gate.last is None:
            self.answer_tokens += int((batch["labels"][:, 1:] != -100).sum())
            self.positions += int(batch["attention_mask"].sum())
            return
        last = self.gate.last
        self.answer_tokens += int(last.kept.sum())
        self.positions += sum(last.computed)
        if not last.full:
            there = ~last.whole  # to choose from
            kept, grounded = last.kept & there, batch["grounded"].cpu() & there
            self.choices.append((step, int(kept.sum()), int(grounded.sum()), int((kept & grounded).sum())))

    def _look(self, step: int) -> None:
        scores = evaluate(self.model, self.task.validation.first(self.settings.few))
        flops = 0.0 if self.gate is None else self.gate.counters.flops_computed
        cost = {"answer_tokens": self.answer_tokens, "positions": self.positions, "flops": flops}
        seconds = {"seconds": self.seconds, "teacher_seconds": self.teacher_seconds}
        self.curve.append({"step": step, **cost, **seconds, **scores})

    def _context(self) -> Record:
        """Losses of kept words without the elided ones and with them, after the last step."""
        sparse = [] if self.gate is None else [i for i in range(self.settings.steps) if not self.gate.config.is_full(i)]
        if self.gate is None or not sparse or self._gradients is not None:  # which are of batches that were looked at
            return {}
        self.gate.step = sparse[-1]  # behind the end every step is full
        parts = {"train": self.task.train, "validation": self.task.validation}
        few = {name: some.first(self.settings.few).batches(self.settings.batch_size) for name, some in parts.items()}
        found = {name: losses_of_kept(self.model, self.gate, batches) for name, batches in few.items()}
        return {name: losses for name, losses in found.items() if losses is not None}

    def _final(self) -> Record:
        task, few = self.task, self.task.validation.first(self.settings.few)
        return {
            "validation": evaluate(self.model, task.validation),
            "test": evaluate(self.model, task.test),
            "free_running": free_running(self.model, task.test.first(self.settings.free)),
            "blank": evaluate(self.model, few, change=with_blank(task.pixels)),
            "shuffled": evaluate(self.model, few, change=with_shuffled(task.pixels)),
        }


def reweighted(logits: Tensor, labels: Tensor, grounded: Tensor, share: float) -> Tensor:
    """Mean loss of labels, weighted so that grounded ones are `share` of the weight."""
    labels, grounded = labels[:, 1:], grounded[:, 1:]
    supervised = labels != -100
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][supervised].float(), labels[supervised], reduction="none")
    needs = grounded[supervised]
    return share * losses[needs].mean() + (1 - share) * losses[~needs].mean()


def calibration(choices: list[tuple[int, int, int, int]], steps: int) -> list[Record]:
    """Of each quarter of a run: are kept words grounded (precision), and grounded words kept (recall)?"""
    quarters = []
    for quarter in range(4):
        some = [c for c in choices if 4 * c[0] // steps == quarter]
        kept, grounded, both = (sum(c[i] for c in some) for i in (1, 2, 3))
        if kept and grounded:
            quarters.append({"quarter": quarter, "precision": both / kept, "recall": both / grounded})
    return quarters
