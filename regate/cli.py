"""The command `regate`.

regate estimate --model PATH_OR_ID --tokens 1352/60/110      what gating can gain, and whether it is worth it
regate inspect --model PATH_OR_ID                            what would be found in a model, without its weights
regate run --keep 0.5 -- train.py --epochs 1                 gate a script's Hugging Face Trainer, without a line in it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from transformers import AutoConfig, PretrainedConfig

from regate import run
from regate.config import Alignment, Config, Elided, Logits, Schedule
from regate.errors import ConfigError, RegateError
from regate.insight.estimate import build_on_meta, costs_of, estimate, inspect

_NUMBERS = ("keep", "visual_keep", "cycle", "full_steps", "warmup")  # of the config


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 where the input is of no use. `run` has the exit code of what it runs."""
    options, script = run.split(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="regate", description="Train a multimodal LLM on fewer tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    estimating = commands.add_parser("estimate", help="what gating can gain on this data, before training")
    inspecting = commands.add_parser("inspect", help="what would be found in a model, without its weights")
    running = commands.add_parser("run", help="gate a script's Hugging Face Trainer, without a line in it")
    run.add_options(running)
    for command in (estimating, inspecting):
        command.add_argument("--model", required=True, help="a Hugging Face id or local path; only its config is read")
        command.add_argument("--trust-remote-code", action="store_true")
    data = estimating.add_mutually_exclusive_group(required=True)
    data.add_argument("--tokens", nargs="+", metavar="V/P/A", help="visual, prompt and answer tokens per sample")
    data.add_argument("--counts", type=Path, help="JSON lines, one [visual, prompt, answer] per sample")
    estimating.add_argument("--samples", type=int, default=100_000, help="of each kind in --tokens")
    estimating.add_argument("--epochs", type=float, default=1.0)
    estimating.add_argument("--batch-size", type=int, default=64, help="samples per optimizer step, all ranks together")
    estimating.add_argument(
        "--tflops", type=float, help="that dense training sustains, all devices together, for hours"
    )
    for name in _NUMBERS:
        default = getattr(Config(), name)
        estimating.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    estimating.add_argument("--alignment", choices=get_args(Alignment), default=Config().alignment)
    estimating.add_argument("--elided", choices=get_args(Elided), default=Config().elided)
    estimating.add_argument("--schedule", choices=get_args(Schedule), default=Config().schedule)
    estimating.add_argument("--rows", type=int, help="of one forward on one device, for the peak of memory")
    estimating.add_argument("--logits", choices=get_args(Logits), default=Config().logits)
    args = parser.parse_args(options)
    if args.command == "run":
        return run.from_options(args, script)
    try:
        model = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
        print(_estimate(model, args) if args.command == "estimate" else _inspect(model))
    except (RegateError, OSError, ValueError) as error:
        print(f"regate {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _estimate(model: PretrainedConfig, args: argparse.Namespace) -> str:
    config = Config(**{name: getattr(args, name) for name in (*_NUMBERS, "alignment", "elided", "schedule", "logits")})
    if args.counts:
        samples = [tuple(json.loads(line)) for line in args.counts.read_text().splitlines() if line.strip()]
        copies = 1
    else:
        samples = [_tokens(text) for text in args.tokens]
        copies = args.samples
    steps = round(args.epochs * len(samples) * copies / args.batch_size)
    throughput = None if args.tflops is None else args.tflops * 1e12
    found = estimate(
        model, samples, config, epochs=args.epochs, steps=steps, copies=copies, rows=args.rows,
        flops_per_second=throughput,
    )  # fmt: skip
    return str(found)


def _tokens(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split("/"))
    except ValueError:
        counts = ()
    if len(counts) != 3:
        raise ConfigError(f"--tokens takes visual/prompt/answer, such as 1352/60/110; got {text!r}")
    return counts


def _inspect(config: PretrainedConfig) -> str:
    model = build_on_meta(config)
    found = inspect(model)
    costs = costs_of(model, found)
    parameters = sum(p.numel() for p in model.parameters())
    recurrences = sum(graph.recurrences for graph in found.graphs)
    return "\n".join(
        [
            f"model      {type(model).__name__}, {parameters / 1e9:.2f} billion parameters",
            f"decoder    {found.attention} attention and {found.mlp} MLP blocks in {len(found.graphs)} graph(s)"
            + (f", {recurrences} operations that run along the sequence" if recurrences else ""),
            f"FLOPs      {costs.linear / 1e9:.2f} G per position, {costs.quadratic:,.0f} per pair of positions",
            f"head       {costs.head / 1e9:.2f} GFLOPs per position, {costs.vocabulary:,} tokens",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
