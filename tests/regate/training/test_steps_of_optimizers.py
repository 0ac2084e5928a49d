"""Updates beside torch's optimizers and within their steps; what is none: loading, making states, a step that fails."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import regate
from tests.steps import by_data, by_hand
from tests.zoo import CORE

TWO = regate.Config(warmup=2, cycle=100, full_steps=0)
BATCH = CORE["llava"].batch("none", rows=1)


def test_updates_by_hand_after_an_optimizer_stepped() -> None:
    """The first of them may be a part of the optimizer's next step; with the second both are counted."""
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer, by_hand, steps = torch.optim.SGD(model.parameters(), lr=1e-3), by_data(model), []
    for update in 2 * [lambda: (optimizer.step(), optimizer.zero_grad())] + 4 * [by_hand]:
        model(**BATCH).loss.backward()
        steps.append(gate.step)
        update()
    model(**BATCH)
    assert [*steps, gate.step] == [0, 1, 2, 2, 4, 5, 6]


def test_parameters_moved_there_and_back_within_a_step() -> None:
    """Sharpness-aware minimisation: gradients where the loss is steepest nearby, applied where the parameters were."""
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=1e-3), []
    model(**BATCH).loss.backward()
    optimizer.step()
    for _ in range(3):
        model(**BATCH).loss.backward()
        steps.append(gate.step)
        before = [p.detach().clone() for p in model.parameters()]
        by_hand(model)()
        model(**BATCH).loss.backward()
        steps.append(gate.step)
        for p, x in zip(model.parameters(), before, strict=True):
            p.data.copy_(x)
        optimizer.step()
        optimizer.zero_grad()
    assert steps == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_parameters_moved_there_and_back_from_the_first_step_on(ahead: int, micro_batches: int) -> None:
    """Adversarial perturbations of weights, one or several in a row, before any optimizer has said a step."""
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(3):
        for _ in range(micro_batches):
            model(**BATCH).loss.backward()
            steps.append(gate.step)
            before = [p.detach().clone() for p in model.parameters()]
            for _ in range(ahead):
                for p in model.parameters():
                    p.data.add_(torch.randn_like(p), alpha=1e-3)
                model(**BATCH).loss.backward()
            for p, x in zip(model.parameters(), before, strict=True):
                p.data.copy_(x)
        optimizer.step()
        optimizer.zero_grad()
    model(**BATCH)
    assert [*steps, gate.step] == [step for step in range(3) for _ in range(micro_batches)] + [3]


def _drawn(model: nn.Module, update: Callable[[], None]) -> None:
    """Gradients at weights drawn around the parameters, which are put back: variational methods, as IVON."""
    saved = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=1e-4)
    update()
    with torch.no_grad():
        for p, x in zip(model.parameters(), saved, strict=True):
            p.copy_(x)


def _noisy(model: nn.Module, update: Callable[[], None]) -> None:
    """Noise that is added and taken off, but for the last digit."""
    noise = [1e-3 * torch.randn_like(p) for p in model.parameters()]
    with torch.no_grad():
        for p, x in zip(model.parameters(), noise, strict=True):
            p.add_(x)
    update()
    with torch.no_grad():
        for p, x in zip(model.parameters(), noise, strict=True):
            p.sub_(x)


@pytest.mark.parametrize("way", [_drawn, _noisy])
@pytest.mark.parametrize("later", [False, True], ids=["from the first step on", "later"])
def test_weights_drawn_for_each_forward_are_part_of_the_optimizers_step(way: Any, later: bool) -> None:
    """What was counted for them since it stepped is taken back, and from then on nothing is."""
    model: Any = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen: list[int] = []

    def forward() -> None:
        model(**BATCH).loss.backward()
        seen.append(gate.step)

    first = 0 if later else 3  # nobody has said then that there is an optimizer
    unsettled = {2} if later else {0, 1}  # the first with drawn weights, once there is an optimizer
    for step in range(5):
        seen.clear()
        for _ in range(4):
            forward() if later and step < 2 else way(model, forward)
        optimizer.step()
        optimizer.zero_grad()
        assert gate.step == first + step
        assert step in unsettled or seen == [first + step] * 4


def test_an_optimizer_beside_updates_by_hand_counts_alone() -> None:
    """By hand after every forward, by the optimizer after every third."""
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.SGD(model.model.language_model.parameters(), lr=1e-3)
    for step in range(4):
        seen = []
        for _ in range(3):
            model(**BATCH).loss.backward()
            seen.append(gate.step)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "language_model" not in name and p.grad is not None:
                        p.sub_(p.grad, alpha=1e-3)
        optimizer.step()
        model.zero_grad()
        assert gate.step == 2 + step  # nobody had said in the first that there is an optimizer
        assert step < 2 or seen == [2 + step] * 3


def test_updates_by_hand_after_a_step_that_failed() -> None:
    """An optimizer whose `step` raised is no longer stepping."""
    model: Any = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    model(**BATCH).loss.backward()
    with pytest.raises(ZeroDivisionError):
        torch.optim.SGD(model.parameters(), lr=1e-3).step(lambda: 1 / 0)
    update = by_hand(model)
    for _ in range(3):
        model(**BATCH).loss.backward()
        update()
    model(**BATCH)
    assert gate.step == 3


def test_each_step_is_told_once_also_those_that_are_found_late() -> None:
    """Ranks exchange, and a guard closes, by the number of steps."""
    model: Any = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    told: list[int] = []
    steps = gate._attached.steps
    steps._on_step = lambda: told.append(steps.step)
    optimizer, update = torch.optim.SGD(model.parameters(), lr=1e-3), by_hand(model)
    for each in (optimizer.step, update, update, update):
        model(**BATCH).loss.backward()
        each()
        optimizer.zero_grad()
    model(**BATCH)
    assert told == [0, 1, 2, 3]


def test_gates_that_are_gone_leave_no_hook() -> None:
    hooks = torch.optim.Optimizer.__init__.__globals__["_global_optimizer_pre_hooks"]
    others = set(hooks)  # of earlier tests' gates, which may go at any moment
    gate = regate.apply(CORE["llava"].build(), TWO, teacher=None)
    own = set(hooks) - others
    assert len(own) == 1
    del gate
    gc.collect()
    assert not own & set(hooks)


def test_a_long_training_by_hand_is_not_taken_back() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, regate.Config(warmup=200), teacher=None)
    optimizer, update = torch.optim.SGD(model.parameters(), lr=1e-3), by_hand(model)
    model(**BATCH).loss.backward()
    optimizer.step()
    for _ in range(70):
        model(**BATCH).loss.backward()
        update()
    model(**BATCH).loss.backward()
    optimizer.step()
    assert gate.state_dict()["step"] == 72


def test_a_closure_that_is_called_often_is_one_step() -> None:
    model: Any = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=3)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss: Tensor = model(**BATCH).loss
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    model(**BATCH)
    assert calls > 3
    assert gate.step == 3


def test_a_step_on_no_gradient_is_none() -> None:
    """As where a loop steps after every micro-batch, and skips the gradients of some."""
    model: Any = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(4):
        model(**BATCH).loss.backward()
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad()
    model(**BATCH)
    assert gate.step == 4


@pytest.mark.parametrize("known", [False, True], ids=["before the first step", "after an optimizer stepped"])
def test_values_that_are_loaded_are_no_update(known: bool) -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    other = {name: x.clone() + 1 for name, x in model.state_dict().items()}
    if known:
        model(**BATCH).loss.backward()
        optimizer.step()
    for _ in range(3):
        model(**BATCH)
        model.load_state_dict(other)
        nn.ModuleList([model]).load_state_dict({f"0.{name}": x - 1 for name, x in other.items()})
        optimizer.load_state_dict(optimizer.state_dict())
        model(**BATCH)
        assert gate.step == known


def test_an_update_before_values_are_loaded_counts() -> None:
    """As of weights that are averaged, put in for evaluation."""
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    averaged = {name: x.clone() for name, x in model.state_dict().items()}
    model(**BATCH).loss.backward()
    by_hand(model)()
    trained = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(averaged)
    model.load_state_dict(trained)
    model(**BATCH)
    assert gate.step == 1


def test_making_an_optimizers_states_is_no_step() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(3):
        model(**BATCH).loss.backward()
        assert gate.step == step
        optimizer.step()
        optimizer.zero_grad()
        get_optimizer_state_dict(model, optimizer)  # of an optimizer without states it makes some at every call
    assert gate.report()["steps_missed"] == 0


def test_what_is_no_update() -> None:
    """Another dtype, other parameters that learn; and a state asked for right after an update has it."""
    model = CORE["llava"].build()
    gate = regate.apply(model, TWO, teacher=None)
    model(**BATCH)
    model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in BATCH.items()}
    model(**batch)
    model.model.vision_tower.requires_grad_(False)
    model(**batch).loss.backward()
    assert gate.state_dict()["step"] == 0
    by_hand(model)()
    assert gate.state_dict()["step"] == 1
