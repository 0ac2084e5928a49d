"""Between the host and a device: from one to the other without waiting for what the device is still computing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; on its way to a GPU it goes through pinned memory, so that the host goes on at once."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@contextlib.contextmanager
def made_on_host() -> Iterator[None]:
    """Inside, tensors are made on the CPU where nothing else is said, whatever `torch.set_default_device` says.

    Not for what runs the model: it may count on that default.
    """
    if torch.get_default_device().type == "cpu":  # a context for devices costs something at every operation
        yield
        return
    with torch.device("cpu"):
        yield
