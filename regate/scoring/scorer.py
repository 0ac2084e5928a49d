"""How much each label is worth: what the teacher and the student's own history say of it.

Per label there are two numbers. Its reference loss is stored once, by the sample's text. Its difficulty is a moving
average of the student's losses, by the sample, and until there is one, what the vocabulary's prior expects.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_adapters import Batch, Layout
from regate.config import Config
from regate.errors import ConfigError, GateNotAppliedError, StoreError
from regate.labels import predicted
from regate.memory.files import Table
from regate.memory.recurrence import Recurrence
from regate.memory.sharing import Exchange
from regate.memory.store import Store
from regate.scoring import difficulty
from regate.scoring.guard import Guard
from regate.scoring.selection import keep_share
from regate.teaching.teacher import Teacher
from regate.training.counters import Counters
from regate.training.segments import Segments


@dataclass(frozen=True)
class Samples:
    """The N samples of a batch, by name.

    Attributes:
        text: one key per sample, of its text alone; reference losses are stored by it.
        sample: one key per sample, of text and visual input; difficulties are stored by it.
        layout: a row a sample, [N, L] on the CPU.
        batch: the arguments of the model's call, with position ids of a row a sample.
        segments: where the samples stand in the batch.
        on_padding: labels of the batch that are no sample's (see `batches.on_host`), [B, S]; None where there are none.
    """

    text: list[bytes]
    sample: list[bytes]
    layout: Layout
    batch: Batch
    segments: Segments
    on_padding: Tensor | None = None

    @property
    def candidates(self) -> Tensor:
        """bool [N, L], the labels that some position predicts."""
        return predicted(self.layout.labels)


@dataclass
class _Pending:
    """What `Scorer.observe` was told; the losses are on the device and perhaps still being computed."""

    samples: Samples
    kept: Tensor
    losses: Tensor
    whole: Tensor
    apart: bool


class Scorer:
    """Scores labels, keeps the best, and learns from the losses of those that were kept.

    Losses take three steps to the store, so that neither the device nor the disk is waited for: `observe` takes them as
    they are being computed; `collect`, before the next forward, fetches them; `write` stores what was collected, while
    the device computes.

    Args:
        config: the gate's.
        exchange: has the store, and passes on to other ranks what is stored.
        counters: the gate's.
        teacher: None scores by difficulty alone.
        lazily: compute missing reference losses when they are needed; else `teach` must have computed them before.
    """

    def __init__(
        self,
        config: Config,
        *,
        exchange: Exchange,
        counters: Counters,
        teacher: Teacher | None,
        lazily: bool,
    ) -> None:
        self.config, self.exchange, self.counters = config, exchange, counters
        self.teacher, self.lazily = teacher, lazily
        self.taught_by: dict[str, str] = {}  # the teacher's fingerprint
        self.prior = difficulty.VocabularyPrior(decay=config.ema_decay)
        self.recurrence = Recurrence()
        self.guard = Guard(config)
        self._pending: list[_Pending] = []
        self._unwritten: dict[bytes, np.ndarray] = {}  # difficulties that are not in the store yet

    @property
    def store(self) -> Store:
        """Of reference losses and difficulties."""
        return self.exchange.store

    def use(self, store: Store) -> None:
        """Take another store; its reference losses must be this teacher's.

        Raises:
            StoreMismatchError: they are another's.
            StoreInUseError: a run of another process learns into it.
        """
        if self.teacher is not None and not self.teacher.waits:
            self._bind(self.teacher, store)
        self.exchange.use(store)

    def meet_teacher(self, steps: int) -> None:
        """The weights of one that waits for them are there: are the store's reference losses its?

        On every rank, if on any. Weights that learn are the teacher's before the first of `steps` alone.

        Raises:
            StoreMismatchError: they are another's.
        """
        teacher = self.teacher
        if teacher is None or not teacher.waits:
            return
        if teacher.lasts or steps == 0:
            self._bind(teacher, self.store)
        teacher.waits = False

    def _bind(self, teacher: Teacher, store: Store) -> None:
        fingerprint = teacher.fingerprint()
        store.bind(fingerprint)
        self.taught_by = fingerprint

    def prepare(self, samples: Samples, *, full: bool, whole: Tensor | None = None, running: bool = True) -> None:
        """See that the samples of a training forward have reference losses; one without labels is a forward, too.

        Of a sparse step those in `whole`, bool [N], need none now, for they keep every label. `running`: the model's
        forward has begun.

        Raises:
            StoreError: they are missing, and must have been computed before training.
        """
        if self.teacher is None:
            return
        if self.lazily:
            if not full:
                self.teach(samples, running=running, whole=whole)
        elif missing := self.store.missing("reference", samples.text):
            raise StoreError(
                f"{len(missing)} of {len(samples.text)} samples have no reference loss, and no teacher is kept beside "
                "the model that learns. Run gate.precompute over every sample before the first optimizer step (with "
                "teacher='first' a Trainer does it by itself); texts that are drawn anew each epoch, and data sets "
                "without a length, need teacher='copy' or '4bit'. When resuming, give regate.apply the run's store"
            )

    def keep(self, samples: Samples, *, whole: Tensor | None = None, apart: bool = False) -> Tensor:
        """The `ceil(keep * n)` labels that are worth most, by `Config.budget`, bool [N, L]; after `prepare`.

        Of those in `whole`, bool [N], every label. `apart`: a share of each sample in any case.
        """
        config = self.config
        drawn_by = (config.seed * 1_000_003 + self.counters.labels_seen) % 2**63  # torch takes no more bits
        generator = torch.Generator().manual_seed(drawn_by)
        draws = torch.rand(samples.candidates.shape, generator=generator, dtype=torch.float32, device="cpu")
        scores = draws if config.selection == "random" else self._scores(samples)
        every = torch.zeros_like(samples.candidates) if whole is None else samples.candidates & whole[:, None]
        pooled = config.budget == "batch" and not apart
        others = samples.candidates & ~every
        kept = keep_share(scores, others, config.keep, pooled=pooled, explore=config.explore, draws=draws)
        return kept | every

    def _scores(self, samples: Samples) -> Tensor:
        """[N, L] float32, read at candidates only: `student_weight*m + reference_weight*ref`, or the user's function.

        Raises:
            ConfigError: the function's scores are no finite numbers, one for each label.
        """
        config, candidates = self.config, samples.candidates
        prior = self._prior_of(samples)
        m = _known(self._difficulties(samples.sample, candidates), prior)
        ref = torch.zeros_like(m)
        if self.teacher is not None:
            ref = _spread(self.store.get("reference", samples.text), candidates, 0.0)
        if config.score is None:
            return config.student_weight * m + config.reference_weight * ref
        scores = config.score(m, ref, prior)
        if not isinstance(scores, Tensor) or scores.shape != m.shape or not bool(scores[candidates].isfinite().all()):
            told = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(
                f"Config.score must return finite scores of the shape of m, {list(m.shape)}, on the CPU; got {told}"
            )
        return scores

    def teach(self, samples: Samples, *, running: bool = False, steps: int = 0, whole: Tensor | None = None) -> None:
        """Compute and store the reference losses of those samples that have none.

        Where the model is split over ranks, every rank must call it at the same time.

        Args:
            samples: of a batch.
            running: is the model's forward running, with its parameters as whole as they become?
            steps: optimizer steps that the model has made.
            whole: those that are left out, bool [N].

        Raises:
            GateNotAppliedError: there is no teacher.
            StoreError: the teacher is the model before its first step, and it has made some.
        """
        teacher = self.teacher
        if teacher is None:
            raise GateNotAppliedError(
                "this gate has no teacher (teacher=None, reference_weight=0, selection='random' or keep=1)"
            )
        left_out = [False] * len(samples.text) if whole is None else whole.tolist()
        wanted = [key for key, left in zip(samples.text, left_out, strict=True) if not left]
        missing = self.store.missing("reference", wanted)
        if not teacher.anyone(bool(missing)):
            return
        if steps > 0 and not teacher.lasts:
            raise StoreError(
                f"{len(missing)} of {len(samples.text)} samples have no reference loss, and they would be computed by "
                f"the model itself, which has made {steps} optimizer steps since: it no longer is the teacher. Give "
                "regate.apply the store of the run, or compute them before the first step, or keep a copy "
                "(teacher='copy' or '4bit')"
            )
        start = time.perf_counter()
        teacher.check()
        if running:
            self._compute(teacher, samples, missing)
        else:
            teacher.outside(lambda: self._compute(teacher, samples, missing))
        self.counters.teacher_samples += len(missing)
        self.counters.teacher_seconds += time.perf_counter() - start

    def _compute(self, teacher: Teacher, samples: Samples, missing: Sequence[bytes]) -> None:
        if not missing:
            teacher.keep_pace(samples.batch, samples.layout)
            return
        rows = [samples.text.index(key) for key in missing]
        losses = teacher.losses(samples.batch, samples.layout, rows)
        self._put("reference", {k: x.numpy() for k, x in zip(missing, losses, strict=True)})

    def pass_on(self, samples: Samples) -> None:
        """Tell other ranks, at the next exchange, the reference losses of these samples, whenever they were made."""
        if self.exchange.needed:
            found = zip(samples.text, self.store.get("reference", samples.text), strict=True)
            self.exchange.add("reference", {key: losses for key, losses in found if losses is not None})

    def _prior_of(self, samples: Samples) -> Tensor:
        """[N, L] float32, what the student's losses on each label's token are on average."""
        return self.prior.expect(torch.where(samples.candidates, samples.layout.labels, 0))

    def _difficulties(self, names: Sequence[bytes], candidates: Tensor) -> Tensor:
        """[N, L] float32 of N samples with labels at `candidates`, bool [N, L]; `UNSEEN` where there is none."""
        return _spread(self._latest(names), candidates, difficulty.UNSEEN)

    def _latest(self, names: Sequence[bytes]) -> list[np.ndarray | None]:
        """What is known of these samples, each [n_labels]; None of one that was not met."""
        rows = self.store.get("difficulty", names)
        return [self._unwritten.get(name, row) for name, row in zip(names, rows, strict=True)]

    def observe(self, samples: Samples, kept: Tensor, losses: Tensor, *, whole: Tensor, apart: bool) -> None:
        """The student's `losses` at labels `kept`, bool [N, L], in the order in which they stand.

        `whole`, bool [N], are the samples that kept every label because their step or their turn was full; `apart` as
        in `keep`.
        """
        self._pending.append(_Pending(samples, kept, losses, whole, apart))

    def collect(self) -> None:
        """Learn from the losses of earlier forwards; waits until they are computed."""
        pending, self._pending = self._pending, []
        for item in pending:
            names, candidates, losses = item.samples.sample, item.samples.candidates, item.losses.cpu()
            self.counters.nonfinite_losses += int((~torch.isfinite(losses)).sum())
            prior = self._prior_of(item.samples) if self.guard.looks else None
            self.prior.observe(item.samples.layout.labels[item.kept], losses)
            latest = self._latest(names)
            self._look_out(item.samples, [row is not None for row in latest])
            m = _spread(latest, candidates, difficulty.UNSEEN)
            loss = torch.zeros_like(m)
            loss[item.kept] = losses
            if prior is not None:
                self.guard.see(_known(m, prior), loss, candidates, item.whole, apart=item.apart)
            for n, rows in enumerate(_copies(names)):
                some, there = [names[b] for b in rows], candidates[rows]
                before = self._difficulties(some, there) if n else m[rows]  # as the copies before left them
                after = difficulty.update(before, loss[rows], item.kept[rows], decay=self.config.ema_decay)
                labels = zip(some, after[there].split(there.sum(1).tolist()), strict=True)
                self._unwritten |= {name: of_name.numpy() for name, of_name in labels if len(of_name)}

    def _look_out(self, samples: Samples, known: Sequence[bool]) -> None:
        """Were these samples seen before? Also those of which no label was kept."""
        rows = samples.candidates.any(1).nonzero().squeeze(1).tolist()
        text, sample = [samples.text[b] for b in rows], [samples.sample[b] for b in rows]
        self.recurrence.see(text, sample, known=[known[b] for b in rows])

    def write(self) -> None:
        """Store what was collected."""
        if self._unwritten:
            self._put("difficulty", self._unwritten)
            self._unwritten = {}

    def flush(self) -> None:
        """Learn from every forward so far, and store it."""
        self.collect()
        self.write()

    def forget(self) -> None:
        """Drop losses that were not written yet, or not told to other ranks."""
        self._pending.clear()
        self._unwritten.clear()
        self.exchange.forget("difficulty", "owed")

    def _put(self, table: Table, records: dict[bytes, np.ndarray]) -> None:
        self.store.put(table, records)
        self.exchange.add(table, records)


def _copies(names: Sequence[bytes]) -> list[list[int]]:
    """Which samples are the first of their names, which the second, and so on.

    A batch may hold a sample several times, with other labels kept each time: each copy learns on from the last.
    """
    times: Counter[bytes] = Counter()
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for b, name in enumerate(names):
        rows[times[name]].append(b)
        times[name] += 1
    return list(rows.values())


def _known(m: Tensor, prior: Tensor) -> Tensor:
    """Difficulties, and what the prior expects where there is none."""
    return torch.where(m == difficulty.UNSEEN, prior, m)


def _spread(rows: Sequence[np.ndarray | None], candidates: Tensor, missing: float) -> Tensor:
    """Per-sample label values [n_labels] onto their positions [N, L]; `missing` everywhere else.

    Raises:
        StoreError: a sample has other labels than those that are known under its key.
    """
    out = torch.full(candidates.shape, missing, dtype=torch.float32, device="cpu")
    for b, n in enumerate(candidates.sum(1).tolist()):
        if (row := rows[b]) is not None and len(row) != n:
            raise StoreError(
                f"sample {b} of this batch has {n} labels, but under its key there are losses of {len(row)}: two "
                "samples share one of the `sample_ids`, as rows of another data set in the same store do; or a "
                "sample's answer is not always the same, and then it needs no id"
            )
    known = [row for row in rows if row is not None]
    if known:
        there = torch.tensor([row is not None for row in rows], device="cpu")
        out[candidates & there[:, None]] = torch.from_numpy(np.concatenate(known))
    return out
