"""What trial runs of a model must not leave behind, and what must not differ between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_PACKED = 2**20  # integers in a buffer: more are weights of a quantized model, which no forward writes


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of one seed. Afterwards they go on as if none had been drawn, and buffers that
    forwards write, such as running statistics or counts of an expert's tokens, are as they were."""
    buffers = [x for x in model.buffers() if x.is_floating_point() or x.numel() <= _PACKED]
    before = [x.detach().clone() for x in buffers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    if not torch.equal(buffer, value):  # graphs that wait for their backward pass may hold the others
                        buffer.copy_(value)


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
