"""Processes that train together, and the little that they ask one another: every rank must come to each question."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def alone() -> bool:
    """Does this process train by itself? Ranks may not know of each other yet."""
    return ranks() == 1 and os.environ.get("WORLD_SIZE", "1") == "1"


def told_on() -> str:
    """The kind of device whose tensors ranks can send one another: a CPU's where a backend serves it, beside others."""
    served = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    return "cpu" if "cpu" in served else served[0]


def highest(number: int) -> int:
    """The highest that any rank says. Every rank must ask at the same time; a process alone has its own answer."""
    if ranks() == 1:
        return number
    said = torch.tensor(number, device=told_on())
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return int(said)


def any_rank(here: bool) -> bool:
    """Does it hold on some rank? Asked as `highest` is."""
    return bool(highest(int(here)))


def all_say(message: Any) -> list[Any]:
    """What every rank says, by rank."""
    said: list[Any] = [None] * ranks()
    dist.all_gather_object(said, message)
    return said


def in_step(parts: Iterable[T]) -> Iterator[T | None]:
    """This rank's parts, then None for as long as another rank has some. Every rank must go through all of them."""
    for part in parts:
        any_rank(True)
        yield part
    while any_rank(False):
        yield None
