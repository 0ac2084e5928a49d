"""How long are steps, how much memory do they take, how far are they from what the device could do?

Figures are those of `benchmarks.steps` and `benchmarks.peak`; eager first, since compilation is a part of its own.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from benchmarks import peak, steps
from benchmarks.gpu.part import Check, Record
from benchmarks.workloads import WORKLOADS, label

ARMS = ["dense", "optimizer_alone", "gated", "exact", "thinned", "half", "quarter", "liger", "liger_gated"]
FEW = ["dense", "optimizer_alone", "gated", "exact"]
SAMPLES = {label(sample): (title, sample) for title, sample in WORKLOADS.items()}
LARGE = "qwen2.5-vl-7b"
ROWS = 8  # more would fit, and one workload of the large model would take a part's whole time


def checks(size: str | None, device: str) -> list[Check]:
    """Of shapes of three and of seven billion parameters; of `size` alone, if given."""

    def step(model: str, workload: str, seconds: float, **options: Any) -> Check:
        model = size or model
        args = settings(model, device, **options)
        said = [name for name in ("lora", "checkpointing") if getattr(args, name)]
        name = ", ".join([f"steps {model}", *(said or ["full"]), *args.backends, workload])
        return Check(name, partial(steps_of, args, workload), seconds)

    lora = {"lora": True, "checkpointing": True}
    found = [
        step("qwen2.5-3b", "576/60/300", 80),
        step(LARGE, "576/60/300", 80, **lora),
        step(LARGE, "576/60/300", 90, checkpointing=True),
        step("qwen2.5-3b", "96/60/400", 60),
        Check(
            f"peak {size or 'qwen2.5-3b'}, 96/60/400", partial(peak_of, size or "qwen2.5-3b", "96/60/400", device), 60
        ),
        step("qwen2.5-3b", "1352/60/110", 80),
        step(LARGE, "96/60/400", 70, **lora),
        step("qwen2.5-3b", "576/60/300", 80, **lora),
        step("qwen2.5-3b", "576/60/300", 300, backends=["inductor"], arms=FEW),
    ]
    return list({check.name: check for check in found}.values())


def settings(model: str, device: str, **options: Any) -> argparse.Namespace:
    """As the command line of `benchmarks.steps` gives them."""
    on_gpu = device == "cuda"
    defaults: dict[str, Any] = {
        "model": model, "device": device, "rows": ROWS if on_gpu else 2, "lora": False,
        "dtype": "bfloat16" if on_gpu else "float32",
        "checkpointing": False, "backends": ["eager"], "repeats": 5 if on_gpu else 1, "alone": on_gpu, "arms": ARMS,
    }  # fmt: skip
    return argparse.Namespace(**(defaults | options))


def steps_of(args: argparse.Namespace, workload: str) -> Record:
    """The figures of a workload, in the form of a file of `benchmarks.steps`."""
    found = steps.measure(args, *SAMPLES[workload])
    seconds = {kind: s for kind, s in found.get("roofline_seconds", {}).items() if s is not None}
    for arm, figures in found["arms"].items():
        kind = {"dense": "dense", "dense,": "unpadded", "regate": arm.split()[1]}.get(arm.split()[0])
        if kind in seconds:
            figures["roofline_share"] = seconds[kind] / figures["seconds"]
    return {"steps": {"settings": vars(args), "workloads": {workload: found}}}


def peak_of(model: str, workload: str, device: str) -> Record:
    """The figures of a workload, in the form of a file of `benchmarks.peak`."""
    on_gpu = device == "cuda"
    steps_, dtype = (8, "bfloat16") if on_gpu else (2, "float32")
    args = argparse.Namespace(model=model, device=device, rows=8, steps=steps_, dtype=dtype)
    return {"peak": {"settings": vars(args), "workloads": {workload: peak.measure(args, *SAMPLES[workload])}}}
