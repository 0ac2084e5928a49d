"""Train a multimodal model three times from the same weights: dense, with ReGATE, and with a random gate.

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

if not __package__:  # run as a script: find the repository's packages
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import regate
from examples.conversations import Conversations, collate, encode, read
from examples.demo import captions, tiny
from examples.demo.report import draw, table

ARMS = {"dense": None, "regate": "score", "random": "random"}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or local path; default: the small LLaVA")
    parser.add_argument("--data", help="JSON or JSON-lines of conversations; default: easy-VQA captions")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--base-steps", type=int, default=120, help="text-only steps of the small model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, help="default: 1e-3 for the small LLaVA, 1e-5 with --model")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--cycle", type=int, default=32)
    parser.add_argument("--full-steps", type=int, default=4)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--eval-samples", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats of the step timing")
    parser.add_argument("--backend", help="eager or inductor; default: inductor on CUDA, eager elsewhere")
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", default=[0], help="one whole run for each")
    args = parser.parse_args(argv)
    args.lr = args.lr or (1e-5 if args.model else 1e-3)
    return args


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
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"full": [], "sparse": []})


def load_task(args: argparse.Namespace, seed: int) -> Task:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told: list[list[captions.Caption] | None]
    if args.data:
        records = read(args.data)
        n = max(1, min(args.eval_samples, len(records) // 10))
        parts, told = [records[2 * n :], records[:n], records[n : 2 * n]], [None, None]
    else:
        data = captions.load()
        told = [data["validation"][:200], data["test"][: args.eval_samples]]
        parts = [[c.record() for c in some] for some in (data["train"], *told)]
    told = [None, None] if args.model else told
    if args.model:
        processor = transformers.AutoProcessor.from_pretrained(args.model)
        model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
    else:
        contents = [m["content"] for record in parts[0] for m in record["messages"]]
        processor = tiny.build_processor(p["text"] for c in contents for p in c if p["type"] == "text")
        model = tiny.build_model(processor, seed=seed)
    train, validation, test = (Conversations(part, processor) for part in parts)
    return Task(model.to(device), processor, train, HeldOut(validation, told[0]), HeldOut(test, told[1]), device)


def loader(task: Task, dataset: Conversations, batch_size: int, *, seed: int | None = None) -> DataLoader[Any]:
    join = partial(collate, pad_id=task.processor.tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return DataLoader(dataset, batch_size, shuffle=seed is not None, generator=generator, collate_fn=join)


def endless(batches: DataLoader[Any], device: torch.device) -> Iterator[dict[str, Any]]:
    while True:
        for batch in batches:
            yield {name: x.to(device) for name, x in batch.items()}


def train_base(task: Task, args: argparse.Namespace, seed: int) -> None:
    """Text only: make the small model's language model know the captions' language, but no picture."""
    texts = Conversations([without_images(record) for record in task.train.records], task.processor)
    batches = endless(loader(task, texts, args.batch_size, seed=seed), task.device)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=args.lr)
    task.model.train()
    for _ in tqdm(range(args.base_steps), desc="base language model", unit="step"):
        task.model(**next(batches), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def without_images(record: dict[str, Any]) -> dict[str, Any]:
    messages = [{**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in record["messages"]]
    return {"messages": messages, "images": []}


def train_arm(name: str, task: Task, args: argparse.Namespace, seed: int) -> Arm:
    """One arm from the task's initial weights, with the same batches as the others."""
    model, arm = copy.deepcopy(task.model).train(), Arm()
    gate = None
    if ARMS[name] is not None:
        gate = regate.apply(model, config(args, selection=ARMS[name], seed=seed), backend=args.backend)
        if name == "regate":
            gate.precompute(loader(task, task.train, args.batch_size))
    batches = endless(loader(task, task.train, args.batch_size, seed=seed + 1), task.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    answer_tokens, positions = 0, 0
    bar = tqdm(range(args.steps), desc=f"{name:6}", unit="step")
    for step in bar:
        batch = next(batches)
        loss, seconds = timed_step(model, optimizer, batch)
        kind = "full" if gate is None or gate.last.full else "sparse"
        arm.seconds[kind].append(seconds)
        answer_tokens += int((batch["labels"][:, 1:] != -100).sum() if gate is None else gate.last.kept.sum())
        positions += int(batch["attention_mask"].sum() if gate is None else gate.last.active.sum())
        bar.set_postfix_str(f"{kind:6} loss {loss:.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            scores = evaluate(model, task, task.validation)
            arm.curve.append({"step": step + 1, "answer_tokens": answer_tokens, **scores})
    if gate is not None:
        arm.report = dict(gate.report())
        print(gate.report())
        arm.samples = coloured(gate, task)
        regate.remove(model)
    arm.final = evaluate(model, task, task.test) | {
        "exact_match": exact_match(model, task, samples=100),
        "answer_tokens": answer_tokens,
        "positions": positions,
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
    settings = {"warmup": args.warmup, "cycle": args.cycle, "full_steps": args.full_steps, "keep": args.keep}
    return regate.Config(**(settings | changes))


@torch.no_grad()
def evaluate(model: Any, task: Task, held_out: HeldOut) -> dict[str, float]:
    """Teacher-forced: loss, accuracy on grounded and on template words."""
    model.eval()
    hits: dict[bool, list[bool]] = {True: [], False: []}
    loss, count = 0.0, 0
    told = iter(held_out.told or ())
    for batch in loader(task, held_out.samples, 100):
        batch = {name: x.to(task.device) for name, x in batch.items()}
        logits = model(**batch).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        supervised = labels != -100
        losses = torch.nn.functional.cross_entropy(logits[supervised], labels[supervised], reduction="none")
        loss += float(losses.sum())
        count += int(supervised.sum())
        right = (logits.argmax(-1) == labels).cpu()
        for row, mask in zip(right, supervised.cpu(), strict=True):
            answer = row[mask].tolist()
            caption = next(told, None)
            grounded = [*caption.grounded, False] if caption else [False] * len(answer)  # False: the end token
            for hit, kind in zip(answer, grounded, strict=True):
                hits[kind].append(hit)
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
        length = full["input_ids"].shape
        first = int((full["labels"][0] != -100).nonzero()[0])
        inputs = {k: v.to(task.device) for k, v in full.items() if k != "labels"}
        inputs = {k: v[:, :first] if v.shape == length else v for k, v in inputs.items()}
        target = full["labels"][0, first:].to(task.device)
        output = model.generate(**inputs, max_new_tokens=len(target), do_sample=False)[0, first:]
        right += bool(len(output) == len(target) and torch.equal(output, target))
    model.train()
    return right / len(records)


def coloured(gate: regate.Gate, task: Task, rows: int = 4) -> list[dict[str, Any]]:
    """The first training samples: image, words of the answer, and which a sparse step would keep now."""
    samples = []
    for i in range(min(rows, len(task.train))):
        batch = {name: x.to(task.device) for name, x in task.train[i].items()}
        at = (batch["labels"][0] != -100).nonzero()[:, 0]
        words = [task.processor.tokenizer.decode([token]).strip() for token in batch["labels"][0, at].tolist()]
        images = task.train.records[i]["images"]
        image = images[0] if images else Image.new("RGB", (1, 1), "white")
        kept = gate.choose(batch, full=False)[0, at].tolist()
        samples.append({"image": image, "words": words, "kept": kept})
    return samples


def time_steps(task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a dense, a full and a sparse step on the same batch, measured in turns; medians.

    The dense step is the untouched model. Full and sparse steps run the same rewritten decoder with the same
    backend, so full / sparse is the gain of elision alone, dense / sparse also holds what the backend gains.
    """
    batch = next(endless(loader(task, task.train, args.batch_size, seed=0), task.device))
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
    torch.manual_seed(seed)
    task = load_task(args, seed)
    print(f"seed {seed}: {len(task.train):,} training and {len(task.test.samples):,} test samples, "
          f"{args.steps} steps of {args.batch_size}")  # fmt: skip
    if not args.model:
        train_base(task, args, seed)
    for i in tqdm(range(len(task.train)), desc="reading images", unit="sample"):
        task.train[i]  # encoded once, so that no arm pays for it
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
