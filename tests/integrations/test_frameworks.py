"""`regate run` around the frameworks that are driven by YAML and flags, each where it is installed (docs/recipes.md).

They ask for releases of transformers that exclude each other, so each has an environment of its own, with pytest and
easy-vqa in it: `python -m pytest tests/integrations/test_frameworks.py -m matrix` there runs what it can.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.demo import captions, tiny

pytestmark = pytest.mark.matrix
ROOT = Path(__file__).parents[2]
SHORT = ["--warmup", "1", "--cycle", "4", "--full-steps", "1"]


def installed(command: str) -> Any:
    folder = Path(sys.executable).parent
    return pytest.mark.skipif(shutil.which(command, path=str(folder)) is None, reason=f"{command} is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in `model`, and the same captions as LLaMA-Factory, ms-swift and axolotl read them."""
    folder = tmp_path_factory.mktemp("tiny")
    some = captions.load()["train"][:64]
    vicuna = "USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant."
    processor = tiny.build_processor([*(" ".join(c.words) for c in some), captions.PROMPT, vicuna])
    tiny.build_model(processor, width=64, layers=2).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    layout = {"file_name": "marked.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"tiny": layout}))
    marked, parts = [], []
    for caption in some:
        answer, image = " ".join(caption.words), str(caption.image)
        user = {"role": "user", "content": f"<image>{captions.PROMPT}"}
        marked.append({"messages": [user, {"role": "assistant", "content": answer}], "images": [image]})
        asked = [{"type": "image", "path": image}, {"type": "text", "text": captions.PROMPT}]
        answered = [{"type": "text", "text": answer}]
        parts.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]})
    (folder / "marked.json").write_text(json.dumps(marked))
    (folder / "parts.jsonl").write_text("\n".join(map(json.dumps, parts)))
    return folder


def assert_gated(command: list[str], folder: Path, *settings: str, **environment: str) -> None:
    """Four steps, two of them sparse."""
    bin_ = str(Path(sys.executable).parent)
    names = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "regate.run", *SHORT, *settings, "--", *command]
    names = os.environ | names | {"DO_NOT_TRACK": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=names, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("regate: ")]
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(said) == 2
    assert "regate: gating LlavaForConditionalGeneration in " in said[0]
    assert said[1].startswith("regate: 2 full and 2 sparse steps")


@installed("llamafactory-cli")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_llama_factory(tuning: str, processes: int, folder: Path, tmp_path: Path) -> None:
    """With its own gradient checkpointing, which is on by default."""
    settings = {
        "model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "finetuning_type": tuning,
        "template": "llava", "dataset_dir": str(folder), "dataset": "tiny", "cutoff_len": 512,
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-5,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    launcher = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)} if processes > 1 else {}
    assert_gated(["llamafactory-cli", "train", str(tmp_path / "sft.yaml")], folder, **launcher)


@installed("swift")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ms_swift(tuning: str, processes: int, folder: Path, tmp_path: Path) -> None:
    options = {
        "model": folder / "model", "model_type": "llava1_5_hf", "dataset": folder / "marked.json",
        "tuner_type": tuning, "max_steps": 4, "per_device_train_batch_size": 4, "output_dir": tmp_path,
        "torch_dtype": "float32", "use_hf": "true", "report_to": "none", "use_logits_to_keep": "false",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    launcher = {"NPROC_PER_NODE": str(processes)} if processes > 1 else {}
    assert_gated(["swift", "sft", *flags], folder, "--logits", "all", **launcher)  # its accuracy reads them


@installed("axolotl")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_axolotl(tuning: str, folder: Path, tmp_path: Path) -> None:
    """`axolotl train` starts `accelerate launch` by itself."""
    settings = {
        "base_model": str(folder / "model"), "processor_type": "AutoProcessor", "skip_prepare_dataset": True,
        "remove_unused_columns": False, "sample_packing": False, "chat_template": "tokenizer_default",
        "datasets": [{"path": str(folder / "parts.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "output_dir": str(tmp_path), "sequence_len": 512, "micro_batch_size": 4, "gradient_accumulation_steps": 1,
        "max_steps": 4, "num_epochs": 1, "optimizer": "adamw_torch", "lr_scheduler": "cosine", "learning_rate": 1e-5,
        "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": True, "attn_implementation": "sdpa",
    }  # fmt: skip
    if tuning == "lora":
        layers = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
        settings |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": layers}
        # axolotl's fused LoRA kernels look for a class that transformers' LLaVA has not
        settings |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    assert_gated(["axolotl", "train", str(tmp_path / "sft.yaml")], folder)
