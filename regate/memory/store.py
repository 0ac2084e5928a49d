"""Where per-label losses are kept: an embedded, memory-mapped, crash-safe table that processes share.

LMDB, because it is one file that any number of processes of a node map at once, its copy-on-write pages make
a killed writer harmless, reads cost one page lookup, and it needs no server. SQLite does the same at several
times the cost per small record; plain files have no transactions. Like every memory-mapped file it belongs on
a local disk, not on a network share that several nodes write.

Records (16-byte keys, values are little-endian float16 arrays, [n_labels]):
    reference    the teacher's losses. Written once; a key that exists is never overwritten.
    difficulty   the student's moving averages. Rewritten as training goes.
    owed         one number, the full turns that a sample is owed (`regate.scoring.turns`). Rewritten, too.
                 These two are what one run learns: runs that share a path take turns (`claim`).
    meta         format version; the fingerprint of the teacher that made the references.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from filelock import BaseFileLock, FileLock, Timeout

from regate.errors import StoreError, StoreInUseError, StoreMismatchError
from regate.memory.files import TABLES, Files, Table, explained

GONE = (
    "the store at {path} was moved or deleted while it was open ({error}): what this process stores goes to the files "
    "that it opened, and if they were deleted, it ends with the process. Move them back, or give another store "
    "(gate.store = regate.Store(...))"
)
_LATER = "settings"  # of fingerprints: stores that were made earlier have none
_HALF = np.dtype("<f2")
_HALF_MAX = float(np.finfo(np.float16).max)
_COPIED_AT_ONCE = 1024  # records
IN_USE = (
    "a run of another process learns into the store at {path}, and each would go by the other's difficulties. End it "
    "(gate.remove(), where its loop is over), or give this run a store of its own: "
    "regate.Store({path!r}).copy_references('ANOTHER') makes one with the same reference losses"
)


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
        StoreError: the path cannot be created, opened or written, or is none.

    Example:
        >>> with Store() as store:
        ...     store.put("reference", {b"0" * 16: np.array([0.5, 2.0], np.float32)})
        ...     store.get("reference", [b"0" * 16, b"1" * 16])
        [array([0.5, 2. ], dtype=float32), None]
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, max_bytes: int = 1 << 40) -> None:
        if path is not None and (not isinstance(path, str | os.PathLike) or not str(path)):
            raise StoreError(
                f"a store's path is the name of a directory, as text or a pathlib.Path, or None for a temporary store; "
                f"got {path!r}"
            )
        self.temporary = path is None
        self.max_bytes = max_bytes
        if path is None:
            path = tempfile.mkdtemp(prefix="regate-")
            self._remove = weakref.finalize(self, _remove_own, path, os.getpid())
        self.path = Path(path).expanduser().absolute()
        self._files: Files | None = Files.at(self.path, max_bytes)

    @contextmanager
    def _transaction(self, *, write: bool = False, records: int = 0) -> Iterator[tuple[lmdb.Transaction, Files]]:
        """See `Files.transaction`."""
        if self._files is None:
            raise StoreError(f"the store at {self.path} is closed; open it again with Store(path)")
        if self._files.pid != os.getpid():  # LMDB environments must not be used across a fork
            self._files = Files.at(self.path, self.max_bytes)
        with explained(self.path, self.max_bytes), self._files.transaction(write=write, records=records) as txn:
            yield txn, self._files

    # -- records ----------------------------------------------------------------------------------------

    def get(self, table: Table, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """The records of `keys` as float32 copies [n_labels], None where there is none."""
        with self._transaction(records=len(keys)) as (txn, files):
            found = (txn.get(key, db=files.tables[table]) for key in keys)
            return [None if v is None else np.frombuffer(v, _HALF).astype(np.float32) for v in found]

    def missing(self, table: Table, keys: Sequence[bytes]) -> list[bytes]:
        """Those of `keys` that have no record, each once, in order."""
        with self._transaction(records=len(keys)) as (txn, files):
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
        self._write(table, records, anew=False)

    def replace(self, table: Table, records: Mapping[bytes, np.ndarray]) -> None:
        """Store records as `put` does, in place of all that the table has, in the same transaction."""
        self._write(table, records, anew=True)

    def _write(self, table: Table, records: Mapping[bytes, np.ndarray], *, anew: bool) -> None:
        keys = sorted(records)  # in the order of the pages they go to
        losses = [records[key] for key in keys]
        if keys and not np.isfinite(np.concatenate(losses)).all():
            bad = next(key for key, of_sample in zip(keys, losses, strict=True) if not np.isfinite(of_sample).all())
            raise StoreError(f"losses of sample {bad.hex()} are not finite; they are not stored")
        encoded = [(key, half(of_sample).tobytes()) for key, of_sample in zip(keys, losses, strict=True)]
        with self._transaction(write=True, records=len(keys)) as (txn, files):
            if anew:
                txn.drop(files.tables[table], delete=False)
            with txn.cursor(db=files.tables[table]) as cursor:
                cursor.putmulti(encoded, overwrite=table != "reference")

    def items(self, table: Table) -> Iterator[tuple[bytes, np.ndarray]]:
        """Every (key, float32 losses [n_labels]) of a table, as it was when the iteration began."""
        with self._transaction(records=self.count(table)) as (txn, files), txn.cursor(db=files.tables[table]) as cursor:
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

        Of a store that knows no settings of its teacher, for it was made before these were told, they are those of now.

        Raises:
            StoreMismatchError: another teacher, tokenizer or padding rule made the stored references.
        """
        with self._transaction(write=True) as (txn, files):
            stored = _fingerprint(txn, files) or {}
            differing = differences(stored, fingerprint) if stored else []
            whole = {**fingerprint, **stored}
            if not differing and whole != stored:
                txn.put(b"fingerprint", json.dumps(whole, sort_keys=True).encode(), db=files.meta)
        if differing:
            raise StoreMismatchError(
                f"the reference losses at {self.path} were made by another teacher "
                f"({'; '.join(differing)}). Use another path, or Store(path).clear('reference') to make "
                "them again."
            )

    # -- whose difficulties -----------------------------------------------------------------------------

    def claim(self) -> BaseFileLock:
        """Let runs of this process alone learn into this store, until the lock is released or the process ends.

        Raises:
            StoreInUseError: a run of another process does at the moment.
        """
        lock = FileLock(self.path.resolve() / "run.lock", is_singleton=True, thread_local=False)
        with explained(self.path, self.max_bytes):
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise StoreInUseError(IN_USE.format(path=str(self.path))) from error
        return lock

    def copy_references(self, path: str | os.PathLike[str]) -> Store:
        """The store at `path`, made if missing, with this one's reference losses beside what it has.

        Raises:
            StoreMismatchError: it has those of another teacher.
        """
        to = Store(path, max_bytes=self.max_bytes)
        with self._transaction() as (txn, files):
            fingerprint = _fingerprint(txn, files)
        if fingerprint is not None:
            to.bind(fingerprint)
        records = self.items("reference")
        while some := dict(islice(records, _COPIED_AT_ONCE)):
            to.put("reference", some)
        return to

    # -- life -------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Records per table ("reference", "difficulty", "owed") and "bytes" on disk.

        Raises:
            StoreError: the files were moved or deleted since they were opened.
        """
        counts: dict[str, int] = {name: self.count(name) for name in TABLES}
        return {**counts, "bytes": self.data().st_blocks * 512}

    def data(self) -> os.stat_result:
        """Of the file that has the records.

        Raises:
            StoreError: it is at the path no more.
        """
        try:
            return (self.path / "data.mdb").stat()
        except OSError as error:
            raise StoreError(GONE.format(path=self.path, error=error)) from error

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
        self._files = Files.at(self.path, self.max_bytes)


def differences(stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In what two teachers differ by their fingerprints, in words."""
    both = _LATER in stored and _LATER in now
    was, told = _each(stored, settings=both), _each(now, settings=both)
    return [
        f"{name}: stored {was.get(name)!r}, now {told.get(name)!r}"
        for name in sorted({*was, *told})
        if was.get(name) != told.get(name)
    ]


def _each(fingerprint: Mapping[str, str], *, settings: bool) -> dict[str, Any]:
    """Its entries, and each of the settings by itself, lest one be looked for in many."""
    entries: dict[str, Any] = {name: value for name, value in fingerprint.items() if name != _LATER}
    return entries | (json.loads(fingerprint[_LATER]) if settings else {})


def _fingerprint(txn: lmdb.Transaction, files: Files) -> dict[str, str] | None:
    stored = txn.get(b"fingerprint", db=files.meta)
    return None if stored is None else json.loads(bytes(stored))


def _remove_own(directory: str, pid: int) -> None:
    if os.getpid() == pid:  # not from a forked child's exit
        shutil.rmtree(directory, ignore_errors=True)
