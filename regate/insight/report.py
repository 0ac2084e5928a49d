"""What gating did: counters kept while training, and the report made from them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from statistics import median

from torch import nn

from regate.scoring.decision import Decision
from regate_patch import Active, Statistics

Number = int | float


@dataclass
class Counters:
    """Plain sums over the run. FLOPs are of decoder and output projection, forward and backward."""

    steps_full: int = 0
    steps_sparse: int = 0
    steps_missed: int = 0
    forwards_ungated: int = 0
    labels_seen: int = 0
    labels_kept: int = 0
    positions_seen: int = 0
    positions_computed: int = 0
    flops_dense: float = 0.0
    flops_computed: float = 0.0
    gate_seconds: float = 0.0
    teacher_seconds: float = 0.0
    teacher_samples: int = 0
    nonfinite_losses: int = 0

    def count_step(self, *, full: bool) -> None:
        self.steps_full += full
        self.steps_sparse += not full

    def count_forward(self, decision: Decision) -> None:
        self.labels_seen += decision.labels_seen
        self.labels_kept += decision.labels_kept
        self.positions_seen += decision.positions_seen
        self.positions_computed += sum(decision.computed)

    def count_flops(
        self, decoder: Statistics, head: nn.Module, decision: Decision, active: Active, projected: int
    ) -> None:
        """Of a forward that ran on `active` and projected so many positions of each row onto the vocabulary."""
        rows, length = decision.labels.shape
        read = None if active.read is None else active.read.index.shape[1]
        per_position = 6.0 * rows * sum(p.numel() for p in head.parameters() if p.dim() == 2)
        self.flops_dense += 3 * rows * decoder.flops(length) + per_position * length
        self.flops_computed += 3 * rows * decoder.flops(active.index.shape[1], read) + per_position * projected

    def load(self, state: Mapping[str, Number]) -> None:
        for field in fields(self):
            setattr(self, field.name, state.get(field.name, getattr(self, field.name)))


class Stopwatch:
    """Wall time from optimizer step to optimizer step, full and sparse ones apart: medians of the last `window`."""

    def __init__(self, window: int = 101) -> None:
        self._seconds: dict[bool, deque[float]] = {full: deque(maxlen=window) for full in (True, False)}
        self._last: float | None = None

    def step(self, *, full: bool) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self._seconds[full].append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        """Seconds per full and per sparse step, and their ratio; 0.0 where there was none yet."""
        full, sparse = (median(self._seconds[kind] or [0.0]) for kind in (True, False))
        measured = full / sparse if full and sparse else 0.0
        return {"seconds_per_full_step": full, "seconds_per_sparse_step": sparse, "speedup_measured": measured}


class Report(Mapping[str, Number]):
    """A mapping of plain numbers; `str(report)` reads as text."""

    def __init__(self, counters: Counters, found: Mapping[str, Number], notes: list[str]) -> None:
        self._numbers: dict[str, Number] = {**found, **asdict(counters)}
        self.notes = notes
        seen = max(counters.flops_computed, 1.0)
        self._numbers["speedup_possible"] = counters.flops_dense / seen if counters.flops_dense else 1.0

    def __getitem__(self, name: str) -> Number:
        return self._numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __str__(self) -> str:
        n = self._numbers
        lines = [
            f"decoder    {n['attention_blocks']} attention and {n['mlp_blocks']} MLP blocks in {n['graphs']} graph(s), "
            f"{n['recompiles']} of them recompiled",
            f"steps      {n['steps_full']} full, {n['steps_sparse']} sparse, {n['steps_missed']} sparse without gating",
            f"labels     {n['labels_kept']:,} of {n['labels_seen']:,} kept{_share(n['labels_kept'], n['labels_seen'])}",
            f"positions  {n['positions_computed']:,} of {n['positions_seen']:,} computed"
            f"{_share(n['positions_computed'], n['positions_seen'])}",
            f"teacher    {n['teacher_samples']:,} samples in {n['teacher_seconds']:.1f} s",
            f"gating     {n['gate_seconds']:.1f} s on the host",
            f"FLOPs      {n['speedup_possible']:.2f}x fewer in decoder and head than the same steps dense",
        ]
        if n["speedup_measured"]:
            lines.append(
                f"time       {n['seconds_per_full_step']:.3f} s per full step, {n['seconds_per_sparse_step']:.3f} s "
                f"per sparse one: {n['speedup_measured']:.2f}x measured"
            )
        return "\n".join(lines + [f"note       {note}" for note in self.notes])


def _share(part: Number, whole: Number) -> str:
    return f" ({part / whole:.0%})" if whole else ""
