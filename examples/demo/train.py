"""Train a multimodal model from the same weights dense, with ReGATE in exact mode, with ReGATE, and with a random gate.

    python -m examples.demo.train        # a small LLaVA on easy-VQA captions; minutes on 2 CPU cores
    python -m examples.demo.train --model PATH_OR_ID --data conversations.json

Prints a table, writes results.json and demo.png. `python examples/demo/train.py` is the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

if not __package__:  # run as a script: find the repository's packages
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import regate
from examples.demo.measures import coloured, evaluate, exact_match
from examples.demo.report import draw, table
from examples.demo.task import Task, endless, load_task, loader, pretrain

# Of each arm, what it changes of the settings; None trains the untouched model.
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None, "exact": {"keep": 1.0}, "regate": {}, "random": {"selection": "random"},
}  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or local path; default: the small LLaVA")
    parser.add_argument("--data", help="JSON or JSON-lines of conversations; default: easy-VQA captions")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--text-steps", type=int, default=120, help="of the small model's language model, before")
    parser.add_argument("--vision-steps", type=int, default=500, help="of the small model's encoder, before")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="falls to 0; default: 1e-3 for the small LLaVA, 1e-5 with --model")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--cycle", type=int, default=32)
    parser.add_argument("--full-steps", type=int, default=4)
    parser.add_argument("--eval-every", type=int, default=80)
    parser.add_argument("--eval-samples", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats of the step timing")
    parser.add_argument("--backend", help="eager or inductor; default: inductor on CUDA, eager elsewhere")
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", default=[0], help="one whole run for each")
    args = parser.parse_args(argv)
    args.lr = args.lr or (1e-5 if args.model else 1e-3)
    return args


@dataclass
class Arm:
    """One training run."""

    curve: list[dict[str, float]] = field(default_factory=list)
    report: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"full": [], "sparse": []})


def train_arm(name: str, task: Task, args: argparse.Namespace, seed: int) -> Arm:
    """One arm from the task's initial weights, with the same batches as the others."""
    model, arm, spent = copy.deepcopy(task.model).train(), Arm(), 0.0
    changes, gate = ARMS[name], None
    if changes is not None:
        gate = regate.apply(model, config(args, seed=seed, **changes), backend=args.backend)
        if name == "regate":
            start = time.perf_counter()
            gate.precompute(loader(task, task.train.samples, args.batch_size))
            spent = time.perf_counter() - start
    batches = endless(loader(task, task.train.samples, args.batch_size, seed=seed + 1), task.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    answer_tokens, positions = 0, 0
    bar = tqdm(range(args.steps), desc=f"{name:6}", unit="step")
    for step in bar:
        batch = next(batches)
        loss, seconds = timed_step(model, optimizer, batch)
        rate.step()
        spent += seconds
        kind = "full" if gate is None or gate.last.full else "sparse"
        arm.seconds[kind].append(seconds)
        answer_tokens += int((batch["labels"][:, 1:] != -100).sum() if gate is None else gate.last.kept.sum())
        positions += int(batch["attention_mask"].sum()) if gate is None else sum(gate.last.computed)
        bar.set_postfix_str(f"{kind:6} loss {loss:.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            scores = evaluate(model, task, task.validation)
            arm.curve.append({"step": step + 1, "answer_tokens": answer_tokens, "seconds": spent, **scores})
    if gate is not None:
        arm.report = dict(gate.report())
        print(gate.report())
        arm.samples = coloured(gate, task)
        regate.remove(model)
    arm.final = evaluate(model, task, task.test) | {
        "exact_match": exact_match(model, task, samples=100),
        "answer_tokens": answer_tokens,
        "positions": positions,
        "seconds": spent,
        "train_loss": loss,
    }
    return arm


def timed_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> tuple[float, float]:
    """(loss, seconds) of forward, backward and update; loading the batch is not counted."""
    start = time.perf_counter()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = float(loss.detach())
    if loss.is_cuda:
        torch.cuda.synchronize()
    return value, time.perf_counter() - start


def config(args: argparse.Namespace, **changes: Any) -> regate.Config:
    settings = {"warmup": args.warmup, "cycle": args.cycle, "full_steps": args.full_steps, "keep": args.keep,
                "total_steps": args.steps}  # fmt: skip
    return regate.Config(**(settings | changes))


def time_steps(task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a dense, a full and a sparse step on the same batch, measured in turns; medians.

    The dense step is the untouched model. Full and sparse steps run the same rewritten decoder with the same
    backend, so full / sparse is the gain of elision alone, dense / sparse also holds what the backend gains.
    """
    batch = next(endless(loader(task, task.train.samples, args.batch_size, seed=0), task.device))
    runs = {}
    for kind in ("dense", "full", "sparse"):
        model = copy.deepcopy(task.model).train()
        gate = None
        if kind != "dense":
            always = {"warmup": 0, "cycle": 1, "full_steps": int(kind == "full")}
            gate = regate.apply(model, config(args, **always), backend=args.backend)
            gate.precompute([batch], progress=False)
        runs[kind] = (model, torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True), gate)
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for repeat in tqdm(range(args.repeats + 2), desc="step timing", unit="round"):
        for kind, (model, optimizer, _) in runs.items():
            _, took = timed_step(model, optimizer, batch)
            if repeat >= 2:  # the first rounds compile and warm up
                seconds[kind].append(took)
    possible = runs["sparse"][2].report()["speedup_possible"]
    for model, _, gate in runs.values():
        if gate is not None:
            regate.remove(model)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return median | {
        "ratio_measured": median["dense"] / median["sparse"],
        "ratio_elision": median["full"] / median["sparse"],
        "ratio_possible": possible,
    }


def run(args: argparse.Namespace, seed: int) -> tuple[Task, dict[str, Any]]:
    """All arms for one seed. Weights, data order and random choices follow it; the data split does not."""
    task = load_task(args, seed)
    print(f"seed {seed}: {len(task.train.samples):,} training and {len(task.test.samples):,} test samples, "
          f"{args.steps} steps of {args.batch_size}")  # fmt: skip
    for i in tqdm(range(len(task.train.samples)), desc="reading images", unit="sample"):
        task.train.samples[i]  # encoded once, so that no arm pays for it
    if not args.model:
        print("the small model's parts are pretrained")
        pretrain(task, args, seed)
    torch.manual_seed(seed)
    base = evaluate(task.model, task, task.test)
    arms = {name: vars(train_arm(name, task, args, seed)) for name in args.arms}
    return task, {"seed": seed, "base": base, "arms": arms}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    transformers.logging.set_verbosity_error()
    words = sys.argv[1:] if argv is None else argv
    data = args.data or "easy-VQA drawings; the captions are ours, from its questions and pixels by templates"
    print(f"data: {data}")
    runs = []
    for seed in args.seeds:
        task, result = run(args, seed)
        runs.append(result)
    cpu = f"CPU, {torch.get_num_threads()} threads"
    results = {
        "command": " ".join(["python -m examples.demo.train", *words]),
        "data": data,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "regate": regate.__version__},
        "device": torch.cuda.get_device_name() if task.device.type == "cuda" else cpu,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "step_timing": time_steps(task, args),
        "runs": runs,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, args.out / "demo.png")
    (args.out / "results.json").write_text(json.dumps(plain(results), indent=1, allow_nan=False))
    print(table(results))
    print(f"\nwritten: {args.out / 'results.json'}, {args.out / 'demo.png'}")
    return results


def plain(value: Any) -> Any:
    """For JSON: without pictures, and null where there is no number."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "image"}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
