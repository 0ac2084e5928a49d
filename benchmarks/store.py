"""What the store costs at scale: disk, memory, and time per batch.

    python -m benchmarks.store --samples 1000000 --labels 100 --out benchmarks/results/store.json

Fills both tables, then goes through the samples in random order as training does: per batch, read the references and
the difficulties, write the difficulties back. `--in-order` fills in the order of keys: pages are full then instead of
two thirds full, and each is written once, without which 10^8 samples take hours. With `--path` the filled store stays,
and the same command goes on with it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np
from tqdm import tqdm

from benchmarks.machine import described, write
from regate.memory.files import Table
from regate.memory.store import Store

LOSSES: tuple[Table, ...] = ("reference", "difficulty")  # the tables with a number per label


def key(number: int) -> bytes:
    return int(number).to_bytes(16, "big")


def memory() -> dict[str, int]:
    """Resident bytes of this process: anonymous, and file-backed, which the kernel may drop for others."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssFile")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--labels", type=int, default=100, help="labels per sample")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, help="to read and write; default one epoch")
    parser.add_argument("--in-order", action="store_true", help="fill in the order of keys")
    parser.add_argument("--path", help="where to make the store; default a temporary directory")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**64, args.samples, dtype=np.uint64)  # of samples, as far apart as hashes are
    if args.in_order:
        numbers.sort()
    batches = args.batches or -(-args.samples // args.batch)
    if batches * args.batch < args.samples:
        order = rng.integers(0, args.samples, batches * args.batch)
    else:
        order = rng.permutation(args.samples)
    before = memory()
    peak = dict(before)

    def watch() -> None:
        for name, value in memory().items():
            peak[name] = max(peak[name], value)

    with tempfile.TemporaryDirectory() as scratch, Store(args.path or scratch) as store:
        records = {store.count(table) for table in LOSSES}
        if records not in ({0}, {args.samples}):
            parser.error(f"{store.path} has records of another run; give --path an empty directory")
        filled, start, chunk = 0 not in records, time.perf_counter(), 1_000
        for first in tqdm(range(0, 0 if filled else args.samples, chunk), desc="fill", unit="batch", disable=None):
            some = numbers[first : first + chunk]
            losses = rng.standard_exponential((len(some), args.labels), dtype=np.float32)
            records = {key(number): row for number, row in zip(some, losses, strict=True)}
            for table in LOSSES:
                store.put(table, records)
            watch()
        store.flush()
        fill_seconds = time.perf_counter() - start

        get_seconds, put_seconds = [], []
        for first in tqdm(range(0, len(order), args.batch), desc="train", unit="batch", disable=None):
            keys = [key(number) for number in numbers[order[first : first + args.batch]]]
            t0 = time.perf_counter()
            references, difficulties = store.get("reference", keys), store.get("difficulty", keys)
            t1 = time.perf_counter()
            new = {
                k: np.float32(0.9) * old + np.float32(0.1) * loss
                for k, old, loss in zip(keys, difficulties, references, strict=True)
                if old is not None and loss is not None
            }
            t2 = time.perf_counter()
            store.put("difficulty", new)
            t3 = time.perf_counter()
            get_seconds.append(t1 - t0)
            put_seconds.append(t3 - t2)
            if first // args.batch % 100 == 0:
                watch()
        watch()
        start = time.perf_counter()
        store.flush()
        flush_seconds = time.perf_counter() - start
        stats = store.stats()

    def microseconds(seconds: list[float]) -> dict[str, float]:
        quantiles = {"median": 0.5, "p99": 0.99}
        found = {name: float(np.quantile(seconds, q)) for name, q in quantiles.items()}
        return {name: round(s * 1e6, 1) for name, s in {"mean": float(np.mean(seconds)), **found}.items()}

    result = {
        **described("benchmarks.store", "lmdb"),
        "liblmdb": ".".join(map(str, lmdb.version())),
        "samples": args.samples,
        "labels": args.labels,
        "batch": args.batch,
        "batches": batches,
        "filled": "in the order of keys" if args.in_order else "in random order",
        "records": {table: stats[table] for table in LOSSES},
        "disk_bytes": stats["bytes"],
        "resident_bytes_at_start": before,
        "resident_bytes_peak": peak,
        "resident_bytes_added": {name: peak[name] - before[name] for name in peak},
        "fill_seconds": None if filled else round(fill_seconds, 1),
        "flush_seconds_after_epoch": round(flush_seconds, 3),
        "microseconds_per_batch": {
            "get_both_tables": microseconds(get_seconds),
            "put": microseconds(put_seconds),
        },
    }
    print(json.dumps(result, indent=2))
    if args.out is not None:
        write(result, args.out)


if __name__ == "__main__":
    main()
