"""Where per-label losses are kept: an embedded, memory-mapped, crash-safe table that processes share.

LMDB, because it is one file that any number of processes of a node map at once, its copy-on-write pages make a
killed writer harmless, reads copy nothing, and it needs no server. SQLite does the same at several times the cost
per small record; plain files have no transactions.

Records (16-byte keys, values are float16 arrays, [n_labels]):
    reference    the teacher's losses. Written once; a key that exists is never overwritten.
    difficulty   the student's moving averages. Rewritten as training goes.
    meta         format version; the fingerprint of the teacher that made the references.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import lmdb
import numpy as np

from regate.errors import StoreCorruptError, StoreError, StoreFullError, StoreMismatchError

Table = Literal["reference", "difficulty"]
TABLES: tuple[Table, ...] = ("reference", "difficulty")
FORMAT = b"regate-store-1"
_MAGIC = 0xBEEFC0DE
_HALF_MAX = float(np.finfo(np.float16).max)
_T = TypeVar("_T")


class Store:
    """Reference losses and difficulties on disk.

    Several processes may open one path; a store that crosses a fork or a pickle opens its files again.

    Args:
        path: a directory, made if missing; None is a temporary store, deleted with this object.
        max_bytes: largest size of the file. Address space, not disk: the file grows as records come.

    Raises:
        StoreCorruptError: the path holds something else, or damaged files. They are left untouched.
        StoreError: the path cannot be created or opened.

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
            directory = tempfile.mkdtemp(prefix="regate-")
            self._remove = weakref.finalize(self, _remove_own, directory, os.getpid())
            path = directory
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        file = self.path / "data.mdb"
        self._pid = os.getpid()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if file.exists() and file.stat().st_size:
                _check_header(file)
            # No fsync per commit: a killed process loses nothing (the page cache survives it), and copy-on-write
            # with ordered writeback is left to `flush`, which is called at checkpoints, against power loss.
            self._env = lmdb.open(
                str(self.path), map_size=self.max_bytes, max_dbs=4, max_readers=1024, metasync=False, sync=False,
                readahead=False,
            )  # fmt: skip
            self._meta = self._env.open_db(b"meta")
            self._tables = {name: self._env.open_db(name.encode()) for name in TABLES}
            with self._env.begin() as txn:
                version = txn.get(b"format", db=self._meta)
                entries = txn.stat(self._meta)["entries"]
            if version is None and entries == 0:
                with self._env.begin(write=True) as txn:
                    txn.put(b"format", FORMAT, db=self._meta, overwrite=False)
            elif version != FORMAT:
                raise StoreCorruptError(
                    f"{self.path} holds a store of format {version!r}, this version reads {FORMAT!r}; "
                    "use another path, or the version of regate that wrote it"
                )
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as error:
            raise StoreCorruptError(_corrupt(self.path, error)) from error
        except lmdb.Error as error:
            raise StoreError(f"cannot open a store at {self.path}: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot open a store at {self.path}: {error}; give a writable directory") from error

    def _environment(self) -> lmdb.Environment:
        if self._pid != os.getpid():  # LMDB environments must not be used across a fork
            self._open()
        return self._env

    def _write(self, change: Callable[[lmdb.Transaction], _T]) -> _T:
        env = self._environment()
        try:
            with env.begin(write=True) as txn:
                return change(txn)
        except lmdb.MapFullError as error:
            raise StoreFullError(
                f"the store at {self.path} reached its max_bytes={self.max_bytes}; open it with a larger one"
            ) from error
        except lmdb.MapResizedError:
            env.set_mapsize(0)  # another process opened it with a larger one
            return self._write(change)
        except (lmdb.CorruptedError, lmdb.PageNotFoundError) as error:
            raise StoreCorruptError(_corrupt(self.path, error)) from error
        except (lmdb.DiskError, lmdb.Error, OSError) as error:
            free = shutil.disk_usage(self.path).free
            if "No space left" in str(error) or "Input/output" in str(error) or "quota" in str(error):
                raise StoreFullError(
                    f"cannot write to the store at {self.path}: {error} ({free / 2**20:.0f} MiB free); make room and "
                    "go on: what was stored before is intact"
                ) from error
            raise StoreError(f"cannot write to the store at {self.path}: {error}") from error

    # -- records ----------------------------------------------------------------------------------------

    def get(self, table: Table, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """The records of `keys` as float32 copies [n_labels], None where there is none."""
        with self._environment().begin(db=self._tables[table], buffers=True) as txn:
            found = (txn.get(key) for key in keys)
            return [None if v is None else np.frombuffer(v, np.float16).astype(np.float32) for v in found]

    def missing(self, table: Table, keys: Sequence[bytes]) -> list[bytes]:
        """Those of `keys` that have no record, each once, in order."""
        with self._environment().begin(db=self._tables[table], buffers=True) as txn:
            return [key for key in dict.fromkeys(keys) if txn.get(key) is None]

    def put(self, table: Table, records: Mapping[bytes, np.ndarray]) -> None:
        """Store records in one transaction: all of them, or, if it fails or is killed, none.

        Args:
            table: "reference" keeps what it has under a key, "difficulty" replaces it.
            records: key to losses [n_labels], stored as float16.

        Raises:
            StoreError: a value is NaN or infinite.
            StoreFullError: no room.
        """
        encoded = []
        for key, losses in records.items():
            if not np.isfinite(losses).all():
                raise StoreError(f"losses of sample {key.hex()} are not finite; they are not stored")
            encoded.append((key, np.clip(losses, -_HALF_MAX, _HALF_MAX).astype(np.float16).tobytes()))
        db, replace = self._tables[table], table == "difficulty"

        def change(txn: lmdb.Transaction) -> None:
            for key, value in encoded:
                txn.put(key, value, db=db, overwrite=replace)

        self._write(change)

    def items(self, table: Table) -> Iterator[tuple[bytes, np.ndarray]]:
        """Every (key, float32 losses) of a table."""
        with self._environment().begin(db=self._tables[table]) as txn, txn.cursor() as cursor:
            for key, value in cursor:
                yield key, np.frombuffer(value, np.float16).astype(np.float32)

    def clear(self, table: Table) -> None:
        """Forget a table; with "reference" also whose it was."""

        def change(txn: lmdb.Transaction) -> None:
            txn.drop(self._tables[table], delete=False)
            if table == "reference":
                txn.delete(b"fingerprint", db=self._meta)

        self._write(change)

    # -- whose references -------------------------------------------------------------------------------

    def bind(self, fingerprint: Mapping[str, str]) -> None:
        """Say which teacher the references belong to: the first call writes it, later ones must agree.

        Raises:
            StoreMismatchError: another teacher, tokenizer or padding rule made the stored references.
        """
        wanted = json.dumps(dict(fingerprint), sort_keys=True).encode()

        def change(txn: lmdb.Transaction) -> bytes:
            txn.put(b"fingerprint", wanted, db=self._meta, overwrite=False)
            return bytes(txn.get(b"fingerprint", db=self._meta))

        stored = self._write(change)
        if stored == wanted:
            return
        theirs = json.loads(stored)
        differences = [
            f"{name}: stored {theirs.get(name)!r}, now {fingerprint.get(name)!r}"
            for name in sorted({*theirs, *fingerprint})
            if theirs.get(name) != fingerprint.get(name)
        ]
        raise StoreMismatchError(
            f"the reference losses at {self.path} were made by another teacher ({'; '.join(differences)}). "
            "Use another path, or Store(path).clear('reference') to make them again."
        )

    # -- life -------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Records per table and bytes on disk."""
        with self._environment().begin() as txn:
            counts = {name: int(txn.stat(db)["entries"]) for name, db in self._tables.items()}
        return {**counts, "bytes": (self.path / "data.mdb").stat().st_blocks * 512}

    def flush(self) -> None:
        """Bring everything to the disk itself, against power loss."""
        self._environment().sync(True)

    def close(self) -> None:
        """Close the files; delete them if the store is a temporary one."""
        if self._pid == os.getpid():
            self._env.close()
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
        self._open()


def _remove_own(directory: str, pid: int) -> None:
    if os.getpid() == pid:  # not from a forked child's exit
        shutil.rmtree(directory, ignore_errors=True)


def _corrupt(path: Path, error: object) -> str:
    return (
        f"{path} is not a readable store ({error}); nothing was changed. Move it away, or use another path; reference "
        "losses can be computed again."
    )


def _check_header(file: Path) -> None:
    """LMDB maps a truncated file without complaint and dies on reading it: look at its two meta pages first.

    Offsets are those of `MDB_meta` after a 16-byte page header: magic 0, page size 24, last page 120, transaction 128.
    """
    with file.open("rb") as stream:
        head = stream.read(1 << 17)

    def field(page_start: int, offset: int, width: int) -> int:
        at = page_start + 16 + offset
        return int.from_bytes(head[at : at + width], "little")

    page = field(0, 24, 4)
    if field(0, 0, 4) != _MAGIC or field(page, 0, 4) != _MAGIC:
        raise StoreCorruptError(_corrupt(file.parent, "the file header is not LMDB's"))
    newest = max((0, page), key=lambda start: field(start, 128, 8))
    size, needed = file.stat().st_size, (field(newest, 120, 8) + 1) * page
    if size < needed:
        raise StoreCorruptError(_corrupt(file.parent, f"the file is cut off at {size} of {needed} bytes"))
