"""Every training script under examples/ runs, elides, and resumes, on a model that it makes itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import regate
from examples import common, multi_gpu, new_adapter, packed_rows, plain_loop, qlora, trainer, trl_lora

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.matrix


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(example: Any, out: Path, *options: object) -> Any:
    return example.main([*map(str, options), "--batch-size", "2", "--out", str(out)])


def assert_elided(report: regate.Report, *, full: int, sparse: int) -> None:
    assert (report["steps_full"], report["steps_sparse"]) == (full, sparse)
    left_out = report["labels_seen"] - report["labels_kept"]
    assert left_out > 0
    # those at which neither the token nor the label that it predicts is kept: how many depends on which are
    assert report["positions_seen"] - report["positions_computed"] >= left_out / 3
    assert report["speedup_possible"] > 1


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_plain_loop_resumes_where_it_was_on_a_users_model_and_data(tmp_path: Path) -> None:
    model, processor, records = common.load(common.parser(None, "").parse_args([]))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(records[:6]))
    own = ["--model", tmp_path / "model", "--data", tmp_path / "data.json", "--warmup", 2, "--full-steps", 0]
    straight = run(plain_loop, tmp_path / "straight", *own, "--steps", 4)
    run(plain_loop, tmp_path / "stopped", *own, "--steps", 3)
    resumed = run(plain_loop, tmp_path / "stopped", *own, "--steps", 4, "--resume")
    assert_elided(straight, full=2, sparse=2)
    assert_elided(resumed, full=2, sparse=2)
    one, other = (torch.load(tmp_path / x / "checkpoint.pt") for x in ("straight", "stopped"))
    assert_equal(one["model"], other["model"])
    assert resumed["labels_kept"] == straight["labels_kept"]


def test_schedule_is_the_librarys_unless_the_model_is_tiny() -> None:
    options = common.parser(None, "")
    assert common.config(options.parse_args(["--model", "x"])) == regate.Config()
    assert common.config(options.parse_args(["--model", "x", "--cycle", "32"])) == regate.Config(cycle=32)
    assert common.config(options.parse_args(["--warmup", "2"])) == regate.Config(warmup=2, cycle=4, full_steps=1)


def test_trainer_takes_the_gate_along(tmp_path: Path) -> None:
    straight, log = run(trainer, tmp_path, "--steps", 4, "--save-every", 3)
    assert_elided(straight, full=1, sparse=3)
    for name in ("regate/active_tokens", "regate/kept_labels", "regate/speedup_estimate"):
        assert sum(name in entry for entry in log) >= 4
    weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed, _ = run(trainer, tmp_path, "--steps", 4, "--save-every", 3, "--resume")
    assert_elided(resumed, full=1, sparse=3)
    assert_equal(weights, load_file(tmp_path / "checkpoint-4" / "model.safetensors"))


def test_packed_rows(tmp_path: Path) -> None:
    report = run(packed_rows, tmp_path, "--steps", 4)
    assert_elided(report, full=1, sparse=3)
    assert report["graphs"] == 1


def test_zero3_in_two_processes(tmp_path: Path) -> None:
    """The model is loaded in parts, and gives the reference losses of the training set before its first step."""
    pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = f"-m examples.trainer --batch-size 2 --steps 3 --out {tmp_path}".split()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*launch, *options, "--deepspeed", "examples/deepspeed/zero3.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 full, 2 sparse" in done.stdout


@pytest.mark.parametrize("example", [trl_lora, qlora], ids=lambda module: module.__name__)
def test_adapters_on_frozen_weights(example: Any, tmp_path: Path) -> None:
    assert_elided(run(example, tmp_path, "--steps", 3), full=1, sparse=2)
    assert "adapter_model.safetensors" in os.listdir(tmp_path)


def test_accelerate_in_one_process(tmp_path: Path) -> None:
    run(multi_gpu, tmp_path, "--steps", 3)
    assert_elided(run(multi_gpu, tmp_path, "--steps", 4, "--resume"), full=1, sparse=3)


def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(common.drawings()[:12]))
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    settings = ["--config_file", "examples/accelerate/ddp.yaml", "--num_processes", "2", "--main_process_port", "0"]
    options = f"-m examples.multi_gpu --batch-size 2 --steps 3 --data {data} --out {tmp_path}".split()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *settings, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("1 full, 2 sparse") == 1  # the first process alone speaks
    assert (tmp_path / "checkpoint" / "random_states_1.pkl").exists()  # and there was a second


def test_new_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_adapters.registry._REGISTERED", {})
    assert_elided(new_adapter.main(["--steps", "4"]), full=1, sparse=3)
