"""Two ranks train as one process does, and know of each other's samples."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.ranks import AT_ONCE, CELLS, STEPS, Cell, train

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]  # all cells in the first test; machines are shared
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, for all cells: starting processes costs more than training in them."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.integrations.ranks", str(folder)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=1500) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != AT_ONCE], ids=str)
def test_ranks_train_as_one_process(cell: Cell, ranks: list[dict[str, Any]]) -> None:
    alone, found = train(cell, None), [rank[str(cell)] for rank in ranks]
    # DeepSpeed adds gradients up in float32; LLaVA takes its loss in it (others' with other rows beside it), and norms,
    # of which there are two where keys are made at rest.
    exact = 2e-5 if cell.deepspeed or cell.batches in ("unlabelled first", "visible") else 1e-9
    for rank, of_rank in enumerate(found):
        for step in range(STEPS):
            kept, expected = of_rank["kept"][step], alone["kept"][2 * step + rank]
            assert torch.equal(kept, expected) if expected is not None else kept is None
            assert of_rank["losses"][step] == pytest.approx(alone["losses"][2 * step + rank], abs=exact)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(of_rank["weights"][name], weight, atol=exact, rtol=0)
        report = of_rank["report"]
        assert report["steps_full"] + report["steps_sparse"] == STEPS - report["forwards_ungated"]
        assert report["forwards_ungated"] == sum(kept is None for kept in of_rank["kept"])
        assert report["attention_blocks"] == report["mlp_blocks"] == 2
        assert report["positions_computed"] < report["positions_seen"]


@pytest.mark.parametrize("cell", CELLS[:1], ids=str)
def test_difficulties_reach_the_other_rank(cell: Cell, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[str(cell)]["difficulty"] for rank in ranks)
    assert len(first) == 4  # two samples of each rank
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert ranks[0][str(cell)]["sent"] > 0


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_turns_of_the_other_ranks_samples_are_known(wrap: str, ranks: list[dict[str, Any]]) -> None:
    """In two steps after warm-up each batch had two full turns for its two samples: nothing is owed that was not."""
    cell = next(cell for cell in CELLS if (cell.wrap, cell.batches) == (wrap, "full rows"))
    first, second = (rank[str(cell)]["owed"] for rank in ranks)
    assert len(first) == 4
    assert first == second == train(cell, None)["owed"]
    for rank in ranks:
        assert (rank[str(cell)]["report"]["samples_whole"], rank[str(cell)]["report"]["samples_sparse"]) == (2, 2)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.batches == "guarded"], ids=str)
def test_what_one_rank_sees_get_worse_makes_steps_full_on_all(cell: Cell, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        report = rank[str(cell)]["report"]
        assert (report["steps_full"], report["steps_guarded"]) == (2, 1)


def test_turns_at_once_are_in_the_same_forwards(ranks: list[dict[str, Any]]) -> None:
    """Attention is written out, so rows are filled up: on all ranks all rows are full, or none."""
    first, second = (rank[str(AT_ONCE)] for rank in ranks)
    assert first["owed"] == second["owed"]
    assert len(first["owed"]) == 4
    assert first["report"]["samples_whole"] == second["report"]["samples_whole"]
    assert first["report"]["samples_whole"] + first["report"]["samples_sparse"] == 4


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.teacher == "first"], ids=str)
def test_a_model_that_zero3_has_split_teaches_itself(cell: Cell, ranks: list[dict[str, Any]]) -> None:
    """The references of a copy in one process, on every rank, and each computed once."""
    alone = train(cell, None)
    assert len(alone["references"]) == 4
    for rank in ranks:
        assert rank[str(cell)]["references"] == alone["references"]
        assert rank[str(cell)]["report"]["teacher_samples"] == 2
        assert rank[str(cell)]["report"]["steps_sparse"] == STEPS - 1


def test_a_gate_after_zero3s_engine_is_refused(ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("deepspeed")
    for rank in ranks:
        assert rank["too late"].startswith("UnsupportedShardingError: DeepSpeed ZeRO-3 gathers LlamaDecoderLayer")
        assert '{"leaf_module": {"classes": ["LlamaDecoderLayer"]}}' in rank["too late"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gathered_layers_are_dropped_until_the_backward_pass(backend: str, ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("deepspeed")
    assert all(rank["left"][backend] == [[]] * STEPS for rank in ranks)


def test_ids_are_read_off_embeddings_that_zero3_has_split(ranks: list[dict[str, Any]]) -> None:
    """keep=1 is the ungated run, though one rank looks up more embeddings than the other."""
    pytest.importorskip("deepspeed")
    for rank in ranks:
        ungated, gated = rank["own wrapper"][:2], rank["own wrapper"][2:]
        assert gated == pytest.approx(ungated, abs=1e-5)


def test_a_teacher_that_zero3_has_split_is_the_one_that_is_whole(ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("deepspeed")
    first, *others = [found for rank in ranks for found in rank["fingerprints"]]
    assert all(other == first for other in others)


def test_checkpoints_of_several_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["checkpoints"] == {"step": 2, "samples": 4, "files": ["regate-rank1.pt", "regate.pt"]}
