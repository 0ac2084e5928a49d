"""What runs that are not training must not leave behind."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_PACKED = 2**20  # integers in a buffer: more are weights of a quantized model, which no forward writes


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """In the end random states are what they were: what data sets and collators draw, training draws again."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, torch's random numbers are those of one seed.

    Afterwards they are as before, and so is what forwards write: buffers, such as running statistics or counts of an
    expert's tokens, and numbers, such as a count of calls.
    """
    buffers = [x for x in module.buffers() if x.is_floating_point() or x.numel() <= _PACKED]
    before = [x.detach().clone() for x in buffers]
    numbers = [(own, name, x) for own in _attributes(module) for name, x in own.items() if _is_number(name, x)]
    with random_numbers_kept():
        torch.manual_seed(0)
        try:
            yield
        finally:
            for own, name, number in numbers:
                if _is_number(name, own.get(name)):
                    own[name] = number
            for buffer, value in zip(buffers, before, strict=True):
                buffer.data.copy_(value)  # by `.data`: graphs that wait for their backward pass may hold the buffer


def _attributes(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Of its parts, and of objects of one's own by which it computes its loss."""
    for part in module.modules():
        yield vars(part)
    loss = getattr(module, "loss_function", None)
    if loss is not None and not isinstance(loss, nn.Module) and not inspect.isroutine(loss):
        yield getattr(loss, "__dict__", {})


def _is_number(name: str, x: Any) -> bool:
    """A public one: others say how a library keeps a module, which goes on."""
    return (x is None or isinstance(x, bool | int | float)) and not name.startswith(("_", "ds_"))


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[bool]:
    """Inside, dropout in the module is off; yields whether there was any."""
    changed: list[tuple[nn.Module, str, float]] = []
    for part in module.modules():
        named = "dropout" in type(part).__name__.lower()
        for name, number in vars(part).items():
            if isinstance(number, float) and number > 0 and ("dropout" in name or (named and name == "p")):
                changed.append((part, name, number))
    for part, name, _ in changed:
        setattr(part, name, 0.0)
    try:
        yield bool(changed)
    finally:
        for part, name, number in changed:
            setattr(part, name, number)
