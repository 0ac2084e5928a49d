"""What a GPU is to show, in parts of nine minutes each; no network is needed.

    python -m benchmarks.gpu correctness | steps | compilation | learning  [--size tiny] [--device cpu] [--out FOLDER]
    python -m benchmarks.gpu wheels                             # what to carry there, and how

Written for one H100 or H200. Each part writes `gpu-PART.json` with the command, versions and the device; run again, it
goes on with checks that failed or for which there was no time. `python -m benchmarks.tables` makes tables of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

PARTS = ("correctness", "steps", "compilation", "learning")
LARGE = "qwen2.5-vl-7b"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "wheels"])
    parser.add_argument("--size", help="of `benchmarks.models`; `tiny` to try the part itself")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", help="checks whose names have one of these in them")
    parser.add_argument("--python", help="wheels: for this version, if not the running one")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # this process is watched, since then
    args = parser.parse_args(argv)
    if args.part == "wheels":
        from benchmarks.gpu import wheels

        wheels.main(python=args.python, folder=args.out / "wheels")
        return 0
    if args.started is not None:
        return work(args)
    return watch(args, sys.argv[1:] if argv is None else argv)


def watch(args: argparse.Namespace, argv: list[str]) -> int:
    """The part in other processes; tells what came of it."""
    import json

    from benchmarks.gpu import part

    path = file_of(args)
    ended = part.watched(
        lambda started: [sys.executable, "-m", "benchmarks.gpu", *argv, "--started", repr(started)],
        path,
        minutes=args.minutes,
    )
    if not path.exists():
        return 1
    result = json.loads(path.read_text())
    states = [check["status"] for check in result["checks"].values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("passed", "failed", "skipped"))
    print(f"{path}: {counts}; left out for want of time: {', '.join(result['left_out']) or 'nothing'}")
    return 0 if ended and "failed" not in states else 1


def work(args: argparse.Namespace) -> int:
    """The part, here."""
    import torch

    from benchmarks.gpu import part

    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device; --device cpu --size tiny tries the part itself", file=sys.stderr)
        return 1
    found = checks(args)
    if args.only:
        found = [check for check in found if any(some in check.name for some in args.only)]
    settings = {"part": args.part, "size": args.size, "device": args.device}
    started = time.time() if args.started is None else args.started
    part.run(found, file_of(args), settings, started=started, minutes=args.minutes)
    return 0


def file_of(args: argparse.Namespace) -> Path:
    out: Path = args.out
    return out / f"gpu-{args.part}.json"


def checks(args: argparse.Namespace) -> list[Any]:
    """Those of a part."""
    if args.part == "correctness":
        from benchmarks.gpu import correctness

        return correctness.checks(args.size or LARGE, args.device)
    if args.part == "steps":
        from benchmarks.gpu import speed

        return speed.checks(args.size, args.device)
    if args.part == "learning":
        from benchmarks.gpu import learning

        return learning.checks(args.size, args.device, args.out / "quality")
    from benchmarks.gpu import compiling

    return compiling.checks(args.size or "qwen2.5-3b", args.device, args.out / "caches")


if __name__ == "__main__":
    raise SystemExit(main())
