"""Loss and gradients of one step, and how far two ways of computing them are apart.

Half precision rounds whatever is right. So a step is held to the truth, the same weights in a wider type, and to what
an obvious implementation in the same type is off by: it may be off by a few times as much.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOST = 3.0  # times the plain implementation's error
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Learned:
    """A step's loss, and the gradient of each parameter that has one."""

    loss: float
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, batch: dict[str, Any], forward: nn.Module | None = None) -> Learned:
        """Of `model`, called through `forward` if given."""
        model.zero_grad(set_to_none=True)
        loss = (model if forward is None else forward)(**batch, use_cache=False).loss
        loss.backward()
        found = {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return cls(float(loss.detach()), found)

    def error(self, truth: Learned) -> tuple[float, float, float]:
        """Relative: of the loss, of all gradients together, and of the parameter whose gradient is furthest off."""
        if self.gradients.keys() != truth.gradients.keys():
            odd = sorted(self.gradients.keys() ^ truth.gradients.keys())
            raise AssertionError(f"gradients of other parameters: {odd[:5]}")
        apart = {n: float((x.double() - truth.gradients[n]).square().sum()) for n, x in self.gradients.items()}
        sizes = {n: float(x.double().square().sum()) for n, x in truth.gradients.items()}
        whole = (sum(apart.values()) / sum(sizes.values())) ** 0.5
        worst = max((apart[n] / size) ** 0.5 for n, size in sizes.items() if size > 0)
        return abs(self.loss - truth.loss) / abs(truth.loss), whole, worst


def held(found: Learned, plain: Learned, truth: Learned) -> dict[str, Any]:
    """The errors of what was found and of a plain implementation.

    Raises:
        AssertionError: what was found is off by more than a few times as much.
    """
    ours, theirs = found.error(truth), plain.error(truth)
    names = ("loss", "gradients", "worst_gradient")
    record = {"error": dict(zip(names, ours, strict=True)), "plain_error": dict(zip(names, theirs, strict=True))}
    for name, a, b in zip(names, ours, theirs, strict=True):
        allowed = max(b, theirs[1])  # one number, such as the loss, may be right by chance
        if not a <= MOST * allowed:
            raise AssertionError(f"{name} off by {a:.2g}, a plain implementation by {allowed:.2g}: {record}")
    return {"numbers": record}


def in_wider(model: nn.Module) -> nn.Module:
    """The same weights in the next wider type."""
    gc.collect()
    return model.to(WIDER[next(model.parameters()).dtype])


def _whole(gradient: Tensor) -> Tensor:
    """Of a sharded one, too."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
