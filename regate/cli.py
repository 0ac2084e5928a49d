"""The command `regate`.

regate estimate --model PATH_OR_ID --tokens 1352/60/110      what gating can gain, and whether it is worth it
regate inspect --model PATH_OR_ID                            what would be found in a model, without its weights
regate run --keep 0.5 -- train.py --epochs 1                 gate a script's Hugging Face Trainer, without a line in it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

from torch import nn
from transformers import AutoConfig

from regate import options, run
from regate.errors import ConfigError, RegateError
from regate.insight.estimate import build_on_meta, costs_of, estimate, inspect

_SAMPLES = 100_000  # of each kind, where nobody says


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 where the input is of no use. `run` has the exit code of what it runs."""
    words, script = options.split(sys.argv[1:] if argv is None else argv)
    parser = options.Parser(prog="regate", description="Train a multimodal LLM on fewer tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    estimating = commands.add_parser("estimate", help="what gating can gain on this data, before training")
    inspecting = commands.add_parser("inspect", help="what would be found in a model, without its weights")
    running = commands.add_parser("run", help="gate a script's Hugging Face Trainer, without a line in it")
    run.add_options(running)
    for command in (estimating, inspecting):
        command.add_argument("--model", required=True, help="a Hugging Face id or local path; only its config is read")
        command.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the config")
    data = estimating.add_mutually_exclusive_group(required=True)
    data.add_argument("--tokens", nargs="+", metavar="V/P/A", help="visual, prompt and answer tokens per sample")
    data.add_argument("--counts", type=Path, help="JSON lines, one [visual, prompt, answer] per sample")
    estimating.add_argument(
        "--samples",
        type=_positive(int),
        help=f"of each kind in --tokens (default: {_SAMPLES}); with --counts, of the whole data set, of which the file "
        "holds a part (default: as many as the file)",
    )
    estimating.add_argument("--epochs", type=_positive(float), default=1.0, help="of the run (default: 1)")
    estimating.add_argument(
        "--batch-size",
        type=_positive(int),
        default=64,
        help="samples per optimizer step, all ranks together (default: 64)",
    )
    estimating.add_argument(
        "--tflops", type=_positive(float), help="that dense training sustains, all devices together, for hours"
    )
    estimating.add_argument(
        "--rows", type=_positive(int), help="of one forward on one device, for the peak of memory (default: many)"
    )
    estimating.add_argument(
        "--teacher",
        metavar="PATH",
        help="a Hugging Face id or local path of another model that gives the reference losses; only its config is "
        "read (default: the language model itself)",
    )
    options.add_options(estimating, options.FIELDS)
    args = parser.parse_args(words)
    if args.command == "run":
        return run.from_options(args, script)
    try:
        model = _model(args, args.model)
        print(_estimate(model, args) if args.command == "estimate" else _inspect(model))
    except (RegateError, OSError, ValueError) as error:
        print(f"regate {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _model(args: argparse.Namespace, name: str) -> nn.Module:
    """The model of that name, without weights.

    Raises:
        ConfigError: transformers cannot read its config, or make a model of it.
        UnknownArchitectureError: it is of no use here.
    """
    try:
        return build_on_meta(AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code))
    except RegateError:
        raise
    except Exception as error:  # of any type: remote code, too, is run here
        told = " ".join(str(error).split())
        raise ConfigError(f"transformers makes no model of {name}: {type(error).__name__}: {told}") from error


def _estimate(model: nn.Module, args: argparse.Namespace) -> str:
    config = options.Settings.of(options.given(args, options.FIELDS)).config
    teacher = None if args.teacher is None else _model(args, args.teacher)
    if args.counts:
        samples: list[Sequence[int]] = _counts(args.counts)
        copies = 1 if args.samples is None else args.samples / len(samples)
    else:
        samples = [_tokens(text) for text in args.tokens]
        copies = args.samples or _SAMPLES
    steps = round(args.epochs * len(samples) * copies / args.batch_size)
    throughput = None if args.tflops is None else args.tflops * 1e12
    found = estimate(
        model, samples, config, epochs=args.epochs, steps=steps, copies=copies, rows=args.rows,
        teacher=teacher, flops_per_second=throughput,
    )  # fmt: skip
    return str(found)


def _counts(path: Path) -> list[Sequence[int]]:
    """Token counts, one [visual, prompt, answer] a line.

    Raises:
        ConfigError: the file holds none, or a line that is something else.
        OSError: it cannot be read.
    """
    found: list[Sequence[int]] = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            counts = json.loads(line)
        except json.JSONDecodeError:
            counts = None
        if not isinstance(counts, list) or len(counts) != 3 or any(type(count) is not int for count in counts):
            raise ConfigError(
                f"{path}, line {number}: each line is one [visual, prompt, answer] of whole numbers, such as "
                f"[1352, 60, 110]; got {line.strip()[:80]!r}"
            )
        found.append(counts)
    if not found:
        raise ConfigError(f"{path} holds no line; each is one [visual, prompt, answer], such as [1352, 60, 110]")
    return found


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Reads a number above 0, for argparse, which tells what is none."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < inf:
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"  # by which argparse calls it
    return number


def _tokens(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split("/"))
    except ValueError:
        counts = ()
    if len(counts) != 3:
        raise ConfigError(f"--tokens takes visual/prompt/answer, such as 1352/60/110; got {text!r}")
    return counts


def _inspect(model: nn.Module) -> str:
    found = inspect(model)
    costs = costs_of(model, found)
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(graph.flops_linear for graph in found.graphs)
    quadratic = sum(graph.flops_quadratic for graph in found.graphs)
    recurrences = sum(graph.recurrences for graph in found.graphs)
    return "\n".join(
        [
            f"model      {type(model).__name__}, {parameters / 1e9:.2f} billion parameters",
            f"decoder    {found.attention} attention and {found.mlp} MLP blocks in {len(found.graphs)} graph(s)"
            + (f", {recurrences} operations that run along the sequence" if recurrences else ""),
            f"FLOPs      {linear / 1e9:.2f} G per position, {quadratic:,.0f} per pair of positions",
            f"head       {costs.head / 1e9:.2f} GFLOPs per position, {costs.vocabulary:,} tokens",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
