"""Where the small model starts: an encoder that sees, a language model that knows the captions' language, no link yet.

Users start from pretrained parts, too. From random weights arms would differ by when the encoder leaves its plateau,
which is luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def learn(model: Any, batches: Iterator[Batch], *, steps: int, lr: float) -> None:
    """By the model's own loss. From answers without their images it learns their language: ReGATE's teacher then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        model(**next(batches), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def learn_to_see(
    encoder: nn.Module,
    see: Callable[[nn.Module, Batch], Tensor],
    batches: Iterator[Batch],
    classes: tuple[int, ...],
    *,
    steps: int,
    lr: float,
) -> None:
    """One linear head per fact on what the encoder sees; the heads are thrown away.

    Args:
        encoder: is trained.
        see: what it makes of a batch, [N, D].
        batches: each with "facts", N for each of `classes`.
        classes: of each fact, how many there are.
        steps: of AdamW.
        lr: its rate.
    """
    encoder.train()
    heads: nn.ModuleList | None = None
    optimizer: torch.optim.Optimizer | None = None
    for _ in range(steps):
        batch = next(batches)
        seen = see(encoder, batch)
        if heads is None or optimizer is None:
            heads = nn.ModuleList(nn.Linear(seen.shape[-1], n, device=seen.device) for n in classes)
            optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=lr)
        facts = batch["facts"].reshape(len(seen), -1)
        losses = [nn.functional.cross_entropy(head(seen), facts[:, i]) for i, head in enumerate(heads)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
