"""The gate's state on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regate
from regate.errors import CheckpointError
from regate.memory import checkpoint


@pytest.mark.parametrize("lengths", [[], [3], [2, 0, 5]])
def test_packing_keeps_records_to_the_bit(lengths: list[int]) -> None:
    random = np.random.default_rng(0)
    rows = [(bytes([n] * 16), random.random(length).astype(np.float16).astype(np.float32)) for n, length in
            enumerate(lengths)]  # fmt: skip
    again = list(checkpoint.unpack(checkpoint.pack(rows)))
    assert [key for key, _ in again] == [key for key, _ in rows]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(again, rows, strict=True))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 1})
    with pytest.raises((TypeError, AttributeError, Exception), match="pickle"):
        checkpoint.save(tmp_path, {"step": 2, "bad": (x for x in ())})
    assert checkpoint.load(tmp_path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["regate.pt"]


def test_a_folder_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint.save("~/run", {"step": 1})
    assert checkpoint.load("~/run") == {"step": 1}
    assert (tmp_path / "run" / "regate.pt").exists()


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(regate.RegateError, match=r"holds no regate\.pt"):
        checkpoint.load(tmp_path)
    torch.save({"step": 1}, tmp_path / "regate.pt")
    whole = (tmp_path / "regate.pt").read_bytes()
    (tmp_path / "regate.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="older checkpoint"):
        checkpoint.load(tmp_path)


def _as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, of: int = 2, *, here: int | None = None) -> None:
    """`here`: its number on its node."""
    monkeypatch.setattr(checkpoint, "rank", lambda: rank)
    monkeypatch.setattr(checkpoint, "ranks", lambda: of)
    monkeypatch.setattr(torch.distributed, "get_node_local_rank", lambda fallback=None: rank if here is None else here)


def test_each_node_has_what_its_ranks_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks, each with a disk of its own."""
    for rank in range(4):
        _as_rank(monkeypatch, rank, 4, here=rank % 2)
        state: dict[str, Any] = {"step": 3, "prior": rank}
        if checkpoint.writes_all(on_each_node=True):
            state["difficulty"] = "all"
        checkpoint.save(tmp_path / str(rank // 2), state, on_each_node=True)
    for rank, prior in enumerate(range(4)):
        _as_rank(monkeypatch, rank, 4, here=rank % 2)
        found = checkpoint.load(tmp_path / str(rank // 2))
        assert found == {"step": 3, "prior": prior, "difficulty": "all"}
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["regate-rank3.pt", "regate.pt"]


def test_what_ranks_left_that_are_no_more_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        _as_rank(monkeypatch, rank)
        checkpoint.save(tmp_path, {"step": 1, "prior": rank})
    _as_rank(monkeypatch, 0, 1)
    checkpoint.save(tmp_path, {"step": 9, "prior": 0})
    _as_rank(monkeypatch, 1)
    assert checkpoint.load(tmp_path) == {"step": 9, "prior": 0}
