"""What a run did so far: plain sums, and the time that steps take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median

from torch import nn

from regate.training.sharding import whole_shape
from regate_patch import Active, Statistics

Number = int | float


@dataclass
class Counters:
    """Plain sums over the run. FLOPs are of decoder and output projection, forward and backward. `steps_guarded` are
    full ones that were sparse by the schedule (`Config.guard`). `samples_sparse` and `samples_whole` are of sparse
    steps, the latter in their full turn. In `forwards_joined` this rank ran modules for nothing because others ran them
    for their images. `gate_seconds` are the host's; where the batch is on a device, the wait until it has been computed
    up to there is among them."""

    steps_full: int = 0
    steps_sparse: int = 0
    steps_missed: int = 0
    steps_guarded: int = 0
    forwards_ungated: int = 0
    forwards_joined: int = 0
    samples_sparse: int = 0
    samples_whole: int = 0
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

    def __post_init__(self) -> None:
        self._latest = -1  # the last step that was counted

    def count_step(self, step: int, *, full: bool) -> None:
        """Once, however many forwards it has."""
        if step == self._latest:
            return
        self._latest = step
        self.steps_full += full
        self.steps_sparse += not full

    def add(self, sums: Mapping[str, Number]) -> None:
        """Of one forward, by name."""
        for name, number in sums.items():
            setattr(self, name, getattr(self, name) + number)

    def count_flops(
        self,
        decoder: Statistics,
        head: nn.Module,
        shape: Sequence[int],
        samples: Sequence[int],
        active: Active | None,
        *,
        projected: int,
    ) -> None:
        """Of a forward on `shape` (B, S) that ran on `active` (None: everywhere) and projected so many of each row.

        Args:
            samples: positions of each sample, where rows hold several.
        """
        rows, length = shape
        dense = sum(map(decoder.flops, samples if decoder.apart else [length] * rows))
        per_position = 6.0 * rows * sum(s.numel() for p in head.parameters() if len(s := whole_shape(p)) == 2)
        self.flops_dense += 3 * dense + per_position * length
        self.flops_computed += 3 * (dense if active is None else decoder.flops_of(active)) + per_position * projected

    def load(self, state: Mapping[str, Number]) -> None:
        self._latest = -1
        for field in fields(self):
            setattr(self, field.name, state.get(field.name, field.default))


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
