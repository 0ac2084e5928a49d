"""Which runs find their samples again, and which are told that they do not."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from regate.memory.recurrence import Recurrence


class Run:
    """A stream of samples, with the store's part played by a set."""

    def __init__(self, *, window: int = 200) -> None:
        self.recurrence, self.stored = Recurrence(window), set[bytes]()

    def see(self, samples: Iterator[tuple[int, int]]) -> Run:
        for text, image in samples:
            key = b"%d/%d" % (text, image)
            self.recurrence.see([b"%d" % text], [key], known=[key in self.stored])
            self.stored.add(key)
        return self


def _epoch(size: int, *, augmented: int = 0, seed: int = 0) -> Iterator[tuple[int, int]]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return ((i, i + 1_000_000 * augmented) for i in order)


@pytest.mark.parametrize("size", [60, 150, 1000])
def test_a_second_epoch_finds_every_sample(size: int) -> None:
    run = Run().see(_epoch(size, seed=1))
    assert run.recurrence.share == 0.0
    run.see(_epoch(size, seed=2))
    assert run.recurrence.share == pytest.approx(1.0 if size > 200 else size / min(2 * size, 200), abs=0.26)
    run.see(_epoch(size, seed=3))
    assert run.recurrence.share > 0.6
    assert run.recurrence.reason() is None


def test_one_epoch_is_no_fault() -> None:
    run = Run().see(_epoch(5000))
    assert run.recurrence.share == 0.0
    assert run.recurrence.telling
    assert run.recurrence.reason() is None
    run.recurrence.epoch_ended()
    assert run.recurrence.reason() is None


@pytest.mark.parametrize("texts", [20, 300, 3000])
def test_common_texts_with_other_images_are_no_fault(texts: int) -> None:
    """One epoch of questions that many images share."""
    draw = random.Random(0)
    run = Run()
    for step in range(20):
        run.see((draw.randrange(texts), 1000 * step + i) for i in range(1000))
        assert run.recurrence.reason() is None, step


@pytest.mark.parametrize("size", [500, 1000])
def test_images_that_change_each_epoch_are_named(size: int) -> None:
    run = Run()
    for epoch in range(3):
        run.see(_epoch(size, augmented=epoch, seed=epoch))
        reason = run.recurrence.reason()
        assert (reason is None) == (epoch == 0)
    assert "augmented anew each epoch" in reason
    assert run.recurrence.share == 0.0


def test_a_few_samples_twice_in_the_data_hide_nothing() -> None:
    run = Run()
    for epoch in range(3):
        run.see(_epoch(1000, augmented=epoch, seed=epoch))
        run.see((i, 0) for i in range(10))
    assert run.recurrence.reason() is not None


def test_small_data_needs_the_trainers_word() -> None:
    """Of a set smaller than the window every text is among the first."""
    run = Run()
    for epoch in range(3):
        run.see(_epoch(40, augmented=epoch, seed=epoch))
        run.recurrence.epoch_ended()
        assert (run.recurrence.reason() is None) == (epoch == 0)
    assert "augmented anew each epoch" in str(run.recurrence.reason())


def test_texts_that_change_each_epoch_are_named_where_epochs_are_known() -> None:
    run = Run()
    for epoch in range(2):
        run.see((10_000 * epoch + i, i) for i, _ in _epoch(500))
        run.recurrence.epoch_ended()
    assert "neither their images nor their texts" in str(run.recurrence.reason())


def test_the_share_means_something_after_a_window_or_an_epoch() -> None:
    run = Run().see(_epoch(199))
    assert not run.recurrence.telling
    assert run.see(_epoch(1)).recurrence.telling
    run = Run().see(_epoch(5))
    run.recurrence.epoch_ended()
    assert run.recurrence.telling
