"""Train a multimodal model three times from the same weights: dense, with ReGATE, and with a random gate.

    python -m examples.demo.train                        # a small LLaVA on easy-VQA captions, minutes on 2 CPU cores
    python -m examples.demo.train --model PATH_OR_ID --data conversations.json

Prints a table, writes results.json and demo.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import regate
from examples.conversations import Conversations, collate, encode, read
from examples.demo import captions, tiny
from examples.demo.report import draw, table

ARMS = {"dense": None, "regate": "score", "random": "random"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a Hugging Face id or local path; default: the small LLaVA")
    parser.add_argument(
        "--data", help="JSON or JSON-lines of images and conversations; default: easy-VQA captions"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--base-steps", type=int, default=120, help="text-only steps that make the small base LM"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--cycle", type=int, default=32)
    parser.add_argument("--full-steps", type=int, default=4)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--eval-samples", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats of the step timing")
    parser.add_argument("--backend", help="eager or inductor; default: inductor on CUDA, eager elsewhere")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@dataclass
class Task:
    """Model and data."""

    model: Any
    processor: Any
    train: Conversations
    validation: HeldOut
    test: HeldOut
    device: torch.device


@dataclass
class HeldOut:
    """Samples never trained on; `told` are their captions where the demo made them."""

    samples: Conversations
    told: list[captions.Caption] | None


@dataclass
class Arm:
    """One training run."""

    curve: list[dict[str, float]] = field(default_factory=list)
    report: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def load_task(args: argparse.Namespace) -> Task:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told: list[list[captions.Caption] | None]
    if args.data:
        records = read(args.data)
        n = max(1, min(args.eval_samples, len(records) // 10))
        parts, told = [records[2 * n :], records[:n], records[n : 2 * n]], [None, None]
    else:
        data = captions.load(seed=args.seed)
        told = [data["validation"][:200], data["test"][: args.eval_samples]]
        parts = [[c.record() for c in some] for some in (data["train"], *told)]
    told = [None, None] if args.model else told
    if args.model:
        processor = transformers.AutoProcessor.from_pretrained(args.model)
        model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
    else:
        texts = [
            p["text"] for r in parts[0] for m in r["messages"] for p in m["content"] if p["type"] == "text"
        ]
        processor = tiny.build_processor(texts)
        model = tiny.build_model(processor, seed=args.seed)
    train, validation, test = (Conversations(part, processor) for part in parts)
    return Task(
        model.to(device), processor, train, HeldOut(validation, told[0]), HeldOut(test, told[1]), device
    )


def loader(
    task: Task, dataset: Conversations, batch_size: int, *, seed: int | None = None
) -> DataLoader[Any]:
    pad = task.processor.tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return DataLoader(
        dataset,
        batch_size,
        shuffle=seed is not None,
        generator=generator,
        collate_fn=partial(collate, pad_id=pad),
    )


def endless(batches: DataLoader[Any], device: torch.device) -> Iterator[dict[str, Any]]:
    while True:
        for batch in batches:
            yield {name: x.to(device) for name, x in batch.items()}


def train_base(task: Task, args: argparse.Namespace) -> None:
    """Text only: make the small model's language model know the captions' language, but no picture."""
    strip = [
        {"messages": [{**m, "content": [p for p in m["content"] if p["type"] == "text"]} for m in r["messages"]],
         "images": []}
        for r in task.train.records
    ]  # fmt: skip
    batches = endless(
        loader(task, Conversations(strip, task.processor), args.batch_size, seed=args.seed), task.device
    )
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=args.lr)
    task.model.train()
    for _ in tqdm(range(args.base_steps), desc="base language model", unit="step"):
        task.model(**next(batches), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_arm(name: str, task: Task, args: argparse.Namespace) -> Arm:
    """One arm from the task's initial weights, with the same batches as the others."""
    model, arm = copy.deepcopy(task.model).train(), Arm()
    gate = None
    if ARMS[name] is not None:
        gate = regate.apply(model, config(args, selection=ARMS[name]), backend=args.backend)
        if name == "regate":
            gate.precompute(loader(task, task.train, args.batch_size))
    batches = endless(loader(task, task.train, args.batch_size, seed=args.seed + 1), task.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    answer_tokens, positions = 0, 0
    start, evaluating = time.perf_counter(), 0.0
    bar = tqdm(range(args.steps), desc=f"{name:6}", unit="step")
    for step in bar:
        batch = next(batches)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        answer_tokens += int((batch["labels"][:, 1:] != -100).sum() if gate is None else gate.last.kept.sum())
        positions += int(batch["attention_mask"].sum() if gate is None else gate.last.active.sum())
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            before = time.perf_counter()
            scores = evaluate(model, task, task.validation)
            arm.curve.append({"step": step + 1, "answer_tokens": answer_tokens, **scores})
            evaluating += time.perf_counter() - before
    arm.seconds = time.perf_counter() - start - evaluating
    if gate is not None:
        arm.report = dict(gate.report())
        print(gate.report())
        arm.samples = coloured(gate, batch, task)
        regate.remove(model)
    arm.final = evaluate(model, task, task.test) | {
        "exact_match": exact_match(model, task, samples=100),
        "answer_tokens": answer_tokens,
        "positions": positions,
        "train_loss": float(loss.detach()),
    }
    return arm


def config(args: argparse.Namespace, **changes: Any) -> regate.Config:
    settings = {"warmup": args.warmup, "cycle": args.cycle, "full_steps": args.full_steps, "keep": args.keep}
    return regate.Config(**(settings | changes))


@torch.no_grad()
def evaluate(model: Any, task: Task, held_out: HeldOut) -> dict[str, float]:
    """Teacher-forced: loss, accuracy on grounded and on template words."""
    model.eval()
    hits: dict[bool, list[bool]] = {True: [], False: []}
    loss, count, at = 0.0, 0, 0
    for batch in loader(task, held_out.samples, 100):
        batch = {name: x.to(task.device) for name, x in batch.items()}
        logits = model(**batch).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        supervised = labels != -100
        loss += float(
            torch.nn.functional.cross_entropy(logits[supervised], labels[supervised], reduction="sum")
        )
        count += int(supervised.sum())
        right = (logits.argmax(-1) == labels).cpu()
        for row, mask in zip(right, supervised.cpu(), strict=True):
            words = held_out.told[at].grounded if held_out.told else ()
            at += 1
            for hit, grounded in zip(
                row[mask].tolist(), [*words, False] if words else [], strict=bool(words)
            ):
                hits[grounded].append(hit)
            if not words:
                hits[False] += row[mask].tolist()
    model.train()
    mean = {kind: sum(values) / len(values) if values else float("nan") for kind, values in hits.items()}
    return {"loss": loss / count, "grounded_accuracy": mean[True], "template_accuracy": mean[False]}


@torch.no_grad()
def exact_match(model: Any, task: Task, samples: int) -> float:
    """Share of free-running captions that equal the reference word for word."""
    model.eval()
    right = 0
    records = task.test.samples.records[:samples]
    for record in records:
        full = encode(record, task.processor)
        prompt = full["labels"][0] != -100
        first = int(prompt.nonzero()[0])
        inputs = {k: v.to(task.device) for k, v in full.items() if k != "labels"}
        inputs |= {k: inputs[k][:, :first] for k in ("input_ids", "attention_mask")}
        target = full["labels"][0, first:].to(task.device)
        output = model.generate(**inputs, max_new_tokens=len(target), do_sample=False)[0, first:]
        right += bool(len(output) == len(target) and torch.equal(output, target))
    model.train()
    return right / len(records)


def coloured(gate: regate.Gate, batch: dict[str, Any], task: Task, rows: int = 4) -> list[dict[str, Any]]:
    """Words of a few answers with what the last sparse decision made of each."""
    config = gate.config
    kept = gate.choose(batch, full=False)
    samples = []
    for row in range(min(rows, len(kept))):
        labels = batch["labels"][row]
        at = (labels != -100).nonzero()[:, 0]
        words = task.processor.tokenizer.convert_ids_to_tokens(labels[at].tolist())
        pixels = batch["pixel_values"][row].float().cpu()
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
        samples.append({"words": words, "kept": kept[row, at].tolist(), "image": pixels.permute(1, 2, 0).tolist(),
                        "keep": config.keep})  # fmt: skip
    return samples


def time_steps(task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a dense, a full and a sparse step on the same batch, measured in turns; medians."""
    batch = next(endless(loader(task, task.train, args.batch_size, seed=args.seed + 2), task.device))
    runs = {}
    for kind in ("dense", "full", "sparse"):
        model = copy.deepcopy(task.model).train()
        gate = None
        if kind != "dense":
            always = {"warmup": 0, "cycle": 1, "full_steps": int(kind == "full")}
            gate = regate.apply(model, config(args, **always), backend=args.backend)
            gate.precompute([batch], progress=False)
        runs[kind] = (model, torch.optim.AdamW(model.parameters(), lr=args.lr), gate)
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for repeat in tqdm(range(args.repeats + 2), desc="step timing", unit="round"):
        for kind, (model, optimizer, _) in runs.items():
            start = time.perf_counter()
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if task.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[kind].append(time.perf_counter() - start)
    possible = runs["sparse"][2].report()["speedup_possible"]
    for model, _, gate in runs.values():
        if gate is not None:
            regate.remove(model)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return median | {"ratio_measured": median["dense"] / median["sparse"], "ratio_possible": possible}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    task = load_task(args)
    print(f"{len(task.train):,} training and {len(task.test.samples):,} test samples, {args.steps} steps of "
          f"{args.batch_size}")  # fmt: skip
    if not args.model:
        print("The images are drawings (easy-VQA); the captions are ours.")
        train_base(task, args)
    base = evaluate(task.model, task, task.test)
    arms = {name: train_arm(name, task, args) for name in args.arms}
    results = {
        "command": " ".join(["python -m examples.demo.train", *(argv if argv is not None else sys.argv[1:])]),
        "data": args.data or "easy-VQA drawings; captions generated from its questions and pixels by our templates",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "regate": regate.__version__},
        "device": torch.cuda.get_device_name() if task.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "base": base,
        "steps_seconds": time_steps(task, args),
        "arms": {name: vars(arm) for name, arm in arms.items()},
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, args.out / "demo.png")
    for arm in results["arms"].values():
        arm["samples"] = [{k: v for k, v in s.items() if k != "image"} for s in arm["samples"]]
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    print(f"\nwritten: {args.out / 'results.json'}, {args.out / 'demo.png'}")
    return results


if __name__ == "__main__":
    main()
