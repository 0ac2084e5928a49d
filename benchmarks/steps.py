"""Time of a training step, dense against ReGATE and its alternatives, beside what arithmetic allows.

    python -m benchmarks.steps --rows 2 --out benchmarks/results/steps-cpu.json     # twenty minutes on two CPU cores
    python -m benchmarks.steps --model qwen2.5-vl-7b --dtype bfloat16 --backends eager inductor \
        --out benchmarks/results/steps-qwen2.5-vl-7b.json                           # on a GPU, rows that fill it

Arms run in turns on the same batch, so that what else the machine does falls on all alike; ratios are medians over
turns, to the padded dense step and to the fastest dense one of the same backend (`benchmarks/opponents.py`). Where one
model fills the memory (`--alone`, the default on a GPU), arms run one after another instead. Each workload is written
when it is done, and a second run with the same settings goes on with those that are missing.
`python -m benchmarks.tables` makes the tables and the pictures.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import regate
from benchmarks import arms
from benchmarks.arithmetic import Arithmetic, needed, roofline
from benchmarks.models import SIZES, build
from benchmarks.workloads import batch, kept_labels, label, measured
from regate.insight.estimate import Sample


@dataclass
class Measured:
    """Of one arm."""

    first: float  # seconds of the first step
    saved: int  # bytes that autograd keeps
    peak: int | None  # bytes that a step adds to the device's memory at most; None on a CPU
    graphs: int  # that the gate captured in the first steps
    gate_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)


class Bench:
    """All arms on one batch."""

    def __init__(self, args: argparse.Namespace, sample: Sample) -> None:
        self.args, self.sample = args, sample
        self.rows = args.rows or rows_that_fit(args, sample)
        self.data = batch(sample, self.rows, SIZES[args.model].vocabulary, device=args.device)
        self.labelled = self.data["labels"] != -100
        self.kept = kept_labels(self.data["labels"], arms.SPARSE_AFTER_ONE.keep)
        self.measured: dict[str, Measured] = {}
        self.refused: dict[str, str] = {}

    def run(self) -> None:
        makers = [(maker, backend) for backend in self.args.backends for maker in arms.MAKERS if self.wanted(maker)]
        for together in [[m] for m in makers] if self.args.alone else [makers]:
            steps = self.made_by(together)
            gates = gates_of(steps)
            self.time(steps)
            steps.clear()
            while gates:
                gates.pop().remove()
            free_memory(self.args.device)

    def made_by(self, makers: list[tuple[arms.Maker, str]]) -> dict[str, arms.Step]:
        """Their steps, by name and backend. Nothing else holds the models, of which one alone may fill the memory."""
        steps: dict[str, arms.Step] = {}
        for maker, backend in makers:
            try:
                made = maker(model(self.args), backend)
            except Exception as error:  # one arm's, whatever it is, must not cost what the others find
                self.refused[f"{maker.__name__} {backend}"] = _why(error)
            else:
                steps |= {f"{name} {backend}": step for name, step in made.items()}
        return steps

    def wanted(self, maker: arms.Maker) -> bool:
        if self.args.arms is not None and maker.__name__ not in self.args.arms:
            return False
        if "liger" in maker.__name__:
            return self.args.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
        return maker not in (arms.thinned, arms.half, arms.quarter) or self.sample.visual > 0

    def of(self, backend: str) -> dict[str, Measured]:
        """By arms' names."""
        found = {arm.rpartition(" ")[::2]: x for arm, x in self.measured.items()}
        return {arm: x for (arm, of), x in found.items() if of == backend}

    def time(self, steps: dict[str, arms.Step]) -> None:
        for name, step in list(steps.items()):
            torch._dynamo.reset()  # arms share code, and with it Dynamo's cache
            before = graphs(step)
            try:
                first = self.seconds_of(step)
                self.seconds_of(step)
                with arms.saved_bytes() as found:
                    self.seconds_of(step)
                peak = self.peak_of(step)
            except Exception as error:
                self.refused[name] = _why(error)
                del steps[name]
                continue
            self.measured[name] = Measured(first, found["bytes"], peak, graphs(step) - before)
        for step in steps.values():
            self.seconds_of(step)  # each reset above took from the others what they had compiled
        for _ in tqdm(range(self.args.repeats), desc=label(self.sample), unit="repeat", disable=None):
            for name, step in steps.items():
                start = gate_seconds(step)
                self.measured[name].seconds.append(self.seconds_of(step))
                self.measured[name].gate_seconds += gate_seconds(step) - start

    def seconds_of(self, step: arms.Step) -> float:
        start = time.perf_counter()
        step(self.data, self.kept)
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak_of(self, step: arms.Step) -> int | None:
        if self.args.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.seconds_of(step)
        return torch.cuda.max_memory_allocated() - before


def _why(error: Exception) -> str:
    """Its own words, and whose, where they are not meant for a user."""
    meant = isinstance(error, regate.RegateError | ImportError | torch.OutOfMemoryError)
    return str(error) if meant else f"{type(error).__name__}: {error}"


def graphs(step: arms.Step) -> int:
    gate = arms.gate_of(step)
    return 0 if gate is None else int(gate.report()["graphs"])


def gates_of(steps: dict[str, arms.Step]) -> list[regate.Gate]:
    """Those that steps train under, each once."""
    return list({id(gate): gate for step in steps.values() if (gate := arms.gate_of(step)) is not None}.values())


def free_memory(device: str) -> None:
    """Let the device have what nobody holds any longer; gates and compiled models are in cycles."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def gate_seconds(step: arms.Step) -> float:
    gate = arms.gate_of(step)
    return 0.0 if gate is None else gate.counters.gate_seconds


def model(args: argparse.Namespace) -> nn.Module:
    return build(
        SIZES[args.model], device=args.device, dtype=getattr(torch, args.dtype), lora=args.lora,
        checkpointing=args.checkpointing,
    )  # fmt: skip


def rows_that_fit(args: argparse.Namespace, sample: Sample) -> int:
    """The largest power of two of rows with which a dense step does not run out of memory."""
    step = arms.dense(model(args), "eager")["dense"]
    rows = 1
    try:
        while True:
            data = batch(sample, rows, SIZES[args.model].vocabulary, device=args.device)
            step(data, data["labels"] != -100)
            rows *= 2
    except torch.OutOfMemoryError:
        if rows == 1:
            raise
    del step
    free_memory(args.device)
    return rows // 2


def measure(args: argparse.Namespace, title: str, sample: Sample) -> dict[str, Any]:
    bench = Bench(args, sample)
    bench.run()
    lone = model(args)
    flops = needed(Arithmetic.of(lone), bench.data, bench.kept)
    trained = sum(p.numel() for p in lone.parameters() if p.requires_grad)
    tokens, positions = int(bench.labelled.sum()), int(bench.data["attention_mask"].sum())
    result: dict[str, Any] = {
        "workload": title,
        "tokens": list(sample),
        "rows": bench.rows,
        "positions": positions,
        "answer_tokens": tokens,
        "flops": flops,
        "possible": {kind: flops["dense"] / n for kind, n in flops.items() if kind != "dense"},
        "refused": bench.refused,
        "arms": {},
    }
    if args.device == "cuda" and args.dtype == "bfloat16":
        gpu = torch.cuda.get_device_name()
        result["roofline_seconds"] = {kind: roofline(n, trained, gpu) for kind, n in flops.items()}
    for backend in args.backends:
        result["arms"] |= ratios(bench.of(backend), backend, tokens, positions, result["possible"])
    return result


def ratios(
    measured: dict[str, Measured], backend: str, tokens: int, positions: int, possible: dict[str, float]
) -> dict[str, Any]:
    """The figures of a backend's arms, by name and backend; what is taken over an arm that was refused is left out."""
    result = {}
    for arm, found in measured.items():
        median = statistics.median(found.seconds)
        figures = result[f"{arm} {backend}"] = {
            "seconds": median,
            "spread": [min(found.seconds), max(found.seconds)],
            "first_step_seconds": found.first,
            **gains(measured, arm),
            "saved_bytes": found.saved,
            "peak_bytes": found.peak,
            "answer_tokens_per_second": tokens / median,
            "positions_per_second": positions / median,
        }
        if arm.startswith("regate"):
            figures |= efficiencies(measured, arm, figures, possible)
            figures["gating_share"] = found.gate_seconds / sum(found.seconds)
            figures["graphs"] = found.graphs
    return result


def gains(measured: dict[str, Measured], arm: str) -> dict[str, Any]:
    """An arm's, over the padded dense step and the fastest dense one, as far as there are such."""
    result: dict[str, Any] = {}
    found = measured[arm]
    if (dense := measured.get("dense")) is not None:
        result["ratio_to_dense"] = median_of(lambda d, s: d / s, dense.seconds, found.seconds)
    medians = {arm: statistics.median(x.seconds) for arm, x in measured.items() if is_dense(arm)}
    if medians:
        strongest = min(medians, key=medians.__getitem__)
        best = measured[strongest].seconds
        result["ratio_to_strongest"] = median_of(lambda d, s: d / s, best, found.seconds)
        result["strongest"] = strongest
    return result


def efficiencies(
    measured: dict[str, Measured], arm: str, figures: dict[str, Any], possible: dict[str, float]
) -> dict[str, float]:
    """An arm's gains, which are among its `figures`, over what arithmetic allows steps of its kind."""
    result, kind, found = {}, arm.split()[1], measured[arm]
    if "ratio_to_dense" in figures:
        result["efficiency"] = figures["ratio_to_dense"] / possible[kind]
    if "ratio_to_strongest" in figures:
        over_unpadded = possible[kind] / possible["unpadded"]
        result["efficiency_to_strongest"] = figures["ratio_to_strongest"] / over_unpadded
    dense, alone = measured.get("dense"), measured.get("AdamW alone")
    if dense is not None and alone is not None:
        turns = (dense.seconds, alone.seconds, found.seconds)
        result["efficiency_without_adamw"] = median_of(lambda d, a, s: (d - a) / (s - a), *turns) / possible[kind]
    return result


def is_dense(arm: str) -> bool:
    """Does it compute every position and learn from every label?"""
    return arm.split(",")[0] in ("dense", "liger")


def median_of(function: Callable[..., float], *seconds: list[float]) -> float:
    """Of what is made of each turn."""
    return statistics.median(function(*turn) for turn in zip(*seconds, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/steps.json"))
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, help="of a batch; as many as fit, if not given (on a GPU)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 128 alone")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--backends", nargs="+", choices=["eager", "inductor"], default=["eager"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", action=argparse.BooleanOptionalAction, help="one arm after another")
    parser.add_argument("--only", nargs="+", help="workloads by their V/P/A")
    parser.add_argument("--arms", nargs="+", choices=[maker.__name__ for maker in arms.MAKERS], help="those alone")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.alone is None:
        args.alone = args.device == "cuda"
    if args.rows is None and args.device == "cpu":
        parser.error("--rows is needed on a CPU")
    for name, found in measured("benchmarks.steps", args, partial(measure, args)):
        print(name, f"possible {found['possible']['sparse']:.2f}x")
        for name, arm in found["arms"].items():
            print(f"  {name:32} {arm['seconds']:.3f} s  {', '.join(said(arm))}")


def said(arm: dict[str, Any]) -> Iterator[str]:
    """An arm's gains in words, as far as it has some."""
    if "ratio_to_dense" in arm:
        yield f"{arm['ratio_to_dense']:.2f}x"
    if "ratio_to_strongest" in arm:
        yield f"{arm['ratio_to_strongest']:.2f}x over {arm['strongest']}"
    if "efficiency" in arm:
        yield f"efficiency {arm['efficiency']:.2f}"
    if "efficiency_to_strongest" in arm:
        yield f"{arm['efficiency_to_strongest']:.2f} over the strongest"


if __name__ == "__main__":
    main()
