"""One training step of a model, gated or not, as what can be compared; and updates that no optimizer makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Step = tuple[Tensor, dict[str, Tensor]]


def step(model: Any, batch: dict[str, Any], loss: Callable[[Any], Tensor] = lambda output: output.loss) -> Step:
    """The loss of a forward and its gradients by parameter; `loss` finds it in the output."""
    model.zero_grad(set_to_none=True)
    value = loss(model(**batch))
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: Step, expected: Step) -> None:
    """Of models in float64: the same parameters have gradients, and they are equal."""
    torch.testing.assert_close(got[0], expected[0], atol=2e-6, rtol=0)  # transformers' losses are float32
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-8, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def by_data(model: nn.Module) -> Callable[[], None]:
    """Updates the model's parameters past autograd, and their gradients are gone."""

    def step() -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.data -= 1e-3 * p.grad
                p.grad = None

    return step


def by_hand(model: nn.Module) -> Callable[[], None]:
    """Updates them in place, without an optimizer, and their gradients are gone."""

    @torch.no_grad()
    def step() -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-3)
                p.grad = None

    return step
