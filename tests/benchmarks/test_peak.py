"""The benchmark of peak memory: it runs, and full rows in every step keep less at a time than full steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import peak, tables

WORKLOAD = "96/60/100"


def test_runs(tmp_path: Path) -> None:
    out = tmp_path / "peak-cpu.json"
    peak.main(["--model", "tiny", "--rows", "8", "--steps", "2", "--only", WORKLOAD, "--out", str(out)])
    arms = json.loads(out.read_text())["workloads"][WORKLOAD]["arms"]
    assert list(arms) == list(peak.ARMS)
    kept = {name: arm["of_dense_saved"] for name, arm in arms.items()}
    assert kept["interleaved"] < kept["cycled"] < kept["dense"] == 1
    assert kept["interleaved, half the visual tokens"] < kept["interleaved"]
    first, second = arms["cycled"]["steps"]["saved"]
    assert second < first == arms["cycled"]["peak_saved"]  # a full step, and a sparse one
    assert f"| {WORKLOAD} |" in tables.write_all(tmp_path)


def test_allocated() -> None:
    """The most that lives at once: two of the three megabytes."""

    def step() -> None:
        first = torch.empty(2**20, dtype=torch.uint8)
        second = torch.empty(2**20, dtype=torch.uint8)
        del first
        third = torch.empty(2**20, dtype=torch.uint8)
        del second, third

    assert peak.allocated(step, "cpu") == pytest.approx(2 * 2**20, rel=0.01)
