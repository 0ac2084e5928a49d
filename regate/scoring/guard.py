"""Does what sparse steps leave out get worse? Then every step is full until it is learnt again (`Config.guard`).

Samples that keep every label tell, in full steps and in their full turns: of those of their labels that are easiest,
which a sparse step would have left out, the mean loss of the latest `WINDOW`. Beside it stands the lowest that this
mean ever was. Where it rises more than `guard` above that

    it opens      every step is full: at most one cycle of them, or until half of the rise is gone
    it closes     by then, and if full steps did not help, it was not the gate's doing: what is now is the lowest

Difficulties alone say which labels are easy, for reference losses of samples in their full turn may not be known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regate.config import Config
from regate.memory.sharing import any_rank
from regate.scoring.selection import keep_highest

WINDOW = 2048  # labels: of a loss that varies as much as its mean is, the mean is known to 2%


class Guard:
    """Of one gate.

    Args:
        config: the gate's.

    """

    def __init__(self, config: Config) -> None:
        self._rise, self._keep, self._cycle = config.guard, config.keep, config.cycle
        self._mean = 0.0
        self._labels = 0  # seen so far
        self._lowest = float("inf")
        self._left = 0  # full steps that it stays open

    @property
    def looks(self) -> bool:
        """Is there one?"""
        return self._rise is not None

    @property
    def open(self) -> bool:
        """Is every step full now?"""
        return self._left > 0

    def see(self, m: Tensor, losses: Tensor, candidates: Tensor, whole: Tensor) -> None:
        """What a forward said of samples that kept every label.

        Args:
            m: float [N, L], difficulties before it, or what is expected of labels that have none.
            losses: float [N, L].
            candidates: bool [N, L], the labels.
            whole: bool [N], samples that kept all of theirs.
        """
        easy = candidates & ~keep_highest(m, candidates, self._keep) & whole[:, None]
        found = losses[easy]
        found = found[torch.isfinite(found)]
        if n := len(found):
            self._labels += n
            self._mean += min(1.0, n / min(self._labels, WINDOW)) * (float(found.mean()) - self._mean)
            if self._labels >= WINDOW:
                self._lowest = min(self._lowest, self._mean)

    def step(self) -> bool:
        """An optimizer step was made, on this rank and on every other: does the guard open now?"""
        if self._rise is None:
            return False
        rise = self._rise / 2 if self.open else self._rise
        worse = any_rank(self._mean > self._lowest + rise)
        if not self.open:
            self._left = self._cycle if worse else 0
            return worse
        self._left = self._left - 1 if worse else 0
        if worse and not self.open:
            self._lowest = self._mean
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "labels": self._labels, "lowest": self._lowest, "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._labels = state["mean"], state["labels"]
        self._lowest, self._left = state["lowest"], state["left"]
