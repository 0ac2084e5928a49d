"""The store: what goes in comes out, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import pytest

from regate.errors import StoreCorruptError, StoreError, StoreFullError, StoreMismatchError
from regate.memory import files
from regate.memory.files import FORMAT, TABLES, Table
from regate.memory.store import Store

ROOT = Path(__file__).parents[3]
# Another process needs the store alone, not the seconds that importing torch and transformers takes.
STORE_ALONE = """
import sys, types
for name in ("regate", "regate_patch"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name]
from regate.errors import StoreFullError
from regate.memory.store import Store
from tests.regate.memory.test_store import fill, intact, key, losses
"""
TEACHER = {"teacher": "tiny", "tokenizer": "abc", "padding": "right"}


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


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "made" / "on" / "the" / "way") as store:
        yield store


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `script` with the store imported."""
    command = [sys.executable, "-c", STORE_ALONE + script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run(script: str, *arguments: object) -> str:
    """What such a process prints."""
    process = start(script, *arguments)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    return printed


# -- records --------------------------------------------------------------------------------------------


def test_round_trip(store: Store) -> None:
    records = {key(n): losses(n, labels=n * 37) for n in range(60)}  # none, few, and more than a page of labels
    store.put("difficulty", records)
    found = store.get("difficulty", [*records, key(999), key(3)])
    assert found[60] is None
    for got, want in zip([*found[:60], found[61]], [*records.values(), records[key(3)]], strict=True):
        assert got is not None
        assert got.dtype == np.float32
        assert got.flags.writeable
        assert np.array_equal(got, want)
    assert dict(store.items("difficulty")).keys() == records.keys()
    assert (store.count("reference"), store.count("difficulty")) == (0, 60)


def test_a_path_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/losses").path == tmp_path / "losses"


def test_missing_lists_each_key_once_in_order(store: Store) -> None:
    fill(store, 3)
    assert store.missing("reference", [key(9), key(1), key(5), key(9), key(0)]) == [key(9), key(5)]


@pytest.mark.parametrize("table", TABLES)
def test_reference_is_written_once_and_difficulty_each_time(store: Store, table: Table) -> None:
    old, new, other = losses(1), losses(2, labels=60), losses(3)
    store.put(table, {key(0): old})
    store.put(table, {key(0): new, key(1): other})
    first, second = store.get(table, [key(0), key(1)])
    assert same(first, old if table == "reference" else new)
    assert same(second, other)


def test_files_of_before_turns_were_owed(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=3) as env, env.begin(write=True) as txn:
        env_tables = {name: env.open_db(name, txn=txn) for name in (b"meta", b"reference", b"difficulty")}
        txn.put(b"format", FORMAT, db=env_tables[b"meta"])
        txn.put(key(0), np.array([1.5], "<f2").tobytes(), db=env_tables[b"reference"])
    with Store(tmp_path) as store:
        store.put("owed", {key(0): np.array([-3.0], np.float32)})
        assert [float(store.get(table, [key(0)])[0][0]) for table in ("reference", "owed")] == [1.5, -3.0]


def test_large_losses_saturate(store: Store) -> None:
    store.put("reference", {key(0): np.array([1e9, -1e9, 65504], np.float32)})
    assert same(store.get("reference", [key(0)])[0], np.array([65504, -65504, 65504], np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_is_stored_when_a_loss_is_not_finite(store: Store, value: float) -> None:
    with pytest.raises(StoreError, match=key(1).hex()):
        store.put("reference", {key(0): losses(0), key(1): np.array([0, value], np.float32)})
    assert store.count("reference") == 0


def test_stats_and_clear(store: Store) -> None:
    fill(store, 500)
    store.put("difficulty", {key(0): losses(0)})
    stats = store.stats()
    assert (stats["reference"], stats["difficulty"]) == (500, 1)
    assert 100_000 < stats["bytes"] < 1_000_000
    store.clear("reference")
    assert (store.count("reference"), store.count("difficulty")) == (0, 1)


# -- whose references -----------------------------------------------------------------------------------


def test_references_belong_to_one_teacher(store: Store) -> None:
    store.bind(TEACHER)
    store.bind(dict(reversed(TEACHER.items())))
    fill(store, 1)
    with pytest.raises(StoreMismatchError) as refusal:
        store.bind({"teacher": "huge", "tokenizer": "abc", "template": "chat"})
    for words in (
        "teacher: stored 'tiny', now 'huge'",
        "padding: stored 'right', now None",
        "template: stored None, now 'chat'",
        str(store.path),
        "clear('reference')",
    ):
        assert words in str(refusal.value)
    assert "tokenizer:" not in str(refusal.value)
    store.clear("reference")
    store.bind({"teacher": "huge"})


# -- damaged, foreign and full --------------------------------------------------------------------------


def _garbage(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(50_000))


def _cut(file: Path) -> None:
    with Store(file.parent) as store:
        fill(store, 1000)
    os.truncate(file, file.stat().st_size // 2)


def _cut_to_a_few_bytes(file: Path) -> None:
    _cut(file)
    os.truncate(file, 1000)


def _foreign(file: Path) -> None:
    with lmdb.open(str(file.parent), max_dbs=2) as env, env.begin(write=True) as txn:
        txn.put(b"theirs", b"precious")


def _foreign_with_a_table_of_that_name(file: Path) -> None:
    with lmdb.open(str(file.parent), max_dbs=2) as env, env.begin(write=True) as txn:
        txn.put(b"theirs", b"precious", db=env.open_db(b"meta", txn=txn))


def _another_format(file: Path) -> None:
    with Store(file.parent):
        pass
    with lmdb.open(str(file.parent), max_dbs=3) as env, env.begin(write=True) as txn:
        txn.put(b"format", b"regate-store-99", db=env.open_db(b"meta", txn=txn))


@pytest.mark.parametrize(
    "spoil",
    [_garbage, _cut, _cut_to_a_few_bytes, _foreign, _foreign_with_a_table_of_that_name, _another_format],
)
def test_what_is_not_a_store_is_refused_and_left_alone(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "data.mdb"
    spoil(file)
    before = file.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreCorruptError, match="use another path") as refusal:
            Store(tmp_path)
        assert str(tmp_path) in str(refusal.value)
    assert file.read_bytes() == before


def test_a_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        Store(tmp_path / "file")


_READ_ONLY = """
import os
from regate.errors import StoreError
if os.geteuid() == 0:  # root may write everywhere
    os.seteuid(65534)
try:
    Store(sys.argv[1])
except StoreError as error:
    print(error)
"""


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    said = run(_READ_ONLY, tmp_path)
    assert str(tmp_path) in said
    assert "Permission denied" in said


def test_a_map_that_is_full(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=200_000) as store:
        fill(store, 100)
        with pytest.raises(StoreFullError, match="max_bytes=200000"):
            fill(store, 5000, start=100)
        assert store.count("reference") == 100
        with Store(tmp_path, max_bytes=10_000_000) as larger:
            fill(larger, 5000, start=100)
        assert intact(store, 5100)


_FULL_DISK = """
import resource

with Store(sys.argv[1]) as store:
    fill(store, 500)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    for _ in range(2):
        try:
            fill(store, 5000, start=500)
        except StoreFullError as error:
            assert sys.argv[1] in str(error) and "MiB free" in str(error), error
        else:
            sys.exit("the write went through")
    assert store.count("reference") == 500 and intact(store, 500)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    fill(store, 5000, start=500)
    assert intact(store, 5500)
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """The operating system refuses to let the file grow; when it no longer does, the store goes on."""
    run(_FULL_DISK, tmp_path)


# -- processes ------------------------------------------------------------------------------------------


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
            said = writer.communicate(timeout=60)[0].split("\n")
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


# -- temporary stores -----------------------------------------------------------------------------------


def test_a_temporary_store_goes_when_closed() -> None:
    with Store() as store:
        fill(store, 1)
        pickle.loads(pickle.dumps(store)).close()  # a copy does not own the files
        child = os.fork()
        if child == 0:
            store.close()  # nor does a child
            os._exit(0)
        os.waitpid(child, 0)
        assert intact(store, 1)
    assert not store.path.exists()
    store.close()


def test_a_temporary_store_goes_at_exit() -> None:
    path = run("store = Store(); store.flush(); print(store.path)").strip()
    assert path
    assert not Path(path).exists()


def test_a_store_on_disk_stays(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        fill(store, 10)
        store.flush()
    with Store(str(tmp_path)) as store:
        assert intact(store, 10)


def test_a_table_is_replaced_whole() -> None:
    with Store() as store:
        store.put("difficulty", {key(0): losses(0), key(1): losses(1)})
        store.replace("difficulty", {key(1): losses(2)})
        with pytest.raises(StoreError, match="not finite"):
            store.replace("difficulty", {key(0): np.array([np.nan], np.float32)})
        (found,) = store.items("difficulty")
        assert found[0] == key(1)
        assert same(found[1], losses(2))
