"""A process's open files of one store, and what goes wrong with them in words."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import lmdb

from regate.errors import StoreCorruptError, StoreError, StoreFullError

Table = Literal["reference", "difficulty", "owed"]
TABLES: tuple[Table, ...] = get_args(Table)
FORMAT = b"regate-store-1"
KEY_BYTES = 16
SMALL = 2**28  # bytes of a file that may stay mapped as it is
LOOKS = 2**11  # records of a larger one that are looked at before it is mapped anew; each brings its neighbours along
PATIENCE = 8  # times as many may be, where nothing is written
_DAMAGED = (
    lmdb.BadTxnError,  # a transaction goes on behind a page that was found damaged
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.NotFoundError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)
# A write that the disk could only take in part is an I/O error to LMDB.
_NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


class Files:
    """LMDB allows a process one environment per path, so stores of one path share it.

    What is looked at of a mapped file counts as the process's memory, as `top` tells it, until the kernel wants it
    back: in the end the whole file. So a large one is mapped anew now and then, by which nothing is lost, nor read
    again from the disk. It takes milliseconds, so it is done before a write, for which nobody waits, if there is one.
    """

    @staticmethod
    def at(path: Path, max_bytes: int) -> Files:
        """The open files of `path`: those the process has already, or new ones."""
        data = path / "data.mdb"
        with explained(path, max_bytes):
            path.mkdir(parents=True, exist_ok=True)
            files = _OPEN.get(_identity(data)) if data.exists() else None
            if files is not None and files.pid != os.getpid():  # inherited through a fork
                files.env.close()
                files = None
            if files is None:
                files = Files(path, max_bytes)
                _OPEN[_identity(data)] = files
            elif files.env.info()["map_size"] < max_bytes:
                files.env.set_mapsize(max_bytes)
            return files

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._running = self._seen = 0  # transactions; records looked at since the file was mapped
        # No fsync per commit. A killed process loses nothing by that: what it committed is in the page cache,
        # and a commit it did not finish left the pages of the one before alone. Losing power is another
        # matter: the file is then sure to be whole only as of a `flush` that nothing was written after.
        self.env = lmdb.open(str(path), map_size=max_bytes, max_dbs=4, max_readers=1024, sync=False, readahead=False)
        try:
            self.env.reader_check()  # a reader killed while reading would keep old pages from being reused
            self._check_length(path)
            self._open_tables(path)
        except BaseException:
            self.env.close()
            raise

    def _check_length(self, path: Path) -> None:
        """LMDB maps a file that was cut off without complaint, and reading past its end kills the process."""
        needed = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        size = (path / "data.mdb").stat().st_size
        if size < needed:
            raise StoreCorruptError(_corrupt(path, f"the file is cut off at {size} of {needed} bytes"))

    def _open_tables(self, path: Path) -> None:
        """Open the tables, or make all of them if the file is new; in a file of someone else, make none."""
        with self._begin(write=True) as txn:
            new = txn.stat()["entries"] == 0
            self.meta = self.env.open_db(b"meta", txn=txn, create=new)
            if new:
                txn.put(b"format", FORMAT, db=self.meta)
            version = bytes(txn.get(b"format", b"", db=self.meta))
            if version != FORMAT:
                raise StoreCorruptError(_corrupt(path, f"its format is {version!r}, not {FORMAT!r}"))
            # Files of before there was "owed" get it; the two others are there, or something is wrong.
            make = {name: new or name == "owed" for name in TABLES}
            self.tables = {name: self.env.open_db(name.encode(), txn=txn, create=make[name]) for name in TABLES}

    @contextmanager
    def transaction(self, *, write: bool, records: int) -> Iterator[lmdb.Transaction]:
        """All of the block's changes, or, if it raises or the process dies, none of them.

        `records` is how many it is about to look at.
        """
        with self._lock:
            self._let_go(LOOKS if write else PATIENCE * LOOKS)
            self._running += 1
            self._seen += records
        try:
            with self._begin(write=write) as txn:
                yield txn
        finally:
            with self._lock:
                self._running -= 1

    def _let_go(self, looks: int) -> None:
        if self._seen < looks or self._running:  # a transaction's values lie in what is mapped
            return
        self._seen, info = 0, self.env.info()
        if info["last_pgno"] * self.env.stat()["psize"] > SMALL:
            self.env.set_mapsize(info["map_size"])

    def _begin(self, *, write: bool) -> lmdb.Transaction:
        try:
            return self.env.begin(write=write, buffers=True)
        except lmdb.MapResizedError:  # another process opened the path with a larger max_bytes, and used it
            self.env.set_mapsize(0)
            return self.env.begin(write=write, buffers=True)


_OPEN: weakref.WeakValueDictionary[tuple[int, int], Files] = weakref.WeakValueDictionary()


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _corrupt(path: Path, error: object) -> str:
    return (
        f"{path} is not a readable store ({error}); nothing was changed. Move it away, or use another path; "
        "reference losses can be computed again."
    )


@contextmanager
def explained(path: Path, max_bytes: int) -> Iterator[None]:
    """Turn errors of LMDB and of the file system into the store's."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreFullError(
            f"the store at {path} reached its max_bytes={max_bytes}; open it with a larger one. "
            "What was stored before is intact."
        ) from error
    except _DAMAGED as error:
        raise StoreCorruptError(_corrupt(path, error)) from error
    except (lmdb.Error, OSError) as error:
        if isinstance(error, lmdb.DiskError) or any(reason in str(error) for reason in _NO_ROOM):
            free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
            raise StoreFullError(
                f"cannot write to the store at {path}: {error} ({free / 2**20:.0f} MiB free). Make room "
                "on the disk or raise its limits and go on; what was stored before is intact."
            ) from error
        raise StoreError(f"cannot use the store at {path}: {error}; give a directory that can be written to") from error
