"""Who takes over what of other ranks' records."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, BackendConfig

from regate.memory import sharing
from regate.memory.files import TABLES
from regate.memory.sharing import Exchange, _Flight, _Message, _Packed
from regate.memory.store import Store
from regate.ranks import told_on


@pytest.mark.parametrize("homes", ["aabb", "abab", "abc", "aaab", "aaa"])
def test_ranks_of_one_file_take_over_a_part_each(homes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together all that other files have, and nothing twice: a file has one writer at a time."""
    made = [{f"{rank}{i}".encode().ljust(16): np.ones(2, np.float32) for i in range(3)} for rank in range(len(homes))]
    messages = [_Message((home,), {t: _Packed.of(made[i] if t == "difficulty" else {}) for t in TABLES})
                for i, home in enumerate(homes)]  # fmt: skip
    taken: dict[str, list[bytes]] = {home: [] for home in homes}
    for rank, home in enumerate(homes):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        with Store() as store:
            exchange: Any = Exchange(store)
            thread = threading.Thread(target=lambda: None)
            thread.start()
            exchange._flight = _Flight(thread, received=messages)
            exchange._land()
            taken[home] += [key for key, _ in store.items("difficulty")]
            assert exchange._one_file == (len(set(homes)) == 1)
    for home, keys in taken.items():
        expected = sorted(key for i, of in enumerate(homes) if of != home for key in made[i])
        assert sorted(keys) == expected


def test_another_store_may_be_a_file_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "ranks", lambda: 2)
    with Store() as shared, Store() as own:
        exchange: Any = Exchange(shared)
        exchange._one_file = True
        assert not exchange.needed
        exchange.use(own)
        assert exchange.needed


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("nccl", "cuda"),
        ("cuda:nccl", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cuda:nccl,cpu:gloo", "cpu"),
        ("gloo", "cpu"),
    ],
)
def test_ranks_speak_by_tensors_that_a_backend_serves(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_backend_config", lambda: str(BackendConfig(Backend(backend))))
    assert told_on() == device
