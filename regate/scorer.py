"""How much each label is worth: what the teacher and the student's own history say of it.

Per label there are two numbers. Its reference loss is stored once, by the sample's text. Its difficulty is a moving
average of the student's losses, by the sample, and until there is one, what the vocabulary's prior expects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_adapters import Batch, Layout
from regate import difficulty
from regate.config import Config
from regate.errors import GateNotAppliedError, StoreError
from regate.reference import Teacher
from regate.report import Counters
from regate.selection import keep_highest
from regate.sharing import Exchange
from regate.store import Store, Table


@dataclass(frozen=True)
class Samples:
    """The rows of a batch, by name.

    Attributes:
        text: one key per row, of its text alone; reference losses are stored by it.
        sample: one key per row, of text and visual input; difficulties are stored by it.
        candidates: bool [B, S], the labels that some position predicts.
    """

    text: list[bytes]
    sample: list[bytes]
    candidates: Tensor


@dataclass
class _Pending:
    """Losses of one forward on their way to the store."""

    samples: Samples
    kept: Tensor
    losses: Tensor


class Scorer:
    """Scores labels, keeps the best, and learns from the losses of those that were kept.

    Args:
        config: the gate's.
        exchange: has the store, and passes on to other ranks what is stored.
        counters: the gate's.
        teacher: None scores by difficulty alone.
        lazily: compute missing reference losses when they are needed; else only at step 0.
        vocabulary: V, rows of the prior.
    """

    def __init__(
        self,
        config: Config,
        *,
        exchange: Exchange,
        counters: Counters,
        teacher: Teacher | None,
        lazily: bool,
        vocabulary: int,
    ) -> None:
        self.config, self.exchange, self.counters = config, exchange, counters
        self.teacher, self.lazily = teacher, lazily
        self.prior = difficulty.VocabularyPrior(vocabulary, decay=config.ema_decay)
        self._pending: list[_Pending] = []

    @property
    def store(self) -> Store:
        """Of reference losses and difficulties."""
        return self.exchange.store

    def keep(self, batch: Batch, layout: Layout, samples: Samples, *, step: int) -> Tensor:
        """The `ceil(keep * n)` labels of each row that are worth most, bool [B, S].

        Raises:
            StoreError: a reference loss is missing, and there is no teacher to compute it.
        """
        scores = self._scores(batch, layout, samples, step)
        return keep_highest(scores, samples.candidates, self.config.keep)

    def _scores(self, batch: Batch, layout: Layout, samples: Samples, step: int) -> Tensor:
        """[B, S] float32, read at candidates only: `student_weight*m + reference_weight*ref`."""
        config, candidates = self.config, samples.candidates
        if config.selection == "random":
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.counters.labels_seen)
            return torch.rand(candidates.shape, generator=generator).to(candidates.device)
        m = _spread(self.store.get("difficulty", samples.sample), candidates, difficulty.UNSEEN)
        expected = self.prior.expect(torch.where(candidates, layout.labels, 0))
        score = config.student_weight * torch.where(m == difficulty.UNSEEN, expected, m)
        if self.teacher is not None:
            ref = _spread(self._references(batch, layout, samples.text, step), candidates, 0.0)
            score = score + config.reference_weight * ref
        return score

    def _references(self, batch: Batch, layout: Layout, text: list[bytes], step: int) -> Sequence[np.ndarray | None]:
        """Reference losses of the batch's rows, computed and stored where they are missing."""
        if not self.lazily and step > 0 and self.store.missing("reference", text):
            raise StoreError(
                "a sample has no reference loss, and teacher='precomputed' keeps no teacher; run "
                "gate.precompute over every sample before training, or use teacher='auto'"
            )
        self.teach(batch, layout, text)
        return self.store.get("reference", text)

    def teach(self, batch: Batch, layout: Layout, text: list[bytes]) -> None:
        """Compute and store the reference losses of those rows that have none.

        Raises:
            GateNotAppliedError: there is no teacher.
        """
        if self.teacher is None:
            raise GateNotAppliedError(
                "this gate has no teacher (teacher=None, reference_weight=0 or selection='random')"
            )
        missing = self.store.missing("reference", text)
        if not missing:
            return
        start = time.perf_counter()
        rows = [text.index(key) for key in missing]
        losses = self.teacher.losses(batch, layout, rows)
        self._put("reference", {k: x.numpy() for k, x in zip(missing, losses, strict=True)})
        self.counters.teacher_samples += len(rows)
        self.counters.teacher_seconds += time.perf_counter() - start

    def observe(self, samples: Samples, labels: Tensor, kept: Tensor, losses: Tensor) -> None:
        """The student's `losses` [N] at kept labels; difficulties are written by `flush`."""
        self._pending.append(_Pending(samples, kept, losses))
        self.prior.observe(labels[kept], losses)

    def flush(self) -> None:
        """Write the difficulties of earlier forwards to the store."""
        pending, self._pending = self._pending, []
        for item in pending:
            names, candidates = item.samples.sample, item.samples.candidates
            m = _spread(self.store.get("difficulty", names), candidates, difficulty.UNSEEN)
            loss = torch.zeros_like(m)
            loss[item.kept] = item.losses
            self.counters.nonfinite_losses += int((~torch.isfinite(item.losses)).sum())
            m = difficulty.update(m, loss, item.kept, decay=self.config.ema_decay).cpu()
            counts = candidates.sum(1).tolist()
            rows = m[candidates.cpu()].split(counts)
            self._put("difficulty", {k: r.numpy() for k, r in zip(names, rows, strict=True) if len(r)})

    def forget(self) -> None:
        """Drop losses that were not written yet."""
        self._pending.clear()

    def _put(self, table: Table, records: dict[bytes, np.ndarray]) -> None:
        self.store.put(table, records)
        self.exchange.add(table, records)


def _spread(rows: Sequence[np.ndarray | None], candidates: Tensor, missing: float) -> Tensor:
    """Per-row label values [n_labels] onto their positions [B, S]; `missing` everywhere else."""
    out = torch.full(candidates.shape, missing, dtype=torch.float32)
    where = candidates.cpu()
    for b, row in enumerate(rows):
        if row is not None:
            out[b, where[b]] = torch.from_numpy(row)
    return out.to(candidates.device)
