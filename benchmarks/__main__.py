"""All benchmarks of training on this machine, with tables and pictures of what they found.

    make benchmark                                   # or: python -m benchmarks [--out FOLDER]

On two CPU cores one to three hours, with a small decoder; on a GPU several hours, with decoders of 3 to 8 billion
parameters, all weights trained or adapters alone, with and without gradient checkpointing. Stopped and started again,
it goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import tables


def on_cpu(folder: Path) -> list[list[str]]:
    """Commands: module, arguments."""
    return [
        ["steps", "--rows", "2", "--out", f"{folder}/steps-cpu.json"],
        ["steps", "--rows", "2", "--backends", "inductor", "--out", f"{folder}/steps-cpu-inductor.json"],
        ["steps", "--rows", "8", "--only", "96/60/100", "96/60/400", "--out", f"{folder}/steps-cpu-8-rows.json"],
        ["mixed", "--out", f"{folder}/mixed-cpu.json"],
        ["compilation", "--out", f"{folder}/compilation-cpu.json"],
        ["teacher", "--out", f"{folder}/teacher-cpu.json"],
        ["peak", "--rows", "8", "--out", f"{folder}/peak-cpu.json"],
    ]


def on_gpu(folder: Path) -> list[list[str]]:
    """Commands: module, arguments."""
    commands = []
    for model in ("qwen2.5-3b", "qwen2.5-vl-7b", "internvl3.5-8b"):
        for options in ([], ["--checkpointing"], ["--lora"], ["--lora", "--checkpointing"]):
            name = "".join([model, *options]).replace("--", "-")
            both = ["--backends", "eager", "inductor", "--dtype", "bfloat16"]
            commands.append(["steps", "--model", model, *options, *both, "--out", f"{folder}/steps-{name}.json"])
    for module in ("mixed", "compilation", "teacher", "peak"):
        out = f"{folder}/{module}-qwen2.5-3b.json"
        commands.append([module, "--model", "qwen2.5-3b", "--dtype", "bfloat16", "--out", out])
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    folder = parser.parse_args().out
    for module, *arguments in on_gpu(folder) if torch.cuda.is_available() else on_cpu(folder):
        print(f"python -m benchmarks.{module} {' '.join(arguments)}", flush=True)
        # A process each: what one leaves in memory or on the GPU is gone when the next starts.
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments]).returncode
        if code:  # such as a model that this GPU cannot hold; the others may fit
            print(f"  stopped with exit status {code}", flush=True)
    print(tables.write_all(folder))


if __name__ == "__main__":
    main()
