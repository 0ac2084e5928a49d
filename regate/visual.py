"""Which visual tokens a sparse step can leave out: those with a twin among the others.

Neighbouring patches and frames show the same wall over and over. Whether two tokens say the same is read off their
embeddings, as the decoder is given them, without any parameter: of every second token, those most similar to one of the
tokens between are left out, again and again until few enough are left (the matching of Token Merging, arXiv 2210.09461,
section 3, without the merging).
"""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def thinned(embeddings: Tensor, visual: Tensor, keep: float) -> Tensor:
    """The visual tokens that stay, `ceil(keep * n)` of each row's n.

    Args:
        embeddings: [B, S, D] float, what the decoder is given.
        visual: [B, S] bool.
        keep: share, 0 < keep <= 1.

    Returns:
        [B, S] bool, True at some of `visual` only.
    """
    stay = torch.zeros_like(visual)
    for b, row in enumerate(visual):
        places = row.nonzero().squeeze(1)
        goal = ceil(keep * len(places) - 1e-6)
        tokens = F.normalize(embeddings[b, places].float(), dim=-1)
        while len(places) > goal:
            similarity = (tokens[1::2] @ tokens[::2].T).amax(1)
            leave = similarity.argsort(descending=True, stable=True)[: len(places) - goal]
            staying = torch.ones(len(places), dtype=torch.bool, device=places.device)
            staying[1 + 2 * leave] = False
            places, tokens = places[staying], tokens[staying]
        stay[b, places] = True
    return stay
