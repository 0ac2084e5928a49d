"""Where every arm of a seed starts: an encoder that sees, a language model that knows the language, perhaps linked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.tasks import Batch, Batches, Task, arguments
from examples.demo.start import learn, learn_to_see

_OF_START = ("lr", "batch_size", "vision_steps", "vision_batch_size", "text_steps", "link_steps")


def started(task: Task, seed: int, folder: Path) -> Any:
    """The model of a seed, pretrained; made once per settings, then read from `folder`."""
    settings = task.settings
    seed %= settings.starts or seed + 1
    model = task.build(seed)

    def pretrain() -> None:
        torch.manual_seed(seed)
        lr = settings.lr
        _learn_language(task, model, seed)
        batches = endless(task.train.batches(settings.vision_batch_size, seed=seed))
        learn_to_see(task.encoder(model), task.see, batches, task.classes, steps=settings.vision_steps, lr=lr)
        if task.link is not None:
            pairs = endless(task.link.batches(settings.batch_size, seed=seed))
            learn(model, map(arguments, pairs), steps=settings.link_steps, lr=lr)

    return _made_once(model, folder / f"{task.name}-{seed}-{_digest(task)}.pt", pretrain, task.device)


def teacher(task: Task, seed: int, folder: Path, size: Literal["small", "large"]) -> Any:
    """A language model of another size than the student's, that learnt the same texts for as many steps.

    "small" has one layer, a quarter as wide; "large" twice as many, twice as wide.
    """
    seed %= task.settings.starts or seed + 1
    own = task.build(seed).config.get_text_config()
    text = own.to_dict()
    wider = 0.25 if size == "small" else 2
    layers = 1 if size == "small" else 2 * text["num_hidden_layers"]
    shape = {name: round(wider * text[name]) for name in ("hidden_size", "intermediate_size")}
    changes = shape | {"num_hidden_layers": layers, "head_dim": None, "layer_types": None}
    config = type(own)(**(text | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(task.device)
    path = folder / f"{task.name}-{size}-{seed}-{_digest(task)}.pt"
    return _made_once(model, path, lambda: _learn_language(task, model, seed), task.device)


def _learn_language(task: Task, model: Any, seed: int) -> None:
    texts = task.train.without_images().batches(task.settings.vision_batch_size, seed=seed)
    learn(model, map(arguments, endless(texts)), steps=task.settings.text_steps, lr=task.settings.lr)


def _digest(task: Task) -> str:
    told = [getattr(task.settings, name) for name in _OF_START]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


def _made_once(model: Any, path: Path, pretrain: Callable[[], None], device: str) -> Any:
    if not path.exists():
        pretrain()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        torch.save(model.state_dict(), unfinished)
        unfinished.replace(path)
    model.load_state_dict(torch.load(path, map_location=device))
    return model


def endless(batches: Batches) -> Iterator[Batch]:
    while True:
        yield from batches
