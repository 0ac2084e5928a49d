"""A store among processes: written by several, killed, forked, pickled, and no part of their memory."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from regate.errors import StoreError
from regate.memory import files
from regate.memory.store import Store
from tests.stores import fill, intact, key, losses, run, same, start


def _write_range(store: Store, start: int) -> None:
    for n in range(start, start + 200, 10):
        fill(store, 10, start=n)
        store.put("difficulty", {key(0): losses(start)})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is resident")
def test_a_large_file_does_not_become_the_process_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of it is looked at; and what an iteration still looks at stays where it is."""
    monkeypatch.setattr(files, "SMALL", 2**20)
    monkeypatch.setattr(files, "LOOKS", 8)

    def resident() -> int:
        """Bytes of mapped files."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssFile"].split()[0]) * 1024

    n, one, before, most = 20_000, np.ones(500, np.float32), resident(), 0
    keys = [key(i) for i in np.random.default_rng(0).permutation(n).tolist()]
    with Store() as store:
        for i in range(0, n, 2_000):
            store.put("difficulty", dict.fromkeys(keys[i : i + 2_000], one))
        size = store.stats()["bytes"]
        for i in range(0, n, 64):
            assert all(same(x, one) for x in store.get("difficulty", keys[i : i + 64]))
            most = max(most, resident() - before)
        assert size > 40e6
        assert most < size / 3
        for number, (_, found) in enumerate(store.items("difficulty")):
            if number % 1_000 == 0:
                store.get("difficulty", keys[:64])
            assert found[0] == 1


def test_a_large_file_is_let_go_before_a_write_if_there_is_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads, waits."""
    monkeypatch.setattr(files, "LOOKS", 8)
    fill(store, 8)
    found = files.Files.at(store.path, store.max_bytes)
    found._seen = 0
    for seen in (8, 16, 24):
        store.get("difficulty", [key(n) for n in range(8)])
        assert found._seen == seen
    store.put("difficulty", {key(0): losses(0)})
    assert found._seen == 1


def test_processes_write_one_path_at_once(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_range, args=(store, start)) for start in (0, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert intact(store, 400)
    assert store.count("difficulty") == 1


def test_a_process_with_a_smaller_map_follows_one_with_a_larger(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=200_000) as store:
        run("fill(Store(sys.argv[1], max_bytes=10_000_000), 5000)", tmp_path)
        assert intact(store, 5000)
        fill(store, 1, start=5000)


# Says which record it has committed, after it has: whatever was said must be there when it is killed.
_ENDLESS_WRITER = """
store, n = Store(sys.argv[1]), int(sys.argv[2])
while True:
    store.put("reference", {key(n + i): losses(n + i) for i in range(7)})
    store.put("difficulty", {key(i): losses(n) for i in range(50)})
    n += 7
    print(n, flush=True)
"""


def test_a_writer_killed_at_any_moment_loses_nothing_it_committed(tmp_path: Path) -> None:
    random.seed(0)
    committed = 0
    with Store(tmp_path) as bystander:
        for attempt in range(6):
            writer = start(_ENDLESS_WRITER, tmp_path, committed)
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
            said = writer.stdout.read().split("\n")  # not by `communicate`: behind what `readline` has in its buffer
            writer.wait(60)
            committed = max([committed, *(int(line) for line in said[:-1])])
            assert intact(bystander, committed)
            first, *others = bystander.get("difficulty", [key(i) for i in range(50)])
            assert first is not None
            assert all(same(x, first) for x in others), "half a transaction"
            bystander.put("difficulty", {key(999): losses(attempt)})  # the killed writer's lock is free
            committed = max(committed, bystander.count("reference"))
    with Store(tmp_path) as store:
        assert committed > 4
        assert intact(store, committed)


def test_a_forked_child_opens_the_files_again(store: Store) -> None:
    fill(store, 10)
    child = os.fork()
    if child == 0:
        passed = False
        try:
            fill(store, 10, start=10)
            with Store(store.path) as another:
                passed = intact(another, 20)
            store.close()
        finally:
            os._exit(0 if passed else 1)
    assert os.waitpid(child, 0)[1] == 0
    fill(store, 10, start=20)
    assert intact(store, 30)


def test_a_pickled_store_opens_the_files_again(store: Store) -> None:
    copy = pickle.loads(pickle.dumps(store))
    fill(copy, 10)
    copy.close()
    assert intact(store, 10)
    with pytest.raises(StoreError, match="closed"):
        copy.count("reference")
