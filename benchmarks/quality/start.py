"""Where every arm of a seed starts: an encoder that sees, a language model that knows the language, perhaps linked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.tasks import Batch, Batches, Task, arguments
from examples.demo.start import learn, learn_to_see

_OF_START = ("lr", "batch_size", "vision_steps", "vision_batch_size", "text_steps", "link_steps")


def started(task: Task, seed: int, folder: Path) -> Any:
    """The model of a seed, pretrained; made once per settings, then read from `folder`."""
    settings = task.settings
    seed %= settings.starts or seed + 1
    model = task.build(seed)
    told = [getattr(settings, name) for name in _OF_START]
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
    path = folder / f"{task.name}-{seed}-{digest}.pt"
    if not path.exists():
        torch.manual_seed(seed)
        lr = settings.lr
        texts = task.train.without_images().batches(settings.vision_batch_size, seed=seed)
        learn(model, map(arguments, endless(texts)), steps=settings.text_steps, lr=lr)
        batches = endless(task.train.batches(settings.vision_batch_size, seed=seed))
        learn_to_see(task.encoder(model), task.see, batches, task.classes, steps=settings.vision_steps, lr=lr)
        if task.link is not None:
            pairs = endless(task.link.batches(settings.batch_size, seed=seed))
            learn(model, map(arguments, pairs), steps=settings.link_steps, lr=lr)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        torch.save(model.state_dict(), unfinished)
        unfinished.replace(path)
    model.load_state_dict(torch.load(path, map_location=task.device))
    return model


def endless(batches: Batches) -> Iterator[Batch]:
    while True:
        yield from batches
