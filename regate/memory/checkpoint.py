"""The gate's state in a trainer's checkpoint folder, and difficulties as the few tensors that state holds.

Files of a folder: `regate.pt`, of rank 0, with the losses of every sample; `regate-rank1.pt` and so on, what other
ranks keep to themselves. Where each node has a folder of its own, its first rank writes `regate.pt` there. Each is
written under another name and renamed, so a kill leaves a whole file or none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from regate.errors import CheckpointError
from regate.memory.files import KEY_BYTES
from regate.memory.store import half
from regate.ranks import rank, ranks

NAME = "regate.pt"
OF_ALL_RANKS = ("difficulty", "reference", "owed")  # entries of `regate.pt` alone


def _file_of(rank: int) -> str:
    return NAME if rank == 0 else f"regate-rank{rank}.pt"


def writes_all(*, on_each_node: bool) -> bool:
    """Does this rank write the file with the losses of every sample?"""
    return rank() == 0 or (on_each_node and ranks() > 1 and dist.get_node_local_rank(rank()) == 0)


def save(folder: str | os.PathLike[str], state: dict[str, Any], *, on_each_node: bool = False) -> None:
    """Write this rank's `state` into `folder`, whole or not at all; with `OF_ALL_RANKS` where it `writes_all`."""
    path = Path(folder).expanduser() / (NAME if writes_all(on_each_node=on_each_node) else _file_of(rank()))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """This rank's state; the first one's if the run had fewer ranks, and always with the losses that this one has.

    Raises:
        CheckpointError: the folder holds none, or the file is damaged.
    """
    main = Path(folder).expanduser() / NAME
    if not main.exists():
        raise CheckpointError(f"{main.parent} holds no {NAME}: it was not saved by a gated run")
    own = main.with_name(_file_of(rank()))
    state = _read(main)
    if own == main or not own.exists():
        return state
    mine = _read(own)
    if mine.get("step") != state.get("step"):  # of an earlier run with more ranks, into the same folder
        return state
    return mine | {name: state[name] for name in OF_ALL_RANKS if name in state}


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from an older checkpoint") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, no gate's state; resume from another checkpoint")
    return state


def pack(records: Iterable[tuple[bytes, np.ndarray]]) -> dict[str, Tensor]:
    """Records as three tensors: keys uint8 [n, 16], lengths int64 [n], losses float16 [total]."""
    rows = list(records)
    keys = rearrange(np.frombuffer(b"".join(key for key, _ in rows), np.uint8), "(row byte) -> row byte", byte=16)
    losses = [half(losses) for _, losses in rows]
    return {
        "keys": torch.from_numpy(keys.copy()),
        "lengths": torch.tensor([len(x) for x in losses], dtype=torch.int64, device="cpu"),
        "losses": torch.from_numpy(np.concatenate([np.zeros(0, np.float16), *losses])),
    }


def is_packed(value: Any) -> bool:
    """Is it what `pack` returns? Lengths that do not fit would cut records off in silence."""
    if not isinstance(value, Mapping):
        return False
    keys, lengths, losses = (value.get(name) for name in ("keys", "lengths", "losses"))
    if not (isinstance(keys, Tensor) and isinstance(lengths, Tensor) and isinstance(losses, Tensor)):
        return False
    shapes = lengths.dim() == losses.dim() == 1 and keys.shape == (len(lengths), KEY_BYTES)
    types = keys.dtype == torch.uint8 and lengths.dtype == torch.int64 and losses.is_floating_point()
    if not (shapes and types):
        return False
    return bool((lengths >= 0).all()) and int(lengths.sum()) == len(losses) and bool(losses.isfinite().all())


def unpack(packed: Mapping[str, Tensor]) -> Iterator[tuple[bytes, np.ndarray]]:
    """The records that `pack` was given."""
    rows = packed["losses"].numpy().astype(np.float32)
    ends = packed["lengths"].cumsum(0)
    starts = ends - packed["lengths"]
    for key, start, end in zip(packed["keys"].numpy(), starts.tolist(), ends.tolist(), strict=True):
        yield key.tobytes(), rows[start:end]
