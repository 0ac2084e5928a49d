"""The parts that wait for a GPU run on a CPU at tiny size; what a part does with checks that fail, hang or crash."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.gpu.__main__ as gpu
from benchmarks import tables
from benchmarks.gpu import learning, part, report, speed, wheels
from benchmarks.gpu.numbers import Learned, held
from benchmarks.gpu.part import Check, SkippedError
from benchmarks.quality.arms import ARMS
from benchmarks.quality.tasks.registry import TASKS
from regate.insight.estimate import Sample


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ARMS", speed.FEW)
    for name in speed.SAMPLES:
        monkeypatch.setitem(speed.SAMPLES, name, (name, Sample(8, 6, 20)))


def _run(name: str, out: Path, *only: str) -> dict[str, Any]:
    """A part in this process, with all the time it wants."""
    command = [name, "--size", "tiny", "--device", "cpu", "--out", str(out), "--started", str(time.time())]
    assert gpu.main([*command, "--minutes", "60", *(["--only", *only] if only else [])]) == 0
    result: dict[str, Any] = json.loads((out / f"gpu-{name}.json").read_text())
    wrong = {n: check for n, check in result["checks"].items() if check["status"] == "failed"}
    assert not wrong, wrong
    assert not result["left_out"]
    assert "running" not in result
    return result


QUICK = {
    "correctness": [
        "rows filled up", "bf16, FSDP2", "fp32, visible", "exact step, fp32", "strongest", "Trainer, sparse", "flash 2",
    ],
    "steps": ["steps tiny, full, eager, 96"],
    "compilation": ["no check"],  # they all compile
    "learning": ["no check"],  # they all start processes
}  # fmt: skip


@pytest.mark.parametrize("name", gpu.PARTS)
def test_parts(name: str, tmp_path: Path) -> None:
    result = _run(name, tmp_path, *QUICK[name])
    assert (result["torch"], result["settings"]["part"]) == (torch.__version__, name)
    assert f"checks-gpu-{name}" in tables.write_all(tmp_path)
    if name == "steps":
        text = (tmp_path / "tables.md").read_text()
        assert "<!-- strongest steps-gpu-tiny-full-eager eager -->" in text
    if name == "correctness":
        assert result["checks"]["sparse step, bf16, flash 2"]["status"] == "skipped"
        assert "off by" in (tmp_path / "tables.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.PARTS)
def test_whole_parts(name: str, tmp_path: Path) -> None:
    result = _run(name, tmp_path)
    text = tables.write_all(tmp_path)
    assert f"checks-gpu-{name}" in text
    if name == "steps":
        assert "<!-- peak-gpu-tiny -->" in text
    if name == "compilation":
        assert "starts-gpu-compilation" in text
        cold, warm = (result["checks"][f"{start} start, regate, tiny"]["compilation"] for start in ("cold", "warm"))
        assert warm < cold


def test_what_is_learnt_exists() -> None:
    for task, lists in learning.ARMS.items():
        assert task in TASKS
        assert lists[0][0] == "dense", "the others are compared with it"
        assert {arm for arms in lists for arm in arms} <= set(ARMS)


def test_roofline_shares_are_shown() -> None:
    arms: dict[str, Any] = {"dense eager": {"seconds": 1.0}}
    found = {"settings": vars(speed.settings("tiny", "cpu")), "workloads": {"96/60/400": {"arms": arms}}}
    assert tables.roofline(found, "eager") == ""  # nobody knows this device
    arms["dense eager"]["roofline_share"] = 0.4
    assert "| 96/60/400 | 40% |" in tables.roofline(found, "eager")
    file = {"checks": {"a": {"status": "passed", "steps": found, "seconds": 1.0}}, "left_out": ["b"]}
    assert [stem for stem, _ in report.as_files("gpu-steps", file)] == ["checks-gpu-steps"]  # nothing is gated
    assert "| b | left out, no time | | |" in report.checks(file)


def _fails() -> dict[str, Any]:
    raise ValueError("wrong")


def _skips() -> dict[str, Any]:
    raise SkippedError("not installed")


def test_a_failing_check_is_recorded_and_others_go_on(tmp_path: Path) -> None:
    ran: list[str] = []

    def passes() -> dict[str, Any]:
        ran.append("passes")
        return {"number": 1}

    checks = [Check("fails", _fails), Check("skips", _skips), Check("passes", passes), Check("long", passes, 1e6)]
    path, now = tmp_path / "gpu-x.json", time.time()
    result = part.run(checks, path, {"size": "a"}, started=now)
    assert {n: c["status"] for n, c in result["checks"].items()} == {
        "fails": "failed", "skips": "skipped", "passes": "passed",
    }  # fmt: skip
    assert result["checks"]["fails"]["error"] == "ValueError: wrong"
    assert result["checks"]["passes"]["number"] == 1
    assert result["left_out"] == ["long"]
    assert result == json.loads(path.read_text())
    part.run(checks, path, {"size": "a"}, started=now)
    assert ran == ["passes"], "what passed is not run again"
    again = part.run([Check("fails", passes)], path, {"size": "a"}, started=now + 1)
    assert again["checks"]["fails"]["status"] == "passed", "what failed is tried again by the next run"
    other = part.run([], path, {"size": "b"}, started=now)
    assert other["checks"] == {}, "with other settings nothing counts"


def _child(body: str, path: Path) -> Any:
    """A process of a part: notes which check runs, then does `body` if that is the first one."""
    code = f"""
import json, os, sys, time
path, started = sys.argv[1], float(sys.argv[2])
result = json.load(open(path)) if os.path.exists(path) else {{"checks": {{}}, "left_out": []}}
if "bad" not in result["checks"]:
    result["running"] = {{"name": "bad", "since": time.time(), "seconds": 0.2}}
    json.dump(result, open(path, "w"))
    {body}
"""
    return lambda started: [sys.executable, "-S", "-c", code, str(path), repr(started)]


@pytest.mark.parametrize(
    ("body", "error"),
    [("os.abort()", "exit status -6"), ("time.sleep(60)", "3 times as long"), ("os._exit(3)", "exit status 3")],
)
def test_a_check_that_takes_its_process_with_it(body: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu-x.json"
    assert part.watched(_child(body, path), path, every=0.02)
    (bad,) = json.loads(path.read_text())["checks"].values()
    assert bad["status"] == "failed"
    assert error in bad["error"]


def test_a_part_that_cannot_start_is_not_tried_for_ever(tmp_path: Path) -> None:
    assert not part.watched(
        lambda started: [sys.executable, "-S", "-c", "raise SystemExit(1)"], tmp_path / "x", every=0.02
    )


def test_a_device_that_answers_no_more_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "_tidied", lambda: False)
    path, now = tmp_path / "gpu-x.json", time.time()
    checks = [Check("one", _fails), Check("two", dict)]
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            part.run(checks, path, {}, started=now)
        assert stopped.value.code == part.UNUSABLE
    states = {name: check["status"] for name, check in json.loads(path.read_text())["checks"].items()}
    assert states == {"one": "failed", "two": "passed"}


def test_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["steps", "--out", str(tmp_path), "--started", "0"]) == 1
    assert "there is no CUDA device" in capsys.readouterr().err


def test_numbers_are_held() -> None:
    truth = Learned(1.0, {"w": torch.ones(4), "v": torch.ones(2)})
    plain = Learned(1.01, {"w": torch.ones(4) * 1.01, "v": torch.ones(2) * 1.01})
    right = Learned(1.02, {"w": torch.ones(4) * 0.98, "v": torch.ones(2) * 1.02})
    wrong = Learned(1.0, {"w": torch.ones(4), "v": torch.tensor([1.0, 1.1])})
    assert held(right, plain, truth)["numbers"]["error"]["gradients"] == pytest.approx(0.02, rel=1e-3)
    with pytest.raises(AssertionError, match=r"^gradients off by 0\.041, a plain implementation by 0\.01"):
        held(wrong, plain, truth)
    with pytest.raises(AssertionError, match="gradients of other parameters"):
        held(Learned(1.0, {"w": torch.ones(4)}), plain, truth)


def test_wheels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "yaml" else found(name))
    assert gpu.main(["wheels", "--python", "3.12", "--out", "there"]) == 0
    said = capsys.readouterr().out
    assert "lacks: " in said
    for name in ("pyyaml", *wheels.USUALLY_MISSING):
        assert f" {name}" in said
    assert "pip download --no-deps" in said
    assert "--python-version 3.12" in said
    assert "--find-links there/wheels" in said
