"""Where every arm of a seed starts: an encoder that sees, a language model that knows the language, no link yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.quality.tasks import Batch, Task, arguments


def started(task: Task, seed: int, folder: Path) -> Any:
    """The model of a seed, pretrained; made once, then read from `folder`."""
    model = task.build(seed)
    path = folder / f"{task.name}-{seed}.pt"
    if not path.exists():
        torch.manual_seed(seed)
        learn_language(task, model, seed)
        learn_to_see(task, model, seed)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        torch.save(model.state_dict(), unfinished)
        unfinished.replace(path)
    model.load_state_dict(torch.load(path))
    return model


def learn_language(task: Task, model: Any, seed: int) -> None:
    """From the training answers without their visual input. ReGATE's teacher is this language model."""
    batches = endless(task.train.without_images().batches(task.settings.vision_batch_size, seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.settings.lr)
    model.train()
    for _ in range(task.settings.text_steps):
        model(**arguments(next(batches)), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def learn_to_see(task: Task, model: Any, seed: int) -> None:
    """One linear head per fact on what the encoder sees; the heads are thrown away."""
    batches = endless(task.train.batches(task.settings.vision_batch_size, seed=seed))
    encoder = task.encoder(model).train()
    heads: nn.ModuleList | None = None
    optimizer: torch.optim.Optimizer | None = None
    for _ in range(task.settings.vision_steps):
        batch = next(batches)
        seen = task.see(encoder, batch)
        if heads is None or optimizer is None:
            heads = nn.ModuleList(nn.Linear(seen.shape[-1], n) for n in task.classes)
            optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=task.settings.lr)
        _losses(heads, seen, batch["facts"].reshape(len(seen), -1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _losses(heads: nn.ModuleList, seen: Tensor, facts: Tensor) -> Tensor:
    losses = [nn.functional.cross_entropy(head(seen), facts[:, i]) for i, head in enumerate(heads)]
    return torch.stack(losses).sum()


def endless(batches: DataLoader[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
