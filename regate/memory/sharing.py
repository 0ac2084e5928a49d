"""What one rank learns about a sample, the others learn too: next epoch the sample may be theirs.

Every `every` optimizer steps each rank passes on the records it made since, through a process group of its own and in
a thread, while training goes on; they are taken over at the next exchange. Ranks whose stores are one and the same
file have nothing to pass on to one another, and take over a part each of what others learnt. Optimizer steps are what
all ranks count alike, so all of them exchange at one moment.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from filelock import BaseFileLock

from regate.errors import RankError
from regate.memory.files import KEY_BYTES, TABLES, Table
from regate.memory.store import Store, half
from regate.ranks import alone, rank, ranks

GONE = (
    "difficulties could not be exchanged between ranks: {error}. All ranks must make the same number of optimizer "
    "steps; a rank that stopped shows its own error."
)


@dataclass(frozen=True)
class _Packed:
    """Records of one table in three pieces, which costs a fraction of sending each by itself.

    Attributes:
        keys: one behind the other.
        lengths: int32 [N], labels of each record.
        losses: float16 [sum of lengths].
    """

    keys: bytes
    lengths: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, records: Mapping[bytes, np.ndarray]) -> _Packed:
        losses = list(records.values())
        lengths = np.array([len(x) for x in losses], np.int32)
        return cls(b"".join(records), lengths, np.concatenate(losses) if losses else np.zeros(0, np.float16))

    @property
    def nbytes(self) -> int:
        """As they are sent."""
        return len(self.keys) + self.lengths.nbytes + self.losses.nbytes

    def names(self) -> Iterator[bytes]:
        return (self.keys[i : i + KEY_BYTES] for i in range(0, len(self.keys), KEY_BYTES))

    def records(self) -> Iterator[tuple[bytes, np.ndarray]]:
        ends = self.lengths.cumsum().tolist()
        for name, begin, end in zip(self.names(), [0, *ends], ends, strict=False):
            yield name, self.losses[begin:end]


class Beside(Protocol):
    """What a rank tells the others beside its records."""

    def give(self) -> Any:
        """What this rank has to say since it was asked last."""

    def take(self, told: Sequence[Any]) -> None:
        """What all ranks said, in their order."""


@dataclass(frozen=True)
class _Message:
    """What one rank passes on, and which file it keeps its own records in."""

    home: tuple[Any, ...]
    records: dict[Table, _Packed]
    beside: Any = None


@dataclass
class _Flight:
    """An exchange on its way.

    Attributes:
        received: what each rank passed on.
        last: by key, the last rank that passed a record on. Where several did, every rank takes that one's.
    """

    thread: threading.Thread
    received: list[_Message] = field(default_factory=list)
    last: dict[Table, dict[bytes, int]] = field(default_factory=dict)
    error: Exception | None = None

    def arrive(self, received: list[_Message]) -> None:
        self.last = {
            table: {key: rank for rank, message in enumerate(received) for key in message.records[table].names()}
            for table in TABLES
        }
        self.received = received


def _claimed(store: Store) -> BaseFileLock | None:
    """See `Store.claim`; ranks are one run, for which the first one speaks, also before they know of each other."""
    first = alone() or (rank() == 0 and os.environ.get("RANK", "0") == "0")
    return store.claim() if first and not store.temporary else None


class Exchange:
    """The records of all ranks in every rank's store.

    Args:
        store: this rank's; `use` takes another.
        every: optimizer steps between exchanges.
        beside: says and hears something, too. A process alone says it to itself, at each step.
    """

    def __init__(self, store: Store, *, every: int = 16, beside: Beside | None = None) -> None:
        self.store, self.every, self.beside = store, every, beside
        self._learns = False
        self._lock: BaseFileLock | None = None
        self.bytes_sent = 0
        self._outgoing: dict[Table, dict[bytes, np.ndarray]] = {table: {} for table in TABLES}
        self._flight: _Flight | None = None
        self._group: Any = None
        self._one_file = False

    def claim(self) -> None:
        """Begin to learn: from now on no run of another process of this machine may, into the first rank's store.

        Raises:
            StoreInUseError: one does at the moment.
        """
        self._learns = True
        self._lock = self._lock or _claimed(self.store)

    def let_go(self) -> None:
        """Nothing more is learnt."""
        self._learns = False
        self._release()

    def use(self, store: Store) -> None:
        """Take another store.

        Raises:
            StoreInUseError: it is to learn there, and a run of another process does.
        """
        lock = _claimed(store) if self._learns else None
        self._release()
        self.store, self._lock, self._one_file = store, lock, False

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def needed(self) -> bool:
        """Are there other ranks, with files of their own as far as is known?"""
        return not self._one_file and ranks() > 1

    @property
    def _running(self) -> bool:
        return self.needed or (self.beside is not None and ranks() > 1)

    def add(self, table: Table, records: Mapping[bytes, np.ndarray]) -> None:
        """Records that this rank just stored."""
        if self.needed:
            self._outgoing[table].update((k, half(v)) for k, v in records.items())

    def tick(self, step: int) -> None:
        """The optimizer step of that number was made, on this rank and on every other.

        Raises:
            RankError: another rank is gone.
        """
        if self.beside is not None and ranks() == 1:
            self.beside.take([self.beside.give()])
        if not self._running:
            return
        if (step + 1) % self.every == 0:
            self._land()
            self._launch()

    def forget(self, *tables: Table) -> None:
        """Tell the others nothing of what this rank stored in these tables; what is on its way still comes.

        Raises:
            RankError: another rank is gone.
        """
        self._land()
        for table in tables:
            self._outgoing[table].clear()

    def finish(self) -> None:
        """Pass on and take over everything now. Every rank must call it.

        Raises:
            RankError: another rank is gone.
        """
        if self._running:
            self._land()
            self._launch()
            self._land()
        self.meet()  # others write into this rank's file, too

    def meet(self) -> None:
        """Wait until every rank has come here.

        Raises:
            RankError: another rank is gone.
        """
        if ranks() == 1:
            return
        try:
            dist.barrier(group=self._own_group())
        except RuntimeError as error:
            raise RankError(GONE.format(error=error)) from error

    def _own_group(self) -> Any:
        """Of processes that speak without the device, beside what training sends. Every rank must ask."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group

    def _launch(self) -> None:
        if not self._running:  # the exchange that just landed showed that all share one file
            return
        self._own_group()
        data = self.store.data()
        packed = {table: _Packed.of(records) for table, records in self._outgoing.items()}
        beside = None if self.beside is None else self.beside.give()
        message = _Message((socket.gethostname(), data.st_dev, data.st_ino), packed, beside)
        self.bytes_sent += sum(records.nbytes for records in packed.values())
        self._outgoing = {table: {} for table in TABLES}
        flight = _Flight(threading.Thread(target=lambda: self._gather(message, flight), daemon=True))
        self._flight = flight
        flight.thread.start()

    def _gather(self, message: _Message, flight: _Flight) -> None:
        try:
            received: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(received, message, group=self._group)
            flight.arrive(received)
        except Exception as error:  # handed to the training thread, which is the one that can raise it
            flight.error = error

    def _land(self) -> None:
        """Wait for the exchange that is on its way, and take over what it brought."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        flight.thread.join()
        if flight.error is not None:
            raise RankError(GONE.format(error=flight.error)) from flight.error
        own = flight.received[dist.get_rank()].home
        here = [rank for rank, message in enumerate(flight.received) if message.home == own]
        others = [rank for rank, message in enumerate(flight.received) if message.home != own]
        mine = others[here.index(dist.get_rank()) :: len(here)]
        for table in TABLES:
            last = flight.last[table]
            taken = {
                key: losses
                for rank in mine
                for key, losses in flight.received[rank].records[table].records()
                if last[key] == rank and key not in self._outgoing[table]  # which is of later
            }
            self.store.put(table, taken)
        self._one_file = not others
        if self.beside is not None:
            self.beside.take([message.beside for message in flight.received])
