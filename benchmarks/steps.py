"""Time of a training step, dense against ReGATE and its alternatives, beside what arithmetic allows.

    python -m benchmarks.steps --out benchmarks/results/steps-cpu.json          # on a CPU; half an hour on two cores

For each workload all arms run in turns on the same batches; the figure is the median over the repeats. Each workload
is written when it is done, and a second run with the same settings goes on with those that are missing. The table and
the picture are made from the file by `python -m benchmarks.tables`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import arms
from benchmarks.machine import described, write
from benchmarks.workloads import VISUAL_ID, WORKLOADS, batch, label
from model_adapters import Layout
from regate.decision import Decision
from regate.estimate import Sample
from regate.selection import keep_highest

KEEP = arms.SPARSE_AFTER_ONE.keep


class Arithmetic:
    """Forward FLOPs of a decoder: products with weights, causal attention, vocabulary projection; and after the last
    attention, products at positions that the vocabulary projection reads."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.layers, self.width = config.num_hidden_layers, config.hidden_size
        weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
        self.per_position = 2 * weights
        last = model.model.layers[-1]
        self.after_attention = 2 * sum(p.numel() for m in (last.self_attn.o_proj, last.mlp) for p in m.parameters())
        self.per_logit = 2 * model.lm_head.weight.numel()

    def flops(self, positions: int, predictions: int) -> int:
        """Of a row with so many positions, of which so many are projected onto the vocabulary."""
        attention = 2 * self.layers * self.width * positions**2  # two products, half of each
        unread = self.after_attention * (positions - predictions)
        return self.per_position * positions + attention - unread + self.per_logit * predictions


def possible(arithmetic: Arithmetic, data: dict[str, Tensor], kept: Tensor) -> dict[str, float]:
    """Dense FLOPs of the padded batch over those that a full, a sparse, and a thinned sparse step need."""
    ids, labels, valid = (data[name].cpu() for name in ("input_ids", "labels", "attention_mask"))
    layout = Layout(ids, labels, valid.bool(), ids == VISUAL_ID)
    rows, length = labels.shape
    whole = rows * arithmetic.flops(length, length)
    ratios = {}
    for kind, config in (("full", arms.SPARSE_AFTER_ONE), ("sparse", arms.SPARSE_AFTER_ONE), ("thinned", arms.THINNED)):
        full = kind == "full"
        decided = Decision.of(layout, labels != -100 if full else kept.cpu(), config, full=full, everything=False)
        needed = sum(arithmetic.flops(n, m) for n, m in zip(decided.computed, decided.read, strict=True))
        ratios[kind] = whole / needed
    return ratios


def measure(title: str, sample: Sample, args: argparse.Namespace, device: str) -> dict[str, Any]:
    def model() -> Any:
        return arms.decoder(args.layers, args.width, args.vocabulary, device=device, dtype=getattr(torch, args.dtype))

    data = batch(sample, args.rows, args.vocabulary, device=device)
    labelled = data["labels"] != -100
    scores = torch.rand(labelled.shape, generator=torch.Generator().manual_seed(1)).to(device)
    kept = keep_highest(scores, labelled, KEEP)
    steps: dict[str, arms.Step] = {}
    gates = {}
    for backend in args.backends:
        compiled = backend == "inductor"
        steps[f"dense {backend}"] = arms.dense(model(), compiled=compiled)
        steps[f"loss masking {backend}"] = arms.loss_masking(model(), compiled=compiled)
        steps[f"per-layer gather {backend}"] = arms.per_layer_gather(model(), compiled=compiled)
        full, sparse, gates[backend] = arms.gated(model(), backend=backend)
        steps[f"regate full {backend}"], steps[f"regate sparse {backend}"] = full, sparse
        if sample.visual:
            _, steps[f"regate thinned {backend}"], _ = arms.gated(model(), backend=backend, config=arms.THINNED)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, float] = {}
    saved: dict[str, int] = {}

    def timed(name: str) -> float:
        start = time.perf_counter()
        steps[name](data, kept)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for name in steps:
        torch._dynamo.reset()  # arms share code, and with it Dynamo's cache
        first[name] = timed(name)
        timed(name)
        with arms.saved_bytes() as found:
            timed(name)
        saved[name] = found["bytes"]
    for name in steps:
        timed(name)  # each reset above took from the others what they had compiled
    overhead = {backend: gate.counters.gate_seconds for backend, gate in gates.items()}
    for _ in tqdm(range(args.repeats), desc=label(sample), unit="repeat", disable=None):
        for name in steps:
            seconds[name].append(timed(name))
    arithmetic = possible(Arithmetic(model()), data, kept)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {
        "workload": title,
        "tokens": list(sample),
        "positions": int(data["attention_mask"].sum()),
        "answer_tokens": int(labelled.sum()),
        "possible": arithmetic,
        "arms": {},
    }
    for arm, value in median.items():
        backend = arm.split()[-1]
        ratio = median[f"dense {backend}"] / value
        result["arms"][arm] = {
            "seconds": value,
            "spread": [min(seconds[arm]), max(seconds[arm])],
            "first_step_seconds": first[arm],
            "ratio_to_dense": ratio,
            "saved_bytes": saved[arm],
            "answer_tokens_per_second": int(labelled.sum()) / value,
            "positions_per_second": int(data["attention_mask"].sum()) / value,
        }
        kind = arm.split()[1]
        if arm.startswith("regate"):
            result["arms"][arm]["efficiency"] = ratio / arithmetic[kind]
    for backend, gate in gates.items():
        spent = gate.counters.gate_seconds - overhead[backend]
        total = sum(sum(seconds[f"regate {kind} {backend}"]) for kind in ("full", "sparse"))
        result[f"gating_share_{backend}"] = spent / total
        report = gate.report()
        result[f"graphs_{backend}"], result[f"recompiles_{backend}"] = report["graphs"], report["recompiles"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/steps.json"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backends", nargs="+", choices=["eager", "inductor"], default=["eager"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="workloads by their V/P/A")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
    result: dict[str, Any] = {
        **described("benchmarks.steps", "torch", "transformers"),
        "settings": settings,
        "workloads": {},
    }
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["settings"] == settings:
            result["workloads"] = before["workloads"]
    for title, sample in WORKLOADS.items():
        if label(sample) in result["workloads"] or (args.only and label(sample) not in args.only):
            continue
        found = result["workloads"][label(sample)] = measure(title, sample, args, device)
        write(result, args.out)
        print(title, f"possible {found['possible']['sparse']:.2f}x")
        for name, arm in found["arms"].items():
            efficiency = f", efficiency {arm['efficiency']:.2f}" if "efficiency" in arm else ""
            print(f"  {name:26} {arm['seconds']:.3f} s  {arm['ratio_to_dense']:.2f}x{efficiency}")


if __name__ == "__main__":
    main()
