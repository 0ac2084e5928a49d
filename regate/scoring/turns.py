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

Counting rows alone, each 1/share-th of them full, would give a batch that is smaller than that all its turns or none,
epoch after epoch, wherever an epoch's rows are a multiple of it. "Whose last turn lies furthest back" would give those
that are never seen again, as in a stream, every turn. Drawing at random leaves one sample in two hundred without a full
turn after forty visits at a share of 1/8.

What is owed needs one number of 16 bits per sample, kept beside its difficulty: exchanged by ranks, saved in
checkpoints. A rule without it would have to know which of a sample's visits this one is, and so the epoch, which loops
do not tell.
"""

from __future__ import annotations

from fractions import Fraction
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from regate.config import Config
from regate.memory.sharing import Exchange
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
        self.interleaved = config.schedule == "interleaved"
        self.share, self.seed = Fraction(config.full_steps, config.cycle), config.seed
        self.exchange, self.ahead = exchange, 0

    def of(self, samples: Samples) -> Tensor | None:
        """Those samples of a sparse step that have their full turn now, bool [N]; `took` notes that they had it.

        None where the schedule gives no such turns.
        """
        if not self.interleaved:
            return None
        whole = torch.zeros(len(samples.sample), dtype=torch.bool)
        if not (labelled := _labelled(samples)):
            return whole
        owed = self._owed([samples.sample[i] for i in labelled])
        order = sorted(labelled, key=lambda i: (-owed[samples.sample[i]], samples.sample[i]))
        turn, worth = self.share.denominator, self.share.numerator
        n, part = divmod(len(order) * worth, turn)
        if part:
            n += owed[samples.sample[order[n]]] + worth >= turn + self.ahead
        whole[order[:n]] = True
        return whole

    def took(self, samples: Samples, whole: Tensor) -> None:
        """A sparse step's samples were trained on, those in `whole` [N] with every label: store what is owed now."""
        if not (labelled := _labelled(samples)):
            return
        turn, owed = self.share.denominator, self._owed([samples.sample[i] for i in labelled])
        for i in labelled:
            change = int(whole[i]) * turn - self.share.numerator
            owed[samples.sample[i]] -= change
            self.ahead += change
        records = {key: np.array([number / turn], np.float32) for key, number in owed.items()}
        self.exchange.store.put("owed", records)
        self.exchange.add("owed", records)

    def _owed(self, keys: list[bytes]) -> dict[bytes, int]:
        """Before this visit."""
        turn = self.share.denominator
        stored = zip(keys, self.exchange.store.get("owed", keys), strict=True)
        return {key: self._drawn(key) if owed is None else round(float(owed[0]) * turn) for key, owed in stored}

    def _drawn(self, key: bytes) -> int:
        digest = blake2b(key + repr(self.seed).encode(), digest_size=8, person=b"turn").digest()
        return int.from_bytes(digest, "little") % self.share.denominator


def _labelled(samples: Samples) -> list[int]:
    """The samples with something to keep."""
    found: list[int] = samples.candidates.any(1).nonzero().squeeze(1).tolist()
    return found
