"""What compilation costs over a run of batches of many lengths: dense `torch.compile` against ReGATE, both on inductor.

    python -m benchmarks.compilation --out benchmarks/results/compilation-cpu.json      # ten minutes on two cores

Every batch has another length and ReGATE's another number of computed positions. A step compiles if Dynamo made a graph
in it; what it took beyond the median step is the compilation's time. Dense training is compiled as `torch.compile` does
by itself, for the first length and then for any, and with `dynamic=True`, at once for any. Nothing is taken from what
an earlier compilation left on disk.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from tqdm import tqdm

from benchmarks import arms
from benchmarks.machine import described, earlier, write
from benchmarks.models import SIZES, build
from benchmarks.workloads import batch
from regate.insight.estimate import Sample


def lengths(steps: int) -> list[Sample]:
    """One workload per step, from 40 to 200 tokens."""
    random_ = random.Random(0)
    return [Sample(0, random_.randint(20, 100), random_.randint(20, 100)) for _ in range(steps)]


def run(name: str, step: arms.Step, samples: list[Sample], args: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    seconds, graphs = [], []
    for number, sample in enumerate(tqdm(samples, desc=name, unit="step", disable=None)):
        data = batch(sample, args.rows, SIZES[args.model].vocabulary, seed=number, device=args.device)
        start = time.perf_counter()
        step(data, data["labels"] != -100)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        graphs.append(counters["stats"]["unique_graphs"])
    median = statistics.median(seconds)
    made = [after - before for before, after in zip([0, *graphs], graphs, strict=False)]
    return {
        "graphs": graphs[-1],
        "steps_that_compiled": [number for number, new in enumerate(made) if new],
        "compile_seconds": sum(t - median for t, new in zip(seconds, made, strict=True) if new),
        "median_step_seconds": median,
    }


def runs(args: argparse.Namespace, *, done: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way's figures, by its name, but for what is done."""

    def model() -> nn.Module:
        return build(SIZES[args.model], device=args.device, dtype=getattr(torch, args.dtype))

    samples = lengths(args.steps)
    dynamic = arms.Trained(model())
    dynamic.model = torch.compile(dynamic.model, dynamic=True)
    gated = arms.Gated(model(), "inductor")
    turns = iter(range(args.steps))

    def alternating(data: arms.Batch, kept: Tensor) -> None:
        (gated.full if next(turns) % 8 == 0 else gated.sparse)(data, kept)

    steps: dict[str, arms.Step] = {
        "dense, torch.compile": arms.dense(model(), "inductor")["dense"],
        "dense, torch.compile(dynamic=True)": lambda data, kept: dynamic.step(data),
        "regate": alternating,
    }
    for name, step in steps.items():
        if name not in done:
            with torch._inductor.config.patch(force_disable_caches=True):
                found = run(name, step, samples, args)
            if step is alternating:
                found["recompiles_of_the_decoder"] = gated.gate.report()["recompiles"]
            yield name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compilation.json"))
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    result: dict[str, Any] = described("benchmarks.compilation", "torch", "transformers") | {"settings": settings}
    result["runs"] = (earlier(args.out, result) or {"runs": {}})["runs"]
    for name, found in runs(args, done=result["runs"].keys()):
        result["runs"][name] = found
        write(result, args.out)
    for name, found in result["runs"].items():
        print(
            f"{name:36} {found['compile_seconds']:.0f} s of compilation in steps {found['steps_that_compiled']}, "
            f"{found['graphs']} graphs, then {found['median_step_seconds']:.3f} s per step"
        )


if __name__ == "__main__":
    main()
