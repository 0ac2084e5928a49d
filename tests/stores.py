"""Records that their numbers determine, and processes that have a store and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from regate.memory.store import Store

ROOT = Path(__file__).parents[1]
# Another process needs the store alone, not the seconds that importing torch and transformers takes.
STORE_ALONE = """
import sys, types
for name in ("regate", "regate_patch"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name]
from regate.errors import StoreFullError
from regate.memory.store import Store
from tests.stores import fill, intact, key, losses
"""


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def losses(n: int, labels: int = 100) -> np.ndarray:
    """A record that its number determines, and float16 represents."""
    return np.random.default_rng(n).exponential(1.0, labels).astype(np.float16).astype(np.float32)


def same(got: np.ndarray | None, want: np.ndarray) -> bool:
    return got is not None and np.array_equal(got, want)


def fill(store: Store, count: int, *, start: int = 0) -> None:
    store.put("reference", {key(n): losses(n) for n in range(start, start + count)})


def intact(store: Store, count: int) -> bool:
    found = store.get("reference", [key(n) for n in range(count)])
    return all(same(x, losses(n)) for n, x in enumerate(found))


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `script` with the store imported."""
    command = [sys.executable, "-c", STORE_ALONE + script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(script: str, *arguments: object) -> str:
    """What such a process prints."""
    process = start(script, *arguments)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    return printed
