"""What the teacher's pass over an epoch costs beside one dense training epoch, with and without eliding placeholders.

    python -m benchmarks.teacher --out benchmarks/results/teacher-cpu.json

Per batch, in turns, the median: reference losses as ReGATE computes them; the same losses by a forward pass over the
padded sequence, placeholders masked out but computed; and a dense training step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms
from benchmarks.models import SIZES, build
from benchmarks.workloads import WORKLOADS, batch, label, measured
from model_adapters import find_adapter
from regate.insight.estimate import Sample
from regate.output.loss import Places, label_losses
from regate.teaching.teacher import Teacher
from regate.training import batches


def measure(args: argparse.Namespace, title: str, sample: Sample) -> dict[str, Any]:
    size = SIZES[args.model]
    model = build(size, device=args.device, dtype=getattr(torch, args.dtype))
    data = batch(sample, args.rows, size.vocabulary, device=args.device)
    adapter = find_adapter(model)
    layout = adapter.layout(model, data)
    on_host, *_ = batches.on_host(data, layout, vocabulary=size.vocabulary)
    teacher = Teacher(model, adapter, backend="auto", source="copy", on_unsupported="raise")
    step = arms.dense(model, "eager")["dense"]
    text = layout.valid & ~layout.visual
    ids = torch.where(layout.visual, teacher.placeholder(), layout.input_ids)

    def padded() -> list[Tensor]:
        with torch.no_grad():
            position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            hidden = teacher.decoder.forward(
                inputs_embeds=teacher.embeddings(ids),
                attention_mask=text.long(),
                position_ids=position,
                use_cache=False,
            ).last_hidden_state
            wanted = layout.labels != -100
            return [label_losses(hidden, Places.of(layout.labels, wanted), head=teacher.head)]

    kinds: dict[str, Callable[[], Any]] = {
        "elided": lambda: teacher.losses(data, on_host),
        "padded": padded,
        "dense step": lambda: step(data, layout.labels != -100),
    }
    elided, whole = torch.cat(kinds["elided"]()).float(), kinds["padded"]()[0].float().cpu()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind, run in kinds.items():
            start = time.perf_counter()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[kind].append(time.perf_counter() - start)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "seconds": median,
        "share_of_dense_epoch": median["elided"] / median["dense step"],
        "times_cheaper_than_padded": median["padded"] / median["elided"],
        "largest_difference": float((elided - whole).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/teacher.json"))
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.only = [label(sample) for sample in WORKLOADS.values() if sample.visual]
    for workload, found in measured("benchmarks.teacher", args, partial(measure, args)):
        print(
            f"{workload:14} {found['share_of_dense_epoch']:.1%} of a dense epoch, "
            f"{found['times_cheaper_than_padded']:.1f}x cheaper than padded, "
            f"differs by {found['largest_difference']:.1g}"
        )


if __name__ == "__main__":
    main()
