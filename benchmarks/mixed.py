"""Training steps on rows that differ in length as real data's do: the ways of dense training against ReGATE's.

    python -m benchmarks.mixed --out benchmarks/results/mixed-cpu.json     # ten minutes on two CPU cores

Lengths are log-normal, the second half of each row is its answer. One turn of an arm is forward, backward and AdamW on
each of a few batches of the same rows; arms take turns, ratios are medians over turns. "Grouped" is dense on batches of
rows that were sorted by length, as samplers do; "end to end" and "logits at labels" are those of
`benchmarks/opponents.py`. Settings are the paper's, and the whole schedule has 16 exact steps in 128.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import arms
from benchmarks.arithmetic import Arithmetic, needed
from benchmarks.machine import described, write
from benchmarks.models import SIZES, build
from benchmarks.workloads import kept_labels
from regate import Config
from regate.labels import IGNORED

FULL = Config().full_steps / Config().cycle
GATED = ("regate exact", "regate sparse")


def lengths(rows: int, *, median: int, shortest: int, longest: int, seed: int) -> Tensor:
    """[rows] int64, log-normal around `median`."""
    draws = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    return (median * torch.exp(0.8 * draws)).clamp(shortest, longest).long()


def batches(lengths: Tensor, rows: int, vocabulary: int, *, device: str) -> list[arms.Batch]:
    """Rows of random ids, right-padded, so many at a time in the order given."""
    found, random = [], torch.Generator().manual_seed(0)
    for of_rows in lengths.split(rows):
        position = torch.arange(int(of_rows.max()))
        ids = torch.randint(3, vocabulary, (len(of_rows), len(position)), generator=random)
        valid = position < of_rows[:, None]
        answer = valid & (position >= of_rows[:, None] // 2)
        data = {"input_ids": ids, "attention_mask": valid.long(), "labels": torch.where(answer, ids, IGNORED)}
        found.append({name: x.to(device) for name, x in data.items()})
    return found


def made(args: argparse.Namespace) -> dict[str, tuple[arms.Step, bool]]:
    """Arms, and whether their rows are sorted by length."""

    def model() -> nn.Module:
        return build(SIZES[args.model], device=args.device, dtype=getattr(torch, args.dtype))

    dense = arms.dense(model(), "eager")
    gated = arms.exact(model(), "eager") | arms.gated(model(), "eager")
    return {
        "padded": (dense["dense"], False),
        "grouped": (dense["dense"], True),
        "grouped, logits at labels": (dense["dense, logits at labels"], True),
        "end to end": (dense["dense, end to end"], False),
        "end to end, logits at labels": (dense["dense, both"], False),
        **{name: (gated[name], False) for name in GATED},
    }


def measure(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    found = lengths(rows * args.batches, median=args.median, shortest=64, longest=args.longest, seed=0)
    vocabulary = SIZES[args.model].vocabulary
    data = batches(found, rows, vocabulary, device=args.device)
    grouped = batches(found.sort().values, rows, vocabulary, device=args.device)
    torch._dynamo.reset()
    seconds: dict[str, list[float]] = {}
    steps = made(args)
    for turn in tqdm(range(-1, args.repeats), desc=f"{rows} rows", disable=None):
        for name, (step, sort) in steps.items():
            start = time.perf_counter()
            for batch in grouped if sort else data:
                step(batch, batch["labels"] != IGNORED)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:  # the first captures
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return summary(args, rows, data, seconds) | {"lengths": found.tolist(), "grouped_over_valid": padding(grouped)}


def padding(data: list[arms.Batch]) -> float:
    """Padded positions over valid ones."""
    masks = [batch["attention_mask"] for batch in data]
    return sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)


def summary(args: argparse.Namespace, rows: int, data: list[arms.Batch], seconds: dict[str, list[float]]) -> Any:
    """The figures of what was timed."""
    model = build(SIZES[args.model], device="meta", dtype=torch.float32)
    flops: dict[str, float] = {}
    for batch in data:
        kept = kept_labels(batch["labels"], arms.SPARSE_AFTER_ONE.keep)
        for kind, n in needed(Arithmetic.of(model), batch, kept).items():
            flops[kind] = flops.get(kind, 0) + n
    flops["schedule"] = FULL * flops["exact"] + (1 - FULL) * flops["sparse"]
    exact, sparse = (seconds[name] for name in GATED)
    schedule = [FULL * e + (1 - FULL) * s for e, s in zip(exact, sparse, strict=True)]
    strongest = min((arm for arm in seconds if arm not in GATED), key=lambda arm: statistics.median(seconds[arm]))

    def over_strongest(times: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(seconds[strongest], times, strict=True))

    return {
        "rows": rows,
        "padded_over_valid": padding(data),
        "seconds": {arm: statistics.median(times) for arm, times in seconds.items()},
        "strongest": strongest,
        "over_strongest": {arm: over_strongest(times) for arm, times in seconds.items()},
        "schedule_over_strongest": over_strongest(schedule),
        "flops": flops,
        "possible": {kind: flops["unpadded"] / flops[kind] for kind in ("exact", "sparse", "schedule")},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mixed.json"))
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--batches", type=int, default=4, help="of so many rows; together they are what is grouped")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--median", type=int, default=250, help="of the lengths")
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    found = []
    for rows in args.rows:
        found.append(measure(args, rows))
        gc.collect()
    write(described("benchmarks.mixed", "torch", "transformers") | {"settings": settings, "batches": found}, args.out)
    for batch in found:
        print(
            batch["rows"],
            "rows, over",
            batch["strongest"],
            {k: round(v, 2) for k, v in batch["over_strongest"].items()},
        )
        print(
            f"  whole schedule {batch['schedule_over_strongest']:.2f}x of {batch['possible']['schedule']:.2f}x possible"
        )


if __name__ == "__main__":
    main()
