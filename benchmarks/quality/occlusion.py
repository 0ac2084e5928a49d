"""Which visual tokens do answers need? A share of them is hidden from a trained model, chosen in three ways.

    python -m benchmarks.quality.occlusion [--task photos] [--samples 200] [--starts runs/quality/starts]

The models are those that a task's runs start from, which were taught to use what they see; nothing is trained here.
What is hidden is no key for any other position, in any layer. Kept are those that `Config.visual_keep` keeps
("likeness"), as many at "random", or those with the largest gradient of the answer's own loss, which an answer gives
away ("gradient").
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers

from benchmarks import machine
from benchmarks.quality.elision import Gradients, at_random, worthiest
from benchmarks.quality.evaluate import evaluate
from benchmarks.quality.markdown import percent, table
from benchmarks.quality.start import started
from benchmarks.quality.tasks import Batch, Samples
from benchmarks.quality.tasks.registry import TASKS
from model_adapters import find_adapter
from regate.scoring.visual import thinned

KEEPS = (0.5, 0.25, 0.1)
RULES = ("likeness", "random", "gradient")


def measure(model: Any, samples: Samples, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy on grounded words with all visual tokens, and with shares of them by each rule.

    "gradient" of a rule is the share of the gradient's norm at visual tokens that lies at those that stay.
    """
    found: dict[str, Any] = {"all": {"grounded": evaluate(model, samples)["grounded"], "gradient": 1.0}}
    for rule in RULES:
        for keep in KEEPS:
            found[f"{rule} {keep:g}"] = _by(rule, keep, model, samples, seed)
    return found


def _by(rule: str, keep: float, model: Any, samples: Samples, seed: int) -> dict[str, float]:
    adapter, draw = find_adapter(model), at_random(seed)
    shares: list[float] = []

    def hidden(batch: Batch) -> Batch:
        visual = adapter.layout(model, batch).visual
        with torch.enable_grad():
            seen = Gradients().look(model, batch)
        if rule == "likeness":
            stay = thinned(seen.embeddings, visual, keep)
        else:
            stay = worthiest(seen.norms if rule == "gradient" else draw(seen.embeddings, visual), visual, keep)
        shares.append(float((seen.norms * stay).sum() / (seen.norms * visual).sum()))
        return batch | {"attention_mask": batch["attention_mask"] * (stay | ~visual)}

    return {"grounded": evaluate(model, samples, change=hidden)["grounded"], "gradient": mean(shares)}


def section(found: dict[str, Any]) -> str:
    """Of the page; means over the models."""
    told = (
        f"Hidden from {len(found['models'])} models that see ({found['task']}, the weights that seeds start from; "
        f"{found['samples']} validation samples each; `python -m benchmarks.quality.occlusion`): accuracy on grounded "
        "words where only a share of the visual tokens is there, and the share of the loss gradient's norm that lies "
        "at them. By *likeness* those stay that `visual_keep` keeps, at *random* as many, by *gradient* those with the "
        "largest norm, which only the answer itself tells."
    )
    rows = [["visual tokens", *RULES]]
    for share in (1.0, *KEEPS):
        cells = []
        for rule in RULES:
            some = [model["all" if share == 1 else f"{rule} {share:g}"] for model in found["models"]]
            grounded, gradient = (mean(x[name] for x in some) for name in ("grounded", "gradient"))
            cells.append(f"{percent(grounded)} ({gradient:.2f})")
        rows.append([f"{share:.0%}", *cells])
    return f"## Which visual tokens answers need\n\n{textwrap.fill(told, 120)}\n\n{table(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="photos")
    parser.add_argument("--starts", type=Path, default=Path("runs/quality/starts"))
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/occlusion.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    task = TASKS[args.task]()
    some = task.validation.first(args.samples)
    models = [measure(started(task, seed, args.starts), some, seed=seed) for seed in range(args.models)]
    made = machine.described("benchmarks.quality.occlusion", "torch", "transformers")
    machine.write(made | {"task": task.name, "samples": len(some), "models": models}, args.out)
    print(json.dumps(models, indent=1))


if __name__ == "__main__":
    main()
