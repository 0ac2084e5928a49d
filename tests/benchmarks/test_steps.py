"""The benchmark of steps: it runs, goes on where it stopped, and its arithmetic is that of the captured graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, steps, tables
from benchmarks.arithmetic import Arithmetic, roofline
from benchmarks.models import SIZES, build
from benchmarks.workloads import WORKLOADS, batch, kept_labels
from regate.insight.estimate import costs_of, inspect

WORKLOAD = "96/60/100"


def test_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "steps.json"
    command = ["--model", "tiny", "--rows", "2", "--repeats", "2", "--only", WORKLOAD, "--out", str(out)]
    steps.main([*command, "--lora", "--checkpointing", "--alone"])
    result = json.loads(out.read_text())
    found = result["workloads"][WORKLOAD]
    expected = ("dense", "loss masking", "AdamW alone", "per-layer gather", "random-LTD")
    expected += ("regate full", "regate sparse", "regate thinned")
    assert {f"{arm} eager" for arm in expected} <= set(found["arms"])
    assert found["refused"] == {}
    assert found["possible"]["thinned"] > found["possible"]["sparse"] > found["possible"]["full"] > 1
    arms = found["arms"]
    assert arms["regate sparse eager"]["graphs"] == 1
    assert arms["regate sparse eager"]["saved_bytes"] < arms["dense eager"]["saved_bytes"]
    assert WORKLOAD in tables.table(result, "eager")
    assert WORKLOAD in tables.predictions(result, "eager")
    tables.draw(result, "eager", tmp_path / "steps.png")

    def again(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(steps, "measure", again)
    steps.main([*command, "--lora", "--checkpointing", "--alone"])
    with pytest.raises(AssertionError, match="again"):
        steps.main(command)  # other settings


def test_arithmetic_is_that_of_the_captured_graph() -> None:
    model = build(SIZES["tiny"], device="cpu", dtype=torch.float32)
    arithmetic, costs = Arithmetic.of(model), costs_of(model, inspect(model))
    for positions, predictions in ((256, 256), (200, 40)):
        assert arithmetic.flops(positions, predictions) == pytest.approx(3 * costs.forward(positions, predictions))
    adapted = Arithmetic.of(build(SIZES["tiny"], device="cpu", dtype=torch.float32, lora=True, checkpointing=True))
    assert (adapted.weights, adapted.attention, adapted.head) == (3, 4, 2)
    assert adapted.per_position == arithmetic.per_position


def test_share_of_positions() -> None:
    sample = WORKLOADS["long answers, no image"]
    data = batch(sample, 4, 256)
    kept = kept_labels(data["labels"], 0.5)
    result = {"settings": {"model": "tiny"}}
    share = tables.share_computed(result, {"tokens": list(sample), "rows": 4})
    by_hand = (4 * sample.prompt + int(kept.sum())) / data["labels"].numel()
    assert share == pytest.approx(by_hand, abs=0.01)  # the prompt's last position predicts a label


def test_another_machine_starts_anew(tmp_path: Path) -> None:
    result = {"command": "x", "torch": "1", "device": {"cpu": "a", "cores": 2, "load_average": 0.5}, "workloads": {}}
    machine.write(result, tmp_path / "x.json")
    same = {**result, "command": "y", "device": {**result["device"], "load_average": 2.0}}
    assert machine.earlier(tmp_path / "x.json", same) == result
    assert machine.earlier(tmp_path / "x.json", {**same, "torch": "2"}) is None
    assert machine.earlier(tmp_path / "x.json", {**same, "device": {"cpu": "b", "cores": 2}}) is None
    assert machine.earlier(tmp_path / "y.json", same) is None


def test_tables_go_where_their_marker_is() -> None:
    page = "before\n<!-- a b -->\nold\n<!-- end -->\nafter\n<!-- c -->\nkept\n<!-- end -->\n"
    assert tables.into(page, "<!-- a b -->\n| 1 |\n<!-- end -->\n\n<!-- d -->\n2\n<!-- end -->\n") == page.replace(
        "old", "| 1 |"
    )


def test_roofline() -> None:
    assert roofline(989e12, 0, "NVIDIA H200") == pytest.approx(1.0)
    assert roofline(0, int(4.8e12 / 14), "NVIDIA H200") == pytest.approx(1.0)
    assert roofline(1.0, 1, "NVIDIA of tomorrow") is None
