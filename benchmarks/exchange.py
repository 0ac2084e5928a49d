"""What ranks pay to tell each other their reference losses and difficulties.

    python -m benchmarks.exchange --ranks 4 16 --out benchmarks/results/exchange.json

Each rank is a process with a store of its own, as on a node of its own, and the ranks talk over gloo. A step stores
the records of its batch and then waits, as a host waits for its GPU; what is timed is everything the exchange adds to
the training thread, by the clock and by the processor: where ranks are more than cores, they wait for each other, and
only the second says what a rank with a core of its own pays. The first epoch is the dearest: reference losses are new,
too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.machine import described, write
from regate.memory.files import Table
from regate.memory.sharing import Exchange
from regate.memory.store import Store

LOSSES: tuple[Table, ...] = ("reference", "difficulty")  # the tables with a number per label


def records(rank: int, step: int, rows: int, labels: int) -> dict[bytes, np.ndarray]:
    """Losses [labels] of the samples of one batch; every step and rank has samples of its own."""
    rng = np.random.default_rng((rank, step))
    names = (hashlib.blake2b(f"{rank} {step} {row}".encode(), digest_size=16).digest() for row in range(rows))
    return {name: rng.exponential(1.0, labels).astype(np.float32) for name in names}


def run(rank: int, ranks: int, port: int, folder: str, args: argparse.Namespace) -> None:
    """One rank; rank 0 writes what it measured."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    spent, busy = [], 0.0
    with Store(f"{folder}/store{rank}") as store:
        exchange = Exchange(store)
        for step in range(args.steps):
            new = records(rank, step, args.rows, args.labels)
            for table in LOSSES:
                store.put(table, new)
            start, busy_before = time.perf_counter(), time.thread_time()
            for table in LOSSES:
                exchange.add(table, new)
            exchange.tick(step)
            spent.append(time.perf_counter() - start)
            busy += time.thread_time() - busy_before
            time.sleep(args.step_seconds)
            dist.barrier()  # as the reduction of gradients does
        exchange.finish()
        counts = [store.count(table) for table in LOSSES]
    assert counts == [ranks * args.steps * args.rows] * len(LOSSES), counts
    if rank == 0:
        found = {"spent": spent, "busy": busy, "sent": exchange.bytes_sent, "every": exchange.every}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (ranks, port, folder, args), nprocs=ranks)  # type: ignore[no-untyped-call]
        found = json.loads(Path(folder, "found.json").read_text())
    per_step = sum(found["spent"]) / args.steps
    received = found["sent"] / args.steps * (ranks - 1)
    return {
        "ranks": ranks,
        "milliseconds_per_step": round(per_step * 1e3, 3),
        "milliseconds_per_step_with_a_core_per_rank": round(found["busy"] / args.steps * 1e3, 3),
        "milliseconds_of_the_dearest_step": round(max(found["spent"]) * 1e3, 1),
        "share_of_step": round(per_step / args.step_seconds, 5),
        "bytes_sent_per_step": round(found["sent"] / args.steps),
        "bytes_received_per_step": round(received),
        "megabytes_per_second_received": round(received / args.step_seconds / 1e6, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rows", type=int, default=8, help="samples per rank and step")
    parser.add_argument("--labels", type=int, default=300, help="labels per sample")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--step-seconds", type=float, default=1.0, help="time of one optimizer step without exchange")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    result = {
        **described("benchmarks.exchange", "torch", "lmdb"),
        "rows": args.rows,
        "labels": args.labels,
        "steps": args.steps,
        "step_seconds": args.step_seconds,
        "runs": [measured(ranks, args) for ranks in args.ranks],
    }
    print(json.dumps(result, indent=2))
    if args.out is not None:
        write(result, args.out)


if __name__ == "__main__":
    main()
