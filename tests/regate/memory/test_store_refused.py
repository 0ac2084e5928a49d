"""What is no store, and where none can be: refused, and left as it was."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import lmdb
import pytest

from regate.errors import StoreCorruptError, StoreError, StoreFullError
from regate.memory.store import Store
from tests.stores import fill, intact, run


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


@pytest.mark.parametrize("path", ["", 3, True, b"bytes", ["a"], Store])
def test_what_is_no_path(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"the name of a directory.*got "):
        Store(path)
    assert list(tmp_path.iterdir()) == []


_SPOILT = """
from regate.errors import StoreCorruptError
wrong = []
for number in map(int, sys.argv[2:]):
    try:
        with Store(f"{sys.argv[1]}/{number}") as store:
            list(store.items("reference"))
    except StoreCorruptError as error:
        wrong.append("MDB_BAD_TXN" in str(error))
print(any(wrong))
"""


def test_pages_that_are_garbage(tmp_path: Path) -> None:
    """LMDB names the page, or only that the transaction cannot go on, as it does of a page inside a table."""
    with Store(tmp_path / "whole") as store:
        fill(store, 100)
    pages = (tmp_path / "whole" / "data.mdb").stat().st_size // 4096
    for page in range(2, pages):
        shutil.copytree(tmp_path / "whole", tmp_path / str(page))
        with (tmp_path / str(page) / "data.mdb").open("r+b") as file:
            file.seek(page * 4096)
            file.write(random.Random(page).randbytes(4096))
    assert run(_SPOILT, tmp_path, *range(2, pages)).strip() == "True"


def test_files_that_are_moved_while_they_are_open(tmp_path: Path) -> None:
    with Store(tmp_path / "here") as store:
        fill(store, 3)
        store.path.rename(tmp_path / "there")
        with pytest.raises(StoreError, match=r"was moved or deleted while it was open.*gate\.store = regate\.Store"):
            store.stats()
        assert intact(store, 3)
