"""Seconds until a training step is done, and until the next, in a process that has compiled nothing yet.

    python -m benchmarks.first_step --arm regate --model qwen2.5-3b --dtype bfloat16 --cache FOLDER

The compiler keeps what it makes in `--cache`: with an empty folder a start is cold, with the same one again it is warm.
With `--backend eager` ReGATE captures, rewrites and proves, and compiles nothing. Prints one line of JSON, and with
`--out FILE` adds it to those in a file, from which `benchmarks.tables` makes a table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ARMS = ("dense", "strongest", "regate")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks import arms
    from benchmarks.models import SIZES, build
    from benchmarks.workloads import batch, kept_labels
    from regate.insight.estimate import Sample

    size = SIZES[args.model]
    size = replace(size, layers=args.layers or size.layers)
    model = build(size, device=args.device, dtype=getattr(torch, args.dtype))
    data = batch(Sample(*args.tokens), args.rows, size.vocabulary, device=args.device)
    kept = kept_labels(data["labels"], arms.SPARSE_AFTER_ONE.keep)
    start = time.perf_counter()
    if args.arm == "regate":
        steps = arms.Gated(model, args.backend, replace(arms.SPARSE_AFTER_ONE, disable=tuple(args.disable)))
        turns = [steps.full, steps.sparse]
    else:
        turns = [arms.dense(model, args.backend)["dense" if args.arm == "dense" else "dense, both"]]
    found: dict[str, Any] = {"layers": size.layers, "apply": time.perf_counter() - start, "steps": []}
    for i in range(args.steps):
        start = time.perf_counter()
        turns[min(i, len(turns) - 1)](data, kept)  # ReGATE's first is full, the others are sparse
        if args.device == "cuda":
            torch.cuda.synchronize()
        found["steps"].append(time.perf_counter() - start)
    return found | {"compilation": found["apply"] + sum(found["steps"]) - args.steps * min(found["steps"])}


def keep(path: Path, found: dict[str, Any]) -> None:
    """Add a start to the file, in the place of one of the same kind."""
    from benchmarks.machine import described, write

    result = described("benchmarks.first_step", "torch", "transformers") | {"starts": []}
    if path.exists():
        result["starts"] = json.loads(path.read_text())["starts"]
    named = ("arm", "model", "layers", "start")
    others = [one for one in result["starts"] if any(one[name] != found[name] for name in named)]
    write(result | {"starts": [*others, found]}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, default="regate")
    parser.add_argument("--model", default="small")
    parser.add_argument("--layers", type=int, help="instead of the model's")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--disable", nargs="*", default=[], help="passes of the engine, as in regate.Config")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs=3, default=[96, 60, 100], help="V P A")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = "warm" if args.cache.exists() else "cold"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache.absolute())  # read where torch is imported
    os.environ["TRITON_CACHE_DIR"] = str(args.cache.absolute() / "triton")
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(args)
    print(json.dumps(found))
    if args.out is not None:
        arm = args.arm + f", {args.backend}" * (args.backend != "inductor")
        arm += "".join(f", without `{name}`" for name in args.disable)
        keep(args.out, {"arm": arm, "model": args.model, "start": start} | found)


if __name__ == "__main__":
    main()
