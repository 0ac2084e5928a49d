"""Is the model's loss divided by a number of its call?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regate.output.outputs import get
from regate.undisturbed import undisturbed

_CLOSE = 1e-2  # a half of the divisor doubles the loss to this relative difference


def is_divided(model: nn.Module, call: Mapping[str, Any], halved: Mapping[str, Any]) -> bool:
    """Is the loss twice as large with the entries of `halved`, in which the number is half of what it is?

    Runs the model twice, without gradients; what it makes of half a number is no reason to stop.
    """
    whole = _loss(model, call)
    try:
        doubled = _loss(model, {**call, **halved})
    except Exception:  # such as half a row that was to be looked up
        return False
    return whole is not None and doubled is not None and bool(torch.isclose(doubled, 2 * whole, rtol=_CLOSE, atol=0))


@torch.no_grad()
def _loss(model: nn.Module, call: Mapping[str, Any]) -> Tensor | None:
    with undisturbed(model):
        loss = get(model.forward(**call), "loss")
    return loss.sum().float() if isinstance(loss, Tensor) else None
