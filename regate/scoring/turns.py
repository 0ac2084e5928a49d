"""Full turns: which samples keep every label beside others that do not (`Config.schedule="interleaved"`).

    share     `full_steps / cycle`: of a sample's visits, those in which it keeps every label
    owed      turns that a sample's visits were worth, a share each, less those that it has had. It begins with a part
              of a turn that the sample's key draws, so that samples which were never seen come due evenly, too
    ahead     turns that this process has given, less those that the visits of its samples were worth

A forward of n samples gives `floor(n * share)` full turns to those that are owed most, equal ones in the order of
their keys. Where n * share is no whole number the next in order has one, too, if it is owed `1 + ahead` by then: a
whole turn, more where the process is ahead, less where it is behind. So

    no forward has more full rows than its share, rounded up       which is what sets the peak of memory
    turns given are the share of all visits, to less than two      so that steps cost the same, micro-batches of one
                                                                   row, too, added up over a step
    each sample has turns in proportion to its visits              what it missed stays owed to it, in whichever order
                                                                   and batches samples come

Two cases leave less to choose. **Several ranks** wait for the one with a full row, so they give the turn that is left
over in the same forwards, whosever is owed one there. And where one full row makes all rows of a forward as long, for
they cannot be laid end to end, all of them have their turn **at once**, in one forward of `1 / share`, on every rank.
Which forwards that are follows from the step and the number of the forward in it, and so needs no telling.

Counting rows alone, each 1/share-th of them full, would give a batch that is smaller than that all its turns or none,
epoch after epoch, wherever an epoch's rows are a multiple of it. "Whose last turn lies furthest back" would give those
that are never seen again, as in a stream, every turn. Drawing at random leaves one sample in two hundred without a full
turn after forty visits at a share of 1/8.

What is owed needs a number of 16 bits per sample, two where one would round it, kept beside its difficulty: exchanged
by ranks, saved in checkpoints. A rule without it would have to know which of a sample's visits this one is, and so the
epoch, which loops do not tell.
"""

from __future__ import annotations

from fractions import Fraction
from hashlib import blake2b
from math import floor

import numpy as np
import torch
from torch import Tensor

from regate.config import Config
from regate.memory.sharing import Exchange
from regate.ranks import ranks
from regate.scoring.scorer import Samples


class Turns:
    """Gives full turns to the samples of a process's forwards.

    Args:
        config: the gate's.
        exchange: has the store, and passes on to other ranks what is stored.

    Attributes:
        ahead: see the module's description; whole number of `1 / share.denominator` turns, as all that is owed is.
    """

    def __init__(self, config: Config, exchange: Exchange) -> None:
        self.interleaved = config.schedule == "interleaved" and config.full_steps > 0
        self.share, self.cycle, self.seed = Fraction(config.full_steps, config.cycle), config.cycle, config.seed
        self.exchange, self.ahead = exchange, 0
        self._step, self._micro = -1, 0

    def forward(self, step: int) -> None:
        """A training forward of the optimizer step `step` begins, on this rank and on every other."""
        self._micro = self._micro + 1 if step == self._step else 0
        self._step = step

    def of(self, samples: Samples, *, at_once: bool = False) -> Tensor | None:
        """Those samples of a sparse step that have their full turn now, bool [N]; `took` notes that they had it.

        None where the schedule gives no such turns. With `at_once` it is all of them, or none.
        """
        if not self.interleaved:
            return None
        whole = torch.zeros(len(samples.sample), dtype=torch.bool, device="cpu")
        if not (labelled := _labelled(samples)):
            return whole
        if at_once:
            whole[labelled] = self._due(self.share)
            return whole
        owed = self._owed([samples.sample[i] for i in labelled])
        order = sorted(labelled, key=lambda i: (-owed[samples.sample[i]], samples.sample[i]))
        turn, worth = self.share.denominator, self.share.numerator
        n, part = divmod(len(order) * worth, turn)
        if part and ranks() > 1:
            n += self._due(Fraction(part, turn))
        elif part:
            n += owed[samples.sample[order[n]]] + worth >= turn + self.ahead
        whole[order[:n]] = True
        return whole

    def _due(self, rate: Fraction) -> bool:
        """Is the running forward one of those, `rate` of all and evenly spread, that are due on all ranks?

        In each cycle they are others, lest an epoch that divides it meet the same samples every time.
        """
        shift = Fraction(_drawn(b"cycle%d " % (self._step // self.cycle), self.seed), 2**64)
        at = self._step + self._micro
        return floor(rate * (at + 1) + shift) > floor(rate * at + shift)

    def took(self, samples: Samples, whole: Tensor) -> None:
        """A sparse step's samples were trained on, those in `whole` [N] with every label: store what is owed now."""
        if not (labelled := _labelled(samples)):
            return
        turn, owed = self.share.denominator, self._owed([samples.sample[i] for i in labelled])
        had = whole.tolist()
        for i in labelled:
            change = had[i] * turn - self.share.numerator
            owed[samples.sample[i]] -= change
            self.ahead += change
        records = {key: _halves(number / turn) for key, number in owed.items()}
        self.exchange.store.put("owed", records)
        self.exchange.add("owed", records)

    def _owed(self, keys: list[bytes]) -> dict[bytes, int]:
        """Before this visit."""
        turn = self.share.denominator
        owed = dict(zip(keys, self.exchange.store.get("owed", keys), strict=True))
        first = {key: _drawn(key, self.seed) % turn for key, turns in owed.items() if turns is None}
        known = {
            key: round(float(turns.astype(np.float64).sum()) * turn) for key, turns in owed.items() if turns is not None
        }
        return first | known


def _labelled(samples: Samples) -> list[int]:
    """The samples with something to keep."""
    return [i for i, has in enumerate(samples.candidates.any(1).tolist()) if has]


def _halves(owed: float) -> np.ndarray:
    """As it is stored: in 16 bits, and in 16 more what these round off."""
    high = np.float16(owed)
    low = np.float16(owed - float(high))
    return np.array([high, low] if low else [high], np.float16)


def _drawn(what: bytes, seed: int) -> int:
    """Below 2^64."""
    digest = blake2b(what + repr(seed).encode(), digest_size=8, person=b"turn").digest()
    return int.from_bytes(digest, "little")
