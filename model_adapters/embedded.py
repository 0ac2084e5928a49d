"""Ids read back off embeddings, for language models that are called with `inputs_embeds`.

A text position holds a row of the embedding table, bit for bit. What matches no row was made elsewhere: a feature of an
image, a video or a sound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model_adapters.errors import AdapterError

_CHUNK = 4096
_Embed = Callable[[Tensor], Tensor]
# Projections of tables that have not changed since, by module: (version, keys in order, their ids).
_PROJECTED: WeakKeyDictionary[nn.Module, tuple[Any, Tensor, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def ids_of(embeds: Tensor, embed: _Embed, vocabulary: int) -> Tensor:
    """The ids whose embeddings stand in `embeds` [B, S, D]; -1 where none does. [B, S] int64.

    Rows are found by one random projection, O((V + B*S) (D + log V)), and then compared in full. Ids of equal
    embeddings give the lowest of them. A frozen module's projections are kept.

    Args:
        embed: [N] int64 -> [N, D], an embedding module or a table's lookup.
        vocabulary: V.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
        >>> ids_of(torch.tensor([[[3.0, 4.0], [1.0, 2.0], [9.0, 9.0]]]), lambda ids: table[ids], 3).tolist()
        [[1, 0, -1]]
    """
    flat = embeds.reshape(-1, embeds.shape[-1])
    drawn = torch.Generator("cpu").manual_seed(0)
    direction = torch.rand(flat.shape[1], generator=drawn, dtype=torch.float64, device="cpu").to(flat.device)

    def projected(rows: Tensor) -> Tensor:  # summed alone, row by row, so that equal rows give equal numbers
        return (rows.to(flat.dtype).double() * direction).sum(-1)

    def table() -> tuple[Tensor, Tensor]:
        ids = torch.arange(vocabulary, device=flat.device)
        return torch.cat([projected(embed(part)) for part in ids.split(_CHUNK)]).sort(stable=True)

    version = _version(embed, flat)
    if version is None:
        keys, order = table()
    else:
        assert isinstance(embed, nn.Module)
        known = _PROJECTED.get(embed)
        if known is None or known[0] != version:
            known = _PROJECTED[embed] = (version, *table())
        _, keys, order = known
    mine = torch.cat([projected(part) for part in flat.split(_CHUNK)])
    ids = order[torch.searchsorted(keys, mine).clamp(max=vocabulary - 1)]
    pairs = zip(ids.split(_CHUNK), flat.split(_CHUNK), strict=True)
    same = [(embed(some).to(part.dtype) == part).all(-1) for some, part in pairs]
    return torch.where(torch.cat(same), ids, -1).reshape(embeds.shape[:2])


def _version(embed: _Embed, flat: Tensor) -> tuple[Any, ...] | None:
    """What the projections are made of; None where it may change unseen: in training, or split over ranks."""
    if not isinstance(embed, nn.Module) or any(
        p.requires_grad or type(p.data) is not Tensor for p in embed.parameters()
    ):
        return None
    weights = tuple((p.data_ptr(), p._version, p.shape) for p in embed.parameters())
    return (weights, flat.dtype, flat.device)


def read_off(embeds: Tensor, labels: Tensor, embeddings: nn.Module, vocabulary: int) -> Tensor:
    """`ids_of`, for a call with `labels` [B, S]: at labels the ids are the labels.

    Raises:
        AdapterError: labelled positions do not hold the embeddings of their labels.
    """
    ids = ids_of(embeds, embeddings, vocabulary)
    labelled = labels >= 0
    strange = labelled & (ids != labels)  # ids of equal embeddings are equal to none but the lowest
    if bool(strange.any()):
        places = strange.nonzero()
        with torch.no_grad():
            own = embeddings(labels[strange]).to(embeds.dtype) == embeds[strange]
        wrong = int((~own.all(-1)).sum())
        if 2 * wrong > int(labelled.sum()):
            row, position = places[0].tolist()
            raise AdapterError(
                f"{wrong} of {int(labelled.sum())} labelled positions of inputs_embeds do not hold their label's "
                f"embedding (the first in row {row}, position {position}), so text cannot be told from visual "
                "features. Noise on embeddings (NEFTune) or a transform of them does that: leave it out, or register "
                "an adapter whose `layout` knows the ids"
            )
    return torch.where(labelled, labels, ids)
