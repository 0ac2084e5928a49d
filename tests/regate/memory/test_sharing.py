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
            _arrive(exchange, messages)
            taken[home] += [key for key, _ in store.items("difficulty")]
            assert exchange._one_file == (len(set(homes)) == 1)
    for home, keys in taken.items():
        expected = sorted(key for i, of in enumerate(homes) if of != home for key in made[i])
        assert sorted(keys) == expected


def _arrive(exchange: Any, messages: list[_Message]) -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    exchange._flight = _Flight(thread)
    exchange._flight.arrive(messages)
    exchange._land()


def test_what_a_rank_learnt_since_stays_and_of_several_records_one_is_everybodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met_later, met_by_both, new = (name.ljust(16) for name in (b"met later", b"met by both", b"new"))
    sent: list[dict[bytes, float]] = [{met_later: 5.0, met_by_both: 0.0, new: 0.0}, {met_by_both: 1.0}]
    packed = [_Packed.of({key: np.full(1, x, np.float16) for key, x in of.items()}) for of in sent]
    none = _Packed.of({})
    messages = [_Message((i,), {t: packed[i] if t == "difficulty" else none for t in TABLES}) for i in range(2)]
    monkeypatch.setattr(sharing, "ranks", lambda: 2)
    for rank, expected in ((0, [5.0, 1.0, 0.0]), (1, [2.0, 1.0, 0.0])):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        with Store() as store:
            exchange: Any = Exchange(store)
            own = {key: np.full(1, x, np.float32) for key, x in sent[rank].items()}
            own |= {met_later: np.full(1, 2.0, np.float32)} if rank == 1 else {}  # after its message was sent
            store.put("difficulty", own)
            if rank == 1:
                exchange.add("difficulty", {met_later: own[met_later]})
            _arrive(exchange, messages)
            assert [float(x[0]) for x in store.get("difficulty", [met_later, met_by_both, new])] == expected


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
