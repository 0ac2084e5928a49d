"""The peak of memory over a cycle, dense against ReGATE with full steps and with full rows in every step.

    python -m benchmarks.peak --rows 8 --out benchmarks/results/peak-cpu.json     # minutes on a CPU; nothing is timed

Each arm takes the same steps on the same batches, as many as make the share of full ones whole; the first is the
cycled schedule's full one. Of each step two figures are taken: bytes that autograd keeps for the backward pass, each
storage once, and bytes that the step allocates at most, gradients and what lives for a moment among them. The peak is
the largest of all steps. Dense training gets its padded rows without a mask, which right-padded causal rows do not
need: in a narrow decoder masks would be a large share of what it keeps. No optimizer steps: its states are the same in
every arm. A second run with the same settings goes on with workloads that are missing.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import regate
from benchmarks import arms
from benchmarks.models import SIZES, build
from benchmarks.workloads import batch, label, measured
from regate.insight.estimate import Sample

SHARE = Fraction(regate.Config().full_steps, regate.Config().cycle)
CYCLED = regate.Config.paper(warmup=0, cycle=SHARE.denominator, full_steps=SHARE.numerator)
INTERLEAVED = replace(CYCLED, schedule="interleaved")
ARMS: dict[str, regate.Config | None] = {
    "dense": None,
    "cycled": CYCLED,
    "interleaved": INTERLEAVED,
    "cycled, half the visual tokens": replace(CYCLED, visual_keep=0.5),
    "interleaved, half the visual tokens": replace(INTERLEAVED, visual_keep=0.5),
}


def allocated(step: Callable[[], None], device: str) -> int:
    """Bytes that a step adds to what is allocated, at most."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def over_a_cycle(model: nn.Module, config: regate.Config | None, sample: Sample, args: argparse.Namespace) -> Any:
    """The figures of each step of one arm."""
    device = next(model.parameters()).device.type
    gate = None if config is None else regate.apply(model, config, teacher=None, backend="eager")
    found: dict[str, list[int]] = {"saved": [], "allocated": []}
    before = (
        0 if gate is None else 2
    )  # the first captures and proves what may be left out, the second captures the tail
    for i in tqdm(range(-before, args.steps), desc=label(sample), unit="step", disable=None):
        data = batch(sample, args.rows, SIZES[args.model].vocabulary, seed=max(i, 0), device=device)
        if gate is None:
            del data["attention_mask"]

        def step(data: arms.Batch = data) -> None:
            model(**data, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        if gate is not None:
            gate.step = i % SHARE.denominator
        if i < 0:
            step()
            continue
        with arms.saved_bytes() as saved:
            most = allocated(step, device)
        found["saved"].append(saved["bytes"])
        found["allocated"].append(most)
    return found


def measure(args: argparse.Namespace, title: str, sample: Sample) -> dict[str, Any]:
    result: dict[str, Any] = {"tokens": list(sample), "arms": {}}
    for name, config in ARMS.items():
        if config is not None and config.visual_keep < 1 and not sample.visual:
            continue
        torch._dynamo.reset()
        model = build(SIZES[args.model], device=args.device, dtype=getattr(torch, args.dtype))
        steps = over_a_cycle(model, config, sample, args)
        result["arms"][name] = {"steps": steps, **{f"peak_{kind}": max(x) for kind, x in steps.items()}}
        gc.collect()
    dense = result["arms"]["dense"]
    for arm in result["arms"].values():
        for kind in ("saved", "allocated"):
            arm[f"of_dense_{kind}"] = arm[f"peak_{kind}"] / dense[f"peak_{kind}"]
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/peak.json"))
    parser.add_argument("--model", choices=SIZES, default="narrow")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=SHARE.denominator)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="+", default=["96/60/400", "576/60/300"], help="workloads by their V/P/A")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for workload, found in measured("benchmarks.peak", args, partial(measure, args)):
        print(workload)
        for name, arm in found["arms"].items():
            print(f"  {name:36} saved {arm['of_dense_saved']:.2f}, allocated {arm['of_dense_allocated']:.2f} of dense")


if __name__ == "__main__":
    main()
