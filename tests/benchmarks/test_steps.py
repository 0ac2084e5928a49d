"""The benchmark of steps: it runs, goes on where it stopped, and its arithmetic is that of the captured graph."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, steps, tables
from benchmarks.arithmetic import Arithmetic, needed, roofline
from benchmarks.gpu import report, speed
from benchmarks.models import SIZES, build
from benchmarks.workloads import WORKLOADS, batch, kept_labels
from regate.insight.estimate import Sample, costs_of, inspect

WORKLOAD = "96/60/100"
DENSE = ("dense", "dense, logits at labels", "dense, end to end", "dense, both")


def test_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "steps.json"
    command = ["--model", "tiny", "--rows", "2", "--repeats", "2", "--only", WORKLOAD, "--out", str(out)]
    steps.main([*command, "--lora", "--checkpointing", "--alone"])
    result = json.loads(out.read_text())
    found = result["workloads"][WORKLOAD]
    expected = (*DENSE, "loss masking", "AdamW alone", "per-layer gather", "random-LTD")
    expected += ("regate full", "regate sparse", "regate exact", "regate thinned", "regate half", "regate quarter")
    assert {f"{arm} eager" for arm in expected} <= set(found["arms"])
    assert found["refused"] == {}
    assert found["possible"]["exact"] == found["possible"]["full"] > found["possible"]["unpadded"] > 1
    assert found["possible"]["quarter"] > found["possible"]["half"] > found["possible"]["sparse"]
    assert found["possible"]["thinned"] > found["possible"]["half"]
    assert found["possible"]["thinned"] > found["possible"]["sparse"] > found["possible"]["full"] > 1
    arms = found["arms"]
    assert arms["regate sparse eager"]["graphs"] == 1
    assert arms["regate sparse eager"]["saved_bytes"] < arms["dense eager"]["saved_bytes"]
    strongest = arms["dense eager"]["strongest"]
    assert steps.is_dense(strongest)
    assert arms[f"{strongest} eager"]["seconds"] <= arms["dense eager"]["seconds"]
    assert arms[f"{strongest} eager"]["ratio_to_strongest"] == 1
    assert f"{arms['regate sparse eager']['ratio_to_strongest']:.2f}x" in tables.strongest(result, "eager")
    assert WORKLOAD in tables.table(result, "eager")
    assert WORKLOAD in tables.predictions(result, "eager")
    tables.draw(result, "eager", tmp_path / "steps.png")

    def again(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(steps, "measure", again)
    steps.main([*command, "--lora", "--checkpointing", "--alone"])
    with pytest.raises(AssertionError, match="again"):
        steps.main(command)  # other settings


def test_models_are_gone_before_the_next_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU one alone may fill the memory; the collector runs when it is told to, as it would between large ones."""
    build_one, built, alive = steps.model, [], []

    def model(args: Any) -> torch.nn.Module:
        alive.append(sum(one() is not None for one in built))
        made = build_one(args)
        built.append(weakref.ref(made))
        return made

    monkeypatch.setattr(steps, "model", model)
    args = speed.settings("tiny", "cpu", arms=["dense", "gated", "exact", "half"], alone=True)
    gc.disable()
    try:
        bench = steps.Bench(args, Sample(8, 6, 20))
        bench.run()
    finally:
        gc.enable()
    assert (alive, bench.refused) == ([0] * 4, {})


@pytest.mark.parametrize("refused", [["dense"], DENSE])
def test_arms_that_are_refused_take_nothing_from_the_others(refused: Sequence[str], tmp_path: Path) -> None:
    """A dense step that runs out of memory, or each of them."""
    timed = [arm for arm in (*DENSE, "AdamW alone", "regate full", "regate sparse") if arm not in refused]
    measured = {arm: steps.Measured(1.0, 2**20, None, 1, 0.0, [1.0, 2.0]) for arm in timed}
    possible = {"full": 1.2, "sparse": 1.5, "exact": 1.2, "unpadded": 1.1}
    arms = steps.ratios(measured, "eager", 10, 20, possible)
    sparse = arms["regate sparse eager"]
    assert set(arms) == {f"{arm} eager" for arm in timed}
    assert sparse["seconds"] == 1.5
    assert "ratio_to_dense" not in sparse
    assert "efficiency" not in sparse
    over_strongest = ["1.00x over dense, logits at labels", "0.73 over the strongest"]
    assert list(steps.said(sparse)) == (over_strongest if len(refused) == 1 else [])
    found = {"tokens": [96, 60, 100], "rows": 2, "possible": possible, "arms": arms}
    result = {"settings": {"model": "tiny"}, "workloads": {WORKLOAD: found}}
    assert "| - | - (-) | - | - |" in tables.table(result, "eager").replace("**", "")
    assert WORKLOAD in tables.strongest(result, "eager")
    assert "| - | - |" in tables.predictions(result, "eager")
    tables.draw(result, "eager", tmp_path / "steps.png")
    file = {"checks": {"a": {"status": "passed", "steps": result, "seconds": 1.0}}, "left_out": []}
    result["settings"] = vars(speed.settings("tiny", "cpu"))
    assert "steps-gpu-tiny-full-eager" in dict(report.as_files("gpu-steps", file))


def test_some_arms_alone(tmp_path: Path) -> None:
    out = tmp_path / "steps-some.json"
    command = ["--model", "tiny", "--rows", "2", "--repeats", "1", "--only", WORKLOAD, "--out", str(out)]
    steps.main([*command, "--arms", "dense", "exact"])
    found = json.loads(out.read_text())["workloads"][WORKLOAD]["arms"]
    assert set(found) == {f"{arm} eager" for arm in (*DENSE, "loss masking", "regate exact")}


def test_what_was_measured_before_is_still_read() -> None:
    for path in (tables.FOLDER / "results").glob("steps-*.json"):
        result = json.loads(path.read_text())
        for backend in result["settings"]["backends"]:
            lines = tables.strongest(result, backend).splitlines()
            assert len(lines) == len(tables.table(result, backend).splitlines()) == 2 + len(result["workloads"])


def test_unpadded_dense_arithmetic() -> None:
    """Of equal rows with a label everywhere, the padded one's; else less."""
    model = build(SIZES["tiny"], device="meta", dtype=torch.float32)
    data = {"input_ids": torch.full((2, 20), 5), "attention_mask": torch.ones(2, 20, dtype=torch.int64)}
    data["labels"] = data["input_ids"]
    arithmetic = Arithmetic.of(model)
    flops = needed(arithmetic, data, kept_labels(data["labels"], 0.5))
    head = 2 * arithmetic.head * arithmetic.per_logit  # the last position of a row predicts nothing
    assert flops["unpadded"] == pytest.approx(flops["dense"] - head)
    data["attention_mask"][1, 10:] = 0
    data["labels"] = torch.where(data["attention_mask"] == 1, 5, -100)
    flops = needed(arithmetic, data, kept_labels(data["labels"], 0.5))
    assert flops["unpadded"] == pytest.approx(arithmetic.whole(20, 19) + arithmetic.whole(10, 9))
    assert flops["exact"] == pytest.approx(arithmetic.flops(19, 19) + arithmetic.flops(9, 9))


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
