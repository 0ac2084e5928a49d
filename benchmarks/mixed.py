"""A decoder on batches whose rows differ in length as real data's do: padded, in rows of active positions, end to end.

    python -m benchmarks.mixed --out benchmarks/results/mixed-cpu.json     # two minutes on two CPU cores

Lengths are log-normal. All arms compute the same numbers at the same positions, those that are no padding; they run in
turns, forward and backward, and ratios are medians over turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import regate_patch
from benchmarks.machine import described, write
from benchmarks.models import SIZES, build
from model_adapters import find_adapter
from regate_patch import Active


def lengths(rows: int, *, median: int, shortest: int, longest: int, seed: int) -> Tensor:
    """[rows] int64, log-normal around `median`."""
    draws = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    return (median * torch.exp(0.8 * draws)).clamp(shortest, longest).long()


def arms(decoder: nn.Module, mask: Tensor) -> dict[str, Callable[[], None]]:
    """Forward and backward of the decoder on rows that are valid where `mask` [B, S] says so."""
    stream = torch.randn(*mask.shape, decoder.config.hidden_size, requires_grad=True)  # type: ignore[union-attr]
    own = decoder.forward

    def step(forward: Callable[..., object]) -> None:
        decoder.forward = forward
        with regate_patch.active(Active.from_mask(mask)):
            output = decoder(inputs_embeds=stream, attention_mask=mask.long(), use_cache=False)
        (output.last_hidden_state * mask[..., None]).sum().backward()

    made = {"padded": own}
    for name, disable in (("rows", ["end_to_end"]), ("end to end", [])):
        decoder.forward = own
        regate_patch.patch(decoder, backend="eager", padding_elided=True, disable=disable)
        made[name] = decoder.forward
    return {name: lambda forward=forward: step(forward) for name, forward in made.items()}


def measure(size: str, rows: int, repeats: int, *, median: int, longest: int) -> dict[str, object]:
    found = lengths(rows, median=median, shortest=64, longest=longest, seed=0)
    mask = torch.arange(int(found.max())) < found[:, None]
    model = build(SIZES[size], device="cpu", dtype=torch.float32, lora=False, checkpointing=False)
    steps = arms(find_adapter(model).decoder(model), mask)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    torch._dynamo.reset()
    for i in tqdm(range(repeats + 2), desc=f"{rows} rows", disable=None):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i > 1:  # the first captures
                seconds[name].append(time.perf_counter() - start)
    laid = seconds["end to end"]
    return {
        "rows": rows,
        "lengths": found.tolist(),
        "padded_over_valid": mask.numel() / int(mask.sum()),
        "squares": rows * mask.shape[1] ** 2 / int((found**2).sum()),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "times_end_to_end": {
            name: statistics.median(a / b for a, b in zip(times, laid, strict=True)) for name, times in seconds.items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mixed.json"))
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--median", type=int, default=250, help="of the lengths")
    parser.add_argument("--longest", type=int, default=1024)
    args = parser.parse_args(argv)
    found = [measure(args.model, rows, args.repeats, median=args.median, longest=args.longest) for rows in args.rows]
    write(described("benchmarks.mixed", "torch", "transformers") | {"batches": found}, args.out)
    for batch in found:
        print(batch["rows"], "rows:", batch["times_end_to_end"], "positions padded:", batch["padded_over_valid"])


if __name__ == "__main__":
    main()
