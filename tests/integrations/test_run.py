"""`regate run` below launchers and shells, and around TRL's trainer, which makes the PEFT model by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.matrix
ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "regate.run"]
SHORT = ["--warmup", "1", "--cycle", "4", "--full-steps", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes"]
ACCELERATE += ["2", "--config_file", "examples/accelerate/ddp.yaml", "--main_process_port", "0"]
EXAMPLE = ["-m", "examples.trainer_without_regate", "--steps", "4"]

TRL = """
import sys
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from examples.common import load, parser
from examples.trl_lora import dataset

model, processor, records = load(parser(None, "").parse_args([]))
SFTTrainer(
    model,
    SFTConfig(
        output_dir=sys.argv[1], max_steps=3, per_device_train_batch_size=2, max_length=None, report_to="none",
        bf16=False, gradient_checkpointing=False,
    ),
    train_dataset=dataset(records),
    processing_class=processor,
    peft_config=LoraConfig(r=4, target_modules="all-linear"),
).train()
"""


def said(command: list[str], **environment: str) -> list[str]:
    """What ReGATE said while the command ran."""
    names = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(command, cwd=ROOT, env=names, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stderr.splitlines() if line.startswith("regate: ")]


@pytest.mark.parametrize("way", ["here", "shell", "torchrun inside", "torchrun outside", "accelerate inside"])
def test_a_script_that_never_heard_of_it(way: str, tmp_path: Path) -> None:
    example = [*EXAMPLE, "--out", str(tmp_path)]
    inside = ["-m", "regate.run", *SHORT, "--", *example]
    shell = f"echo from a shell; exec {sys.executable} {' '.join(example)}"
    command = {
        "here": [*RUN, *SHORT, "--", "python", *example],
        "shell": [*RUN, *SHORT, "--", "sh", "-c", shell],
        "torchrun inside": [*TORCHRUN, *inside],
        "torchrun outside": [*RUN, *SHORT, "--", *TORCHRUN, *example],
        "accelerate inside": [*ACCELERATE, *inside],
    }[way]
    gating, trained = said(command)
    assert gating == (
        "regate: gating LlavaForConditionalGeneration in Trainer: keep 0.5, warm-up 1, "
        "then 1 of 4 samples full in each step"
    )
    assert trained.startswith("regate: 1 full and 3 sparse steps")


def test_trl_with_lora(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRL)
    gating, trained = said(
        [*RUN, "--full-steps", "1", "--", str(tmp_path / "script.py"), str(tmp_path / "out")], REGATE_WARMUP="1"
    )
    assert gating.startswith("regate: gating LlavaForConditionalGeneration in SFTTrainer: keep 0.5, warm-up 1")
    assert trained.startswith("regate: 1 full and 2 sparse steps")


def test_a_launcher_whose_processes_train_nothing() -> None:
    command = [*RUN, "--", *TORCHRUN, "-m", "examples.demo.tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "NoTrainerError" in done.stderr
