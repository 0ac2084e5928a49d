"""Runs of a model that are compared: what they are compared by, and what they take of the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from regate.proof import trial
from regate.proof.trial import Run, agree, agree_by_chance, agree_on_output
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)


def _ran(*behind: Tensor, eps: float = 2.0**-7) -> Run:
    return Run(torch.ones(()), torch.ones(1, 2, 3), [], [], list(behind), None, eps)


def test_gradients_that_are_noise_are_held_to_as_much_noise() -> None:
    """What rounding the embeddings changes of a deep decoder's queries is no fault of the engine; more than that is."""
    values = torch.ones(100)
    own, shaken = _ran(values, values), _ran(values, values + 0.1)
    near, far = _ran(values, values - 0.15), _ran(values - 0.15, values)
    assert not agree(near, own)
    assert agree_on_output(near, own)
    assert agree_by_chance(near, own, shaken)
    assert not agree_by_chance(far, own, shaken)  # another gradient, which shaking leaves alone
    assert not agree_by_chance(near, own, _ran())


@pytest.mark.parametrize(("precision", "eps"), [("highest", 2.0**-23), ("high", 2.0**-10), ("medium", 2.0**-7)])
def test_products_of_float32_that_are_made_of_less(precision: str, eps: float) -> None:
    device_eps = {"high": 2.0**-10}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        _, found = trial._computed_in(torch.ones(1))
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == device_eps.get(precision, eps)


def test_shaken_embeddings_change_what_rounding_changes() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    own = model(**batch).loss.detach()
    with trial._shaken(model, batch, 2.0**-23) as call:
        off = model(**call).loss.detach()
    assert 0 < abs(float(off - own)) < 1e-4
    assert float(model(**batch).loss) == float(own)


class _InPlace(torch.autograd.Function):
    """Twice as much; its backward pass writes into what it is given, as Liger's norm does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.mul_(2)


def test_a_kernel_that_writes_into_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the decoder's output the gradient is what the head sends, whatever the decoder's last kernel makes of it."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    seen: list[trial.Run] = []
    own = trial.run

    def run(*args: Any, **options: Any) -> trial.Run | None:
        found = own(*args, **options)
        seen.extend([found] if found is not None and args[1] is None else [])
        return found

    monkeypatch.setattr(trial, "run", run)
    norm = model.model.language_model.norm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: _InPlace.apply(forward(x) / 2))
    regate.apply(model, FULL, teacher=None)
    model(**batch)
    written = seen[-1].by_hidden
    monkeypatch.setattr(norm, "forward", forward)
    plain = CORE["llava"].build()
    plain.load_state_dict(model.state_dict())
    seen.clear()
    regate.apply(plain, FULL, teacher=None)
    plain(**batch)
    torch.testing.assert_close(written, seen[-1].by_hidden)


def test_a_device_without_room_for_the_untouched_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs again, and what is saved waits on the host; weights do not."""
    asked: list[dict[str, Any]] = []
    own = trial.run

    def run(*args: Any, **options: Any) -> Run | None:
        asked.append(options)
        if args[1] is None and not options.get("offloaded") and "output" not in options:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*args, **options)

    monkeypatch.setattr(trial, "run", run)
    torch._dynamo.reset()
    model = CORE["llava"].build()
    gate = regate.apply(model, FULL, teacher=None)
    model(**CORE["llava"].batch("right"))
    assert any(options.get("offloaded") for options in asked)
    assert "vocabulary projection" not in str(gate.report())


def test_weights_do_not_wait_on_the_host() -> None:
    layer, copied = nn.Linear(3, 3), []
    x = torch.ones(2, 3, requires_grad=True)
    cpu = Tensor.cpu
    with pytest.MonkeyPatch.context() as patched, trial._on_host(layer):
        patched.setattr(Tensor, "cpu", lambda self: copied.append(self.shape) or cpu(self))
        output = layer(layer(x))
    output.sum().backward()
    assert copied == [(2, 3), (2, 3)]
    assert x.grad is not None


def test_a_gated_step_without_room_is_an_error() -> None:
    def run() -> Run:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        trial.tried(run)
    assert trial.tried(lambda: replace(_ran(), eps=1.0))[1] is None
