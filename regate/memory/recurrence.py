"""Are samples found again? Difficulties help from the second sight of a sample on, if its key is still the same then.

Training for one epoch finds none, and nothing is wrong with it. What is wrong shows in the first samples' texts: where
each of them comes again, once an epoch, but never as the same sample, keys change from epoch to epoch. Texts that are
common, and come again with other images within an epoch, do so at random: some often, some not at all.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from statistics import fmean, pvariance

FEW = 0.1  # a share below which samples count as not found
_WINDOW = 1000
_ENOUGH = 50  # texts that say something
_OTHER_SAMPLES = (
    "samples are not found again: their texts come again, but as other samples, so no sample's own difficulty is used. "
    "Images that are augmented anew each epoch do that, or sample_ids that differ from epoch to epoch; pass sample_ids "
    "that stay (the row's number in the data set)"
)
_OTHER_TEXTS = (
    "samples are not found again: after the first epoch neither their images nor their texts come again, so no "
    "sample's own difficulty is used. Prompts that are drawn anew each epoch do that; where a sample's answer stays, "
    "pass sample_ids that stay, too (the row's number in the data set)"
)


class Recurrence:
    """Counts, among the samples of training forwards, those that were seen before.

    The first `window` samples' texts are remembered, as far as no two samples share them.

    Args:
        window: `share` is of so many of the latest samples.
    """

    def __init__(self, window: int = _WINDOW) -> None:
        self.window = window
        self._known: deque[bool] = deque(maxlen=window)
        self._seen = 0
        self._first: dict[bytes, bytes | None] = {}  # text -> sample, None where two share it
        self._again: Counter[bytes] = Counter()  # how often a first text came again
        self._same = 0  # and how many of these times as the same sample
        self._first_epoch: int | None = None  # how many samples it had, once it is over

    def see(self, text: Sequence[bytes], samples: Sequence[bytes], *, known: Sequence[bool]) -> None:
        """A forward's samples; `known`: does the store have their difficulties?"""
        for own_text, sample, found in zip(text, samples, known, strict=True):
            self._known.append(found)
            if self._seen < self.window and self._first_epoch is None:
                if self._first.setdefault(own_text, sample) != sample:
                    self._first[own_text] = None
            elif self._first.get(own_text) is not None:
                self._again[own_text] += 1
                self._same += self._first[own_text] == sample
            self._seen += 1

    def epoch_ended(self) -> None:
        """For trainers that know."""
        if self._first_epoch is None and self._seen:
            self._first_epoch = self._seen

    @property
    def share(self) -> float:
        """Of the latest samples, those that had been seen before; 0.0 before the first."""
        return sum(self._known) / max(len(self._known), 1)

    @property
    def telling(self) -> bool:
        """Has the share a meaning yet: is the first epoch over, or have a window's samples been seen?"""
        return self._first_epoch is not None or self._seen >= self.window

    def reason(self) -> str | None:
        """Why samples are not found again, where they should be; None where they are, or where none can be expected."""
        times = [self._again[text] for text, sample in self._first.items() if sample is not None]
        if self.share >= FEW or self._same > FEW * sum(times):
            return None
        once_an_epoch = len(times) >= _ENOUGH and _evenly(times)
        if self._first_epoch is None or self._seen < 2 * self._first_epoch:
            return _OTHER_SAMPLES if once_an_epoch else None
        return _OTHER_SAMPLES if any(times) else _OTHER_TEXTS


def _evenly(times: Sequence[int]) -> bool:
    """Has nearly everything come again, and about equally often? At random, variance and mean would be equal."""
    again = sum(n > 0 for n in times) / len(times)
    return again >= 0.9 and pvariance(times) <= fmean(times) / 2
