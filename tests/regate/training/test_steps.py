"""An update is an update, whoever makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from regate.training.steps import some_values
from tests.steps import by_data, by_hand
from tests.zoo import CORE

TWO = regate.Config(warmup=2, cycle=100, full_steps=0)
BATCH = CORE["llava"].batch("none", rows=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return CORE["llava"].build()


def _new_tensors(model: nn.Module) -> Callable[[], None]:
    def step() -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.data = p.data - 1e-3 * p.grad
                p.grad = None

    return step


def _new_parameters(model: nn.Module) -> Callable[[], None]:
    """As functional optimizers do that write their result into the model."""

    def step() -> None:
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.grad is not None:
                    setattr(module, name, nn.Parameter(p.detach() - 1e-3 * p.grad))

    return step


def _in_backward(model: nn.Module) -> Callable[[], None]:
    """As LOMO does: each parameter as soon as its gradient is there, and no gradient is kept."""

    def update(p: Tensor) -> None:
        assert p.grad is not None
        p.data.add_(p.grad, alpha=-1e-3)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    return lambda: None


def _one_each(model: nn.Module) -> Callable[[], None]:
    """An optimizer for each parameter, stepped in the backward pass."""
    optimizers = {p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    return lambda: None


def _two(model: nn.Module) -> Callable[[], None]:
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(parameters[:9], lr=1e-3), torch.optim.AdamW(parameters[9:], lr=1e-3)]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


WAYS = [by_data, by_hand, _new_tensors, _new_parameters, _in_backward, _one_each, _two]


@pytest.mark.few(5)
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another model's optimizer"])
@pytest.mark.parametrize("way", WAYS)
def test_an_update_is_a_step(way: Callable[[nn.Module], Callable[[], None]], others: bool) -> None:
    model = CORE["llava"].build()
    other = nn.Linear(2, 2)
    discriminator = torch.optim.SGD(other.parameters(), lr=0.1)
    gate = regate.apply(model, TWO, teacher=None)
    update = way(model)
    full = []
    for _ in range(4):
        if others:
            other(torch.ones(2)).sum().backward()
            discriminator.step()
        model(**BATCH).loss.backward()
        assert gate.last is not None
        full.append(gate.last.full)
        if others:
            discriminator.step()
        update()
    assert full == [True, True, False, False]


def test_micro_batches_of_an_update_by_hand() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    update = by_hand(model)
    steps = []
    for _ in range(3):
        for _ in range(2):
            model(**BATCH).loss.backward()
            steps.append(gate.step)
        update()
    assert steps == [0, 0, 1, 1, 2, 2]


def _notes(gate: regate.Gate) -> list[str]:
    return [line for line in str(gate.report()).splitlines() if line.startswith("note")]


def test_that_no_step_was_seen_is_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regate.training.steps._QUIET", 3)
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    for _ in range(3):
        model(**BATCH)
    assert not _notes(gate)
    for _ in range(3):
        model(**BATCH)
    (note,) = _notes(gate)
    assert "no optimizer step was seen in 3 gated forwards" in note
    assert "gate.step += 1" in note


@pytest.mark.parametrize("way", [by_hand, lambda model: torch.optim.SGD(model.parameters(), lr=1e-3).step, None])
def test_a_step_that_was_seen_or_told_needs_no_note(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regate.training.steps._QUIET", 3)
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    update = way and way(model)
    for i in range(6):
        loss = model(**BATCH).loss
        if i == 1:
            loss.backward()
            if update is None:
                gate.step += 1
            else:
                update()
    assert gate.step == 1
    assert not _notes(gate)


def test_updates_before_the_first_forward_do_not_count() -> None:
    """Optimizers make their state by a step of learning rate zero."""
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    model(**BATCH).loss.backward()
    assert gate.step == 0


def test_some_values_see_any_change(model: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module = nn.Linear(64, 64).to(dtype)
        (_, before), (_, again) = some_values(module), some_values(module)
        assert torch.equal(before, again)
        with torch.no_grad():
            module.weight[5, 7] = torch.nextafter(module.weight[5, 7], torch.tensor(9.0, dtype=dtype))
        assert not torch.equal(before, some_values(module)[1])
    assert len(some_values(model)[0]) <= 8
    assert len(some_values(nn.Linear(2**10, 2**10))[1]) <= 2**16 + 2**10
    assert some_values(nn.ReLU())[1].numel() == 0
