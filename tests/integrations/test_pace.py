"""Ranks that see, hear or only read train as one process does, where FSDP2 has split encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integrations.processes import run_ranks
from tests.integrations.ranks_pace import STEPS, WALKS, train

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.integrations.ranks_pace", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("walk", WALKS)
def test_ranks_train_as_one_process(walk: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(walk, None)
    for rank, found in enumerate(of_rank[walk] for of_rank in ranks):
        assert found["losses"] == pytest.approx(alone["losses"][rank::2], abs=1e-10)
        assert found["without"] == alone["without"]  # none of zeros where one process has none
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, atol=1e-10, rtol=0)
        joins = WALKS[walk][2][rank]
        assert found["joined"] == STEPS * joins
        assert (f"{STEPS} forwards ran encoders for nothing" in found["text"]) is joins


@pytest.mark.parametrize(("walk", "rank"), [("photos and text", 1), ("text and photos", 0)])
def test_what_runs_for_nothing_leaves_no_trace(walk: str, rank: int, ranks: list[dict[str, Any]]) -> None:
    """An encoder that drops values and learns statistics, run for other ranks' photos."""
    found, alone = ranks[rank][walk], ranks[1 - rank]["text and text"]
    assert found["joined"] == STEPS
    assert found["drawn"] == alone["drawn"]
    assert all(not bool(mean.any()) for mean in found["statistics"])
    assert all(bool(mean.any()) for mean in ranks[1 - rank][walk]["statistics"])


def test_embeddings_that_ranks_look_up_unlike_often_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"].startswith("UnsupportedShardingError: LlamaModel is called with ids on ranks without")
