"""Several processes that train together, and what each of them found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, folder: Path, *, ranks: int = 2, timeout: int = 500) -> list[dict[str, Any]]:
    """Run `python -m module folder` once for each rank, which leaves what it found in `folder/rank0.pt` and so on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=timeout) for process in running] == [0] * ranks
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
