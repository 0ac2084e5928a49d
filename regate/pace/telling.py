"""What ranks tell one another on their way to the decoder. Every rank must come to each of these calls."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from regate.errors import UnsupportedShardingError
from regate.ranks import rank, ranks, told_on


@dataclass(frozen=True)
class Call:
    """A module's: with what, and does it take gradients?"""

    args: Any
    kwargs: Any
    gradients: bool

    @property
    def size(self) -> int:
        """How many numbers its tensors hold."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class _Like:
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: str
    requires_grad: bool

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=told_on())


def alike(call: Mapping[Any, Any]) -> bool:
    """Does this call of the model bring the same kinds of input on every rank, and as many pieces in lists?

    Over a list a model may well go one by one; a tensor it takes at once, however many images there are in it.
    """
    mark = zlib.crc32(repr(sorted(_pieces(call))).encode())
    said = torch.tensor([mark, -mark], device=told_on())
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said[0] == -said[1])


def _pieces(value: Any, name: str = "") -> Iterator[str]:
    """The name of each tensor that holds something, and of each name of a file."""
    if isinstance(value, str) or (isinstance(value, Tensor) and value.numel()):
        yield name
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _pieces(inside, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for inside in value:
            yield from _pieces(inside, name)


def where(turn: int, size: int) -> list[tuple[int, int]]:
    """At whose turn each rank is, and how large the call is that it is about to make."""
    own = torch.tensor([turn, size], device=told_on())
    found = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(found, own)
    return [(int(of_rank[0]), int(of_rank[1])) for of_rank in found]


def handed_over(call: Call | None, leader: int, name: str) -> Call:
    """The call that the rank `leader` makes, with values of this rank's own; others may give None.

    Raises:
        UnsupportedShardingError: its arguments cannot be sent.
    """
    letter: list[Any] = [None]
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs)) if call is not None else ([], None)
    if rank() == leader and call is not None and structure is not None:
        bare = [_Like(x.shape, x.dtype, x.device.type, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        try:
            letter = [pickle.dumps((*pytree.tree_unflatten(bare, structure), call.gradients))]
        except Exception as error:  # all ranks say so, instead of waiting for the one that cannot go on
            letter = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(letter, src=leader, device=torch.device(told_on()))
    if isinstance(letter[0], str):
        raise UnsupportedShardingError(
            f"ranks with images and ranks without must run the same modules where parameters are split over them, but "
            f"the arguments of {name} cannot be sent from one to the other ({letter[0]}): give each rank's batch an "
            "image, such as one that counts for nothing"
        )
    args, kwargs, gradients = pickle.loads(letter[0])
    bare, structure = pytree.tree_flatten((args, kwargs))
    sent = [leaf for leaf in leaves if isinstance(leaf, Tensor)] if rank() == leader else []
    filled = _filled([like for like in bare if isinstance(like, _Like)], sent, leader)
    whole = [filled.pop(0) if isinstance(leaf, _Like) else leaf for leaf in bare]
    args, kwargs = pytree.tree_unflatten(whole, structure)
    return Call(args, kwargs, gradients)


def _filled(likes: Sequence[_Like], sent: Sequence[Tensor], leader: int) -> list[Tensor]:
    """Tensors of these kinds, with the values that the leader sends, bit for bit."""
    found = []
    for number, like in enumerate(likes):
        value = sent[number].detach().to(told_on()).contiguous() if sent else like.empty()
        if value.numel():
            dist.broadcast(value.reshape(-1).view(torch.uint8), src=leader)
        found.append(value.to(like.device).requires_grad_(like.requires_grad))
    return found
