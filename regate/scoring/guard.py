"""Does what sparse steps leave out get worse? Then steps are full until it is learnt again (`Config.guard`).

Samples that keep every label tell, in full steps and in their full turns: each by the mean loss of those of its labels
that a sparse step would leave out by their difficulties. Of these means there is a running average, over the latest
`WINDOW` samples of all ranks, and the lowest that it ever was. Where it stands more than `guard` above that,

    it opens      if that is sure: steps that would be sparse are full
    it closes     when half of the rise is gone. After one cycle in any case: what full steps do not cure was not the
                  gate's doing, and what is now counts as the lowest

What ranks see is told with the records that they exchange, so that all open and close at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from regate.config import Config
from regate.scoring.selection import keep_share

WINDOW = 128  # samples
_SURE = 8  # standard errors that a running average may stand above the lowest of many by chance


class Guard:
    """Of one gate, on one rank.

    Args:
        config: the gate's.
    """

    def __init__(self, config: Config) -> None:
        self._rise, self._keep, self._cycle = config.guard, config.keep, config.cycle
        self._pooled = config.budget == "batch"
        self._told = [0.0, 0.0, 0.0]  # what others do not know yet: samples, the sums of their means and of the squares
        self._samples = 0.0  # seen so far, by all ranks
        self._mean = self._square = 0.0  # running averages of the samples' means, and of the squares of these
        self._lowest = float("inf")
        self._left = 0  # steps that it stays open

    @property
    def looks(self) -> bool:
        """Is there one?"""
        return self._rise is not None

    @property
    def open(self) -> bool:
        """Are steps full now?"""
        return self.looks and self._left > 0

    def see(self, m: Tensor, losses: Tensor, candidates: Tensor, whole: Tensor, *, apart: bool = False) -> None:
        """What a forward of this rank said of samples that kept every label.

        Args:
            m: float [N, L], difficulties before it, or what is expected of labels that have none.
            losses: float [N, L].
            candidates: bool [N, L], the labels.
            whole: bool [N], samples that kept all of theirs.
            apart: does a sparse step keep a share of each sample in any case?
        """
        pool = candidates & whole[:, None]
        kept = keep_share(m, pool, self._keep, pooled=self._pooled and not apart)
        easy = pool & ~kept & torch.isfinite(losses)
        means = torch.where(easy, losses, 0.0).sum(1)[easy.any(1)] / easy.sum(1)[easy.any(1)]
        for i, number in enumerate((len(means), float(means.sum()), float(means.square().sum()))):
            self._told[i] += number

    def give(self) -> list[float]:
        """What this rank saw since it was asked last."""
        told, self._told = self._told, [0.0, 0.0, 0.0]
        return told

    def take(self, told: Sequence[Sequence[float]]) -> None:
        """What all ranks gave, in the same order on each."""
        n, total, squares = (sum(of_rank[i] for of_rank in told) for i in range(3))
        if not n:
            return
        self._samples += n
        rate = min(1.0, n / min(self._samples, WINDOW))
        self._mean += rate * (total / n - self._mean)
        self._square += rate * (squares / n - self._square)
        if self._samples >= WINDOW:
            self._lowest = min(self._lowest, self._mean)

    def step(self, *, sparse_next: bool) -> bool:
        """An optimizer step was made: does the guard open now?

        Args:
            sparse_next: is the next one sparse by the schedule?
        """
        if self._rise is None:
            return False
        risen = self._mean - self._lowest
        if self.open:
            worse = risen > self._rise / 2
            self._left = self._left - 1 if worse else 0
            if worse and not self.open:
                self._lowest = self._mean
            return False
        error = sqrt(max(self._square - self._mean**2, 0.0) / (2 * WINDOW))
        self._left = self._cycle if sparse_next and risen > max(self._rise, _SURE * error) else 0
        return self.open

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self._samples, "mean": self._mean, "square": self._square, "lowest": self._lowest,
            "left": self._left, "told": list(self._told),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples, self._mean, self._square = state["samples"], state["mean"], state["square"]
        self._lowest, self._left, self._told = state["lowest"], state["left"], list(state["told"])
