"""The benchmark of rows of different lengths runs, and its arms are what they are called."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import arms, mixed, tables

TINY = ["--model", "tiny", "--rows", "2", "--batches", "2", "--repeats", "1", "--median", "80", "--longest", "96"]


def test_runs(tmp_path: Path) -> None:
    mixed.main([*TINY, "--out", str(tmp_path / "mixed-tiny.json")])
    (batch,) = json.loads((tmp_path / "mixed-tiny.json").read_text())["batches"]
    assert list(batch["seconds"]) == [
        "padded", "grouped", "grouped, logits at labels", "end to end", "end to end, logits at labels", *mixed.GATED,
    ]  # fmt: skip
    assert len(batch["lengths"]) == 4
    assert all(64 <= length <= 96 for length in batch["lengths"])
    assert batch["padded_over_valid"] > batch["grouped_over_valid"] >= 1
    assert batch["over_strongest"][batch["strongest"]] == 1
    assert 1 <= batch["possible"]["exact"] < batch["possible"]["schedule"] < batch["possible"]["sparse"]
    assert "| 2 |" in tables.write_all(tmp_path)


def test_what_was_measured_before_is_still_read() -> None:
    result = json.loads((tables.FOLDER / "results" / "mixed-cpu.json").read_text())
    assert tables.mixed(result).count("\n") == 1 + len(result["batches"])


def test_gated_arms_lay_rows_end_to_end() -> None:
    args = argparse.Namespace(model="tiny", device="cpu", dtype="float32")
    (batch,) = mixed.batches(torch.tensor([12, 7]), 2, 256, device="cpu")
    computed = {}
    for name in mixed.GATED:
        torch._dynamo.reset()
        step, _ = mixed.made(args)[name]
        for _ in range(2):
            step(batch, batch["labels"] != -100)
        gate = arms.gate_of(step)
        assert gate is not None
        (graph,) = gate._parts.handle.statistics.last
        assert graph.end_to_end
        computed[name] = gate.report()["positions_computed"] // 2
    assert computed["regate sparse"] < computed["regate exact"] <= 19
