"""Where per-label losses are kept: an embedded, memory-mapped, crash-safe table that processes share.

LMDB, because it is one file that any number of processes of a node map at once, its copy-on-write pages make
a killed writer harmless, reads cost one page lookup, and it needs no server. SQLite does the same at several
times the cost per small record; plain files have no transactions. Like every memory-mapped file it belongs on
a local disk, not on a network share that several nodes write.

Records (16-byte keys, values are little-endian float16 arrays, [n_labels]):
    reference    the teacher's losses. Written once; a key that exists is never overwritten.
    difficulty   the student's moving averages. Rewritten as training goes.
    owed         one number, the full turns that a sample is owed (`regate.scoring.turns`). Rewritten, too.
    meta         format version; the fingerprint of the teacher that made the references.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lmdb
import numpy as np

from regate.errors import StoreCorruptError, StoreError, StoreFullError, StoreMismatchError

Table = Literal["reference", "difficulty", "owed"]
TABLES: tuple[Table, ...] = ("reference", "difficulty", "owed")
FORMAT = b"regate-store-1"
_HALF = np.dtype("<f2")
_HALF_MAX = float(np.finfo(np.float16).max)
_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.NotFoundError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)
# A write that the disk could only take in part is an I/O error to LMDB.
_NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


def half(losses: np.ndarray) -> np.ndarray:
    """Losses as they are stored: float16, saturating at its largest value."""
    if losses.dtype == _HALF:
        return losses
    return np.clip(losses, -_HALF_MAX, _HALF_MAX).astype(_HALF)


class Store:
    """Reference losses and difficulties on disk.

    Several processes may open one path; a store that crosses a fork or a pickle opens its files again.

    Args:
        path: a directory, made if missing; None is a temporary store, deleted when closed or at exit.
        max_bytes: largest size of the file. Address space, not disk: the file grows as records come.

    Raises:
        StoreCorruptError: the path holds something else, or damaged files. They are left untouched.
        StoreFullError: no room to make the files.
        StoreError: the path cannot be created, opened or written.

    Example:
        >>> with Store() as store:
        ...     store.put("reference", {b"0" * 16: np.array([0.5, 2.0], np.float32)})
        ...     store.get("reference", [b"0" * 16, b"1" * 16])
        [array([0.5, 2. ], dtype=float32), None]
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, max_bytes: int = 1 << 40) -> None:
        self.temporary = path is None
        self.max_bytes = max_bytes
        if path is None:
            path = tempfile.mkdtemp(prefix="regate-")
            self._remove = weakref.finalize(self, _remove_own, path, os.getpid())
        self.path = Path(path).expanduser().absolute()
        self._files: _Files | None = _Files.at(self.path, max_bytes)

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[tuple[lmdb.Transaction, _Files]]:
        """All of the block's changes, or, if it raises or the process dies, none of them."""
        if self._files is None:
            raise StoreError(f"the store at {self.path} is closed; open it again with Store(path)")
        if self._files.pid != os.getpid():  # LMDB environments must not be used across a fork
            self._files = _Files.at(self.path, self.max_bytes)
        with _explained(self.path, self.max_bytes), self._files.begin(write=write) as txn:
            yield txn, self._files

    # -- records ----------------------------------------------------------------------------------------

    def get(self, table: Table, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """The records of `keys` as float32 copies [n_labels], None where there is none."""
        with self._transaction() as (txn, files):
            found = (txn.get(key, db=files.tables[table]) for key in keys)
            return [None if v is None else np.frombuffer(v, _HALF).astype(np.float32) for v in found]

    def missing(self, table: Table, keys: Sequence[bytes]) -> list[bytes]:
        """Those of `keys` that have no record, each once, in order."""
        with self._transaction() as (txn, files):
            return [key for key in dict.fromkeys(keys) if txn.get(key, db=files.tables[table]) is None]

    def put(self, table: Table, records: Mapping[bytes, np.ndarray]) -> None:
        """Store records in one transaction: all of them, or, if it fails or is killed, none.

        Args:
            table: "reference" keeps what it has under a key, the others replace it.
            records: key to finite losses [n_labels]; stored as float16, saturating at its largest value.

        Raises:
            StoreError: a value is NaN or infinite; nothing is stored.
            StoreFullError: no room; nothing is stored, and what was stored before stays readable.
        """
        encoded = []
        for key in sorted(records):  # in the order of the pages they go to
            losses = records[key]
            if not np.isfinite(losses).all():
                raise StoreError(f"losses of sample {key.hex()} are not finite; they are not stored")
            encoded.append((key, half(losses).tobytes()))
        with self._transaction(write=True) as (txn, files):
            for key, value in encoded:
                txn.put(key, value, db=files.tables[table], overwrite=table != "reference")

    def items(self, table: Table) -> Iterator[tuple[bytes, np.ndarray]]:
        """Every (key, float32 losses [n_labels]) of a table, as it was when the iteration began."""
        with self._transaction() as (txn, files), txn.cursor(db=files.tables[table]) as cursor:
            for key, value in cursor:
                yield bytes(key), np.frombuffer(value, _HALF).astype(np.float32)

    def count(self, table: Table) -> int:
        """Number of records of a table."""
        with self._transaction() as (txn, files):
            return int(txn.stat(files.tables[table])["entries"])

    def clear(self, table: Table) -> None:
        """Forget a table; with "reference" also whose it was. The file keeps its size and reuses the room."""
        with self._transaction(write=True) as (txn, files):
            txn.drop(files.tables[table], delete=False)
            if table == "reference":
                txn.delete(b"fingerprint", db=files.meta)

    # -- whose references -------------------------------------------------------------------------------

    def bind(self, fingerprint: Mapping[str, str]) -> None:
        """Say which teacher the references belong to: the first call writes it, later ones must agree.

        Raises:
            StoreMismatchError: another teacher, tokenizer or padding rule made the stored references.
        """
        wanted = dict(fingerprint)
        with self._transaction(write=True) as (txn, files):
            record = json.dumps(wanted, sort_keys=True).encode()
            txn.put(b"fingerprint", record, db=files.meta, overwrite=False)
            stored = json.loads(bytes(txn.get(b"fingerprint", record, db=files.meta)))
        differences = [
            f"{name}: stored {stored.get(name)!r}, now {wanted.get(name)!r}"
            for name in sorted({*stored, *wanted})
            if stored.get(name) != wanted.get(name)
        ]
        if differences:
            raise StoreMismatchError(
                f"the reference losses at {self.path} were made by another teacher "
                f"({'; '.join(differences)}). Use another path, or Store(path).clear('reference') to make "
                "them again."
            )

    # -- life -------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Records per table ("reference", "difficulty", "owed") and "bytes" on disk."""
        counts: dict[str, int] = {name: self.count(name) for name in TABLES}
        return {**counts, "bytes": (self.path / "data.mdb").stat().st_blocks * 512}

    def flush(self) -> None:
        """Bring everything to the disk itself, against power loss."""
        with self._transaction() as (_, files):
            files.env.sync(True)

    def close(self) -> None:
        """Close the files, unless another store of this process has them too; delete them if temporary."""
        self._files = None
        if self.temporary:
            self._remove()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_bytes": self.max_bytes, "temporary": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = _Files.at(self.path, self.max_bytes)


class _Files:
    """A process's open files of a path. LMDB allows it only one such, so stores of one path share it."""

    @staticmethod
    def at(path: Path, max_bytes: int) -> _Files:
        """The open files of `path`: those the process has already, or new ones."""
        data = path / "data.mdb"
        with _explained(path, max_bytes):
            path.mkdir(parents=True, exist_ok=True)
            files = _OPEN.get(_identity(data)) if data.exists() else None
            if files is not None and files.pid != os.getpid():  # inherited through a fork
                files.env.close()
                files = None
            if files is None:
                files = _Files(path, max_bytes)
                _OPEN[_identity(data)] = files
            elif files.env.info()["map_size"] < max_bytes:
                files.env.set_mapsize(max_bytes)
            return files

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.pid = os.getpid()
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
        with self.begin(write=True) as txn:
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

    def begin(self, *, write: bool) -> lmdb.Transaction:
        try:
            return self.env.begin(write=write, buffers=True)
        except lmdb.MapResizedError:  # another process opened the path with a larger max_bytes, and used it
            self.env.set_mapsize(0)
            return self.env.begin(write=write, buffers=True)


_OPEN: weakref.WeakValueDictionary[tuple[int, int], _Files] = weakref.WeakValueDictionary()


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _remove_own(directory: str, pid: int) -> None:
    if os.getpid() == pid:  # not from a forked child's exit
        shutil.rmtree(directory, ignore_errors=True)


def _corrupt(path: Path, error: object) -> str:
    return (
        f"{path} is not a readable store ({error}); nothing was changed. Move it away, or use another path; "
        "reference losses can be computed again."
    )


@contextmanager
def _explained(path: Path, max_bytes: int) -> Iterator[None]:
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
