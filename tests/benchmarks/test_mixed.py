"""The benchmark of rows of different lengths runs, and lays them end to end."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import regate_patch
from benchmarks import mixed
from benchmarks.models import SIZES, build
from model_adapters import find_adapter


def test_runs(tmp_path: Path) -> None:
    out = tmp_path / "mixed.json"
    mixed.main(
        ["--model", "tiny", "--rows", "2", "--repeats", "1", "--median", "80", "--longest", "96", "--out", str(out)]
    )
    (batch,) = json.loads(out.read_text())["batches"]
    assert set(batch["seconds"]) == {"padded", "rows", "end to end"}
    assert all(64 <= length <= 96 for length in batch["lengths"])


def test_arms_are_what_they_are_called() -> None:
    torch._dynamo.reset()
    decoder = find_adapter(model := build(SIZES["tiny"], device="cpu", dtype=torch.float32)).decoder(model)
    steps = mixed.arms(decoder, torch.arange(12) < torch.tensor([[12], [7]]))
    found = {}
    for name, step in steps.items():
        step()
        statistics = getattr(decoder.forward, "statistics", regate_patch.Statistics())
        found[name] = [graph.end_to_end for graph in statistics.graphs]
    assert found == {"padded": [], "rows": [False], "end to end": [True]}
