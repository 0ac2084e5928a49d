"""A sample is itself in any batch, in any order, with any padding; and another image makes another sample."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.zoo import members
from tests.zoo.batchings import NO_IMAGES, ONE_EACH, POOL, Sample, batch, sample_keys
from tests.zoo.releases import broken

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}
RUNNING = [name for name in members() if not broken(name)]
_IMAGE = st.integers(0, POOL - 1)


def _samples(name: str) -> st.SearchStrategy[list[Sample]]:
    fewest, most = (1, 1) if name in ONE_EACH else (0, 0) if name in NO_IMAGES else (0, 2)
    images = st.lists(_IMAGE, min_size=fewest, max_size=most).map(tuple)
    return st.lists(st.builds(Sample, st.integers(0, 3), images), min_size=1, max_size=5)


def _is_itself(name: str, samples: list[Sample], left: bool, wider: int) -> None:
    together = sample_keys(name, batch(name, samples, left=left, wider=wider))
    for sample, key in zip(samples, together, strict=True):
        assert sample_keys(name, batch(name, [sample])) == [key], (name, sample, samples)
    assert len(set(together)) == len(set(samples)), (name, samples)


@pytest.mark.parametrize("name", RUNNING)
def test_a_sample_is_itself_in_any_batch(name: str) -> None:
    @settings(max_examples=5, **QUIET)
    @given(_samples(name), st.booleans(), st.integers(0, 3))
    def holds(samples: list[Sample], left: bool, wider: int) -> None:
        _is_itself(name, samples, left, wider)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_a_sample_is_itself_in_many_batches(name: str) -> None:
    @settings(max_examples=100, **QUIET)
    @given(_samples(name), st.booleans(), st.integers(0, 3))
    def holds(samples: list[Sample], left: bool, wider: int) -> None:
        _is_itself(name, samples, left, wider)

    holds()


@pytest.mark.parametrize("name", RUNNING)
def test_as_many_images_as_rows(name: str) -> None:
    """Rows with two images, one and none: as many images as rows, which says nothing of whose they are."""
    if name in ONE_EACH | NO_IMAGES:
        samples = [Sample(text, (0,) if name in ONE_EACH else ()) for text in (0, 1, 2)]
    else:
        samples = [Sample(0, (0, 1)), Sample(1, (2,)), Sample(2, ())]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]):
        _is_itself(name, [samples[i] for i in order], left=False, wider=0)


@pytest.mark.parametrize("name", sorted(set(RUNNING) - NO_IMAGES))
def test_every_image_is_another_sample(name: str) -> None:
    """Also one that differs in a single value, or has its values elsewhere."""
    found = {sample_keys(name, batch(name, [Sample(1, (i,))]))[0] for i in range(POOL)}
    assert len(found) == POOL
