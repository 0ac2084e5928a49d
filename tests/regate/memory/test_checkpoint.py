"""The gate's state on disk."""

from __future__ import annotations

from pathlib import Path

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
