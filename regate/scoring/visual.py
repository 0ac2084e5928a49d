"""Which visual tokens a sparse step can leave out: those with a twin among the others.

Neighbouring patches and frames show the same wall over and over. Whether two tokens say the same is read off their
embeddings, as the decoder is given them, without any parameter: of every second token, those most similar to one of the
tokens between are left out, again and again until few enough are left (the matching of Token Merging, arXiv 2210.09461,
section 3, without the merging).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regate.labels import count_of
from regate_patch import to_device


@torch.no_grad()
def thinned(embeddings: Tensor, visual: Tensor, keep: float) -> Tensor:
    """The visual tokens that stay, `ceil(keep * n)` of each row's n.

    How many there are is known on the host, so that nothing here waits for the device.

    Args:
        embeddings: [B, S, D] float, what the decoder is given.
        visual: [B, S] bool, on the CPU.
        keep: share, 0 < keep <= 1.

    Returns:
        [B, S] bool on the device of `embeddings`, True at some of `visual` only.
    """
    device = embeddings.device
    stay = torch.zeros(visual.shape, dtype=torch.bool, device=device)
    for b, goal in enumerate(count_of(visual.sum(1), keep).tolist()):
        places = to_device(visual[b].nonzero().squeeze(1), device)
        tokens = F.normalize(embeddings[b].index_select(0, places).float(), dim=-1)
        while (n := len(places)) > goal:
            with torch.autocast(device.type, enabled=False):  # to few digits all near twins are alike
                similarity = (tokens[1::2] @ tokens[::2].T).amax(1)
            leave = similarity.argsort(descending=True, stable=True)[: n - goal]
            left = torch.zeros(n, dtype=torch.uint8, device=device).index_fill(0, 1 + 2 * leave, 1)
            staying = left.argsort(stable=True)[: n - len(leave)]  # in order; a mask would have to be counted
            places, tokens = places.index_select(0, staying), tokens.index_select(0, staying)
        stay[b].index_fill_(0, places, True)
    return stay
