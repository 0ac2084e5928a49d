"""The store: what goes in comes out, of one teacher; temporary ones go."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest

from regate.errors import StoreError, StoreMismatchError
from regate.memory.files import FORMAT, TABLES, Table
from regate.memory.store import Store
from tests.stores import fill, intact, key, losses, run, same

TEACHER = {"teacher": "tiny", "tokenizer": "abc", "padding": "right"}


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


def test_a_table_is_replaced_whole() -> None:
    with Store() as store:
        store.put("difficulty", {key(0): losses(0), key(1): losses(1)})
        store.replace("difficulty", {key(1): losses(2)})
        with pytest.raises(StoreError, match="not finite"):
            store.replace("difficulty", {key(0): np.array([np.nan], np.float32)})
        (found,) = store.items("difficulty")
        assert found[0] == key(1)
        assert same(found[1], losses(2))


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


def test_a_store_of_before_settings_were_told(store: Store, tmp_path: Path) -> None:
    """Those of the first teacher that tells them are its own; a store without them may be copied into one with."""
    old, now = {"weights": "a"}, {"weights": "a", "settings": '{"rms_norm_eps": 1e-06, "rope_theta": 10000.0}'}
    other = now | {"settings": '{"rms_norm_eps": 1e-06, "rope_theta": 500.0}'}
    store.bind(old)
    store.copy_references(tmp_path / "copy").bind(other)
    store.bind(now)
    store.bind(old)
    with pytest.raises(StoreMismatchError, match=r"\(rope_theta: stored 10000\.0, now 500\.0\)"):
        store.bind(other)
    with pytest.raises(StoreMismatchError, match=r"\(tokenizers: stored None, now 'b'\)"):
        store.bind(now | {"tokenizers": "b"})
    Store(tmp_path / "first").bind(old)
    Store(tmp_path / "first").copy_references(store.path)


def test_references_are_copied_and_nothing_else(store: Store, tmp_path: Path) -> None:
    store.bind(TEACHER)
    fill(store, 3000)
    store.put("difficulty", {key(0): losses(0)})
    with store.copy_references(tmp_path / "another") as copied:
        assert intact(copied, 3000)
        assert copied.count("difficulty") == 0
        copied.put("difficulty", {key(0): losses(1)})
        fill(store, 10, start=3000)
        assert intact(store.copy_references(copied.path), 3010)
        assert same(copied.get("difficulty", [key(0)])[0], losses(1))
        copied.clear("reference")
        copied.bind({"teacher": "huge"})
        with pytest.raises(StoreMismatchError):
            store.copy_references(copied.path)


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
