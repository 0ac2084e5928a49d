"""What remembering samples costs from 10^4 to 10^9 samples and on 1 to 4,096 ranks: measured small, carried on by rule.

    python -m benchmarks.scale [--folder benchmarks/results]     # prints the tables; `benchmarks.tables` takes them up

Rules: a file grows with its records; a B-tree's reads and writes take `a + b log(samples)`, as long as memory caches
its pages; what other nodes learnt is written into a node's file by one writer at a time, so many seconds a record.
What is read here was measured by `benchmarks.store` (several numbers of samples) and `benchmarks.exchange`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"
SAMPLES = tuple(10**n for n in range(4, 10))
RANKS = (1, 8, 64, 512, 4096)
PER_NODE = 8  # ranks that share a file
TOO_MUCH = 0.05  # of a step


@dataclass(frozen=True)
class Line:
    """`a + b log10(samples)`, by least squares."""

    a: float
    b: float

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Line:
        b, a = np.polyfit([log10(n) for n, _ in points], [y for _, y in points], 1)
        return cls(float(a), float(b))

    def __call__(self, samples: int) -> float:
        return self.a + self.b * log10(samples)


@dataclass(frozen=True)
class Measured:
    """
    Attributes:
        labels: of a sample.
        bytes_per_sample: on disk, of both tables.
        read, write: milliseconds for a batch of 64, both tables and difficulties alone.
        fill: seconds per record, written in the order of keys.
        rows: of a rank's step, of which others are told.
        step: its seconds.
        told_bytes: of one sample's records, as ranks send them.
        told_seconds: of the processor, for the records of one sample of another node.
    """

    labels: int
    bytes_per_sample: float
    read: Line
    write: Line
    fill: float
    rows: int
    step: float
    told_bytes: float
    told_seconds: float

    @classmethod
    def of(cls, stores: Sequence[dict[str, Any]], exchange: dict[str, Any]) -> Measured:
        """From the results of `benchmarks.store`, with as many labels in each, and of `benchmarks.exchange`."""
        largest = max(stores, key=lambda x: x["samples"])
        read, write = (
            Line.through([(x["samples"], x["microseconds_per_batch"][name]["median"] / 1e3) for x in stores])
            for name in ("get_both_tables", "put")
        )
        few, many = sorted(exchange["runs"], key=lambda x: x["ranks"])[:: len(exchange["runs"]) - 1]
        name = "milliseconds_per_step_with_a_core_per_rank"
        samples = (many["ranks"] - few["ranks"]) * exchange["rows"]
        return cls(
            labels=largest["labels"],
            bytes_per_sample=largest["disk_bytes"] / largest["samples"],
            read=read,
            write=write,
            fill=largest["fill_seconds"] / (2 * largest["samples"]),
            rows=exchange["rows"],
            step=exchange["step_seconds"],
            told_bytes=few["bytes_sent_per_step"] / exchange["rows"],
            told_seconds=(many[name] - few[name]) / 1e3 / samples,
        )

    def told(self, ranks: int) -> int:
        """Samples of other nodes that a node hears of in a step."""
        return max(ranks - PER_NODE, 0) * self.rows

    def writer(self, ranks: int) -> float:
        """Seconds of a step in which a node's file is written with what other nodes learnt."""
        return self.told(ranks) * self.told_seconds


def tables(folder: Path = FOLDER) -> str:
    """By samples and by ranks, and what breaks first; empty where the results are not there."""
    stores = [json.loads(path.read_text()) for path in sorted(folder.glob("store*.json"))]
    if len({x["samples"] for x in stores}) < 2 or not (folder / "exchange.json").exists():
        return ""
    found = Measured.of(stores, json.loads((folder / "exchange.json").read_text()))
    return f"{by_samples(found)}\n\n{by_ranks(found)}\n\n{first_to_break(found)}\n"


def by_samples(found: Measured) -> str:
    lines = [
        f"| samples of {found.labels} labels | file on each node | read a batch of 64 | write it | references stored |",
        "|---|---|---|---|---|",
    ]
    for n in SAMPLES:
        size, filled = n * found.bytes_per_sample / 1e9, n * found.fill
        lines.append(
            f"| 10^{log10(n):.0f} | {size:,.3g} GB | {found.read(n):.2f} ms | {found.write(n):.2f} ms | "
            f"{_time(filled)} |"
        )
    return "\n".join(lines)


def by_ranks(found: Measured) -> str:
    lines = [
        "| ranks | nodes | samples told to a node, per step | received by a rank | a node's writer, share of a step |",
        "|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        received = max(ranks - 1, 0) * found.rows * found.told_bytes
        lines.append(
            f"| {ranks:,} | {-(-ranks // PER_NODE)} | {found.told(ranks):,} | {received / 1e6:.2g} MB | "
            f"{found.writer(ranks) / found.step:.1%} |"
        )
    return "\n".join(lines)


def first_to_break(found: Measured) -> str:
    """The number of ranks from which on storing what others learnt is no longer cheap."""
    ranks = PER_NODE + int(TOO_MUCH * found.step / (found.told_seconds * found.rows))
    return (
        f"With steps of {found.step:g} s and {found.rows} new samples per rank, a node's one writer takes "
        f"{TOO_MUCH:.0%} of a step from {ranks:,} ranks on."
    )


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2g} s"
        if seconds < 90
        else f"{seconds / 60:.2g} min"
        if seconds < 5400
        else (f"{seconds / 3600:.2g} h")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    print(tables(parser.parse_args().folder))


if __name__ == "__main__":
    main()
