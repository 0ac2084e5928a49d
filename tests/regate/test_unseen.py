"""Around a gated step stands what keeps its decoder from being captured: named at the first step and at later ones."""

from __future__ import annotations

import functools
import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regate
from regate_patch import NoBlocksError
from tests.steps import assert_same, step
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("config", [FULL, SPARSE])
def test_a_mode_that_sees_each_operation(config: regate.Config, later: bool) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    gate = regate.apply(model, config, teacher=None)
    if later:
        step(model, batch)
    with FlopCounterMode(display=False), pytest.raises(NoBlocksError, match=r"FlopCounterMode.*gate\.report\(\)"):
        step(model, batch)
    step(model, batch)
    assert gate.report()["attention_blocks"]
    assert gate.report()["forwards_ungated"] == 0


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("config", [FULL, SPARSE])
def test_a_mode_under_which_the_decoder_may_run_dense(config: regate.Config, later: bool) -> None:
    model, batch = CORE["llava"].double(), CORE["llava"].batch("right")
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    gate = regate.apply(model, config, teacher=None, on_unsupported="warn")
    if later:
        step(model, batch)
    with FlopCounterMode(display=False) as counter:
        found = step(model, batch)
    assert counter.get_total_flops()
    assert "FlopCounterMode" in str(gate.report())
    assert gate.report()["forwards_ungated"] == 1
    calls = gate._parts.handle.statistics.calls
    step(model, batch)
    assert gate._parts.handle.statistics.calls > calls
    assert gate.report()["forwards_ungated"] == 1
    regate.remove(model)
    assert_same(found, step(model, batch))


def _stance() -> Any:
    return torch.compiler.set_stance("force_eager")


def _environment() -> Any:
    return mock.patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "1"})


def _configuration() -> Any:
    return torch._dynamo.config.patch(disable=True)


_MODE = functools.partial(FlopCounterMode, display=False)


@pytest.mark.parametrize("switched_off", [_stance, _environment, _configuration, _MODE], ids=range(4))
def test_what_was_switched_off_first_is_gated_once_it_is_on(switched_off: Any) -> None:
    torch._dynamo.reset()
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    gate = regate.apply(model, SPARSE, teacher=None, on_unsupported="warn")
    with switched_off():
        step(model, batch)
    assert gate.report()["forwards_ungated"] == 1
    step(model, batch)
    report = gate.report()
    assert report["forwards_ungated"] == 1
    assert report["attention_blocks"] == 2
    assert report["flops_computed"] < report["flops_dense"]


@pytest.mark.parametrize("on_unsupported", ["raise", "warn"])
def test_a_transform_of_its_gradient(on_unsupported: Any) -> None:
    model, batch = CORE["llava"].build(attn_implementation="eager"), CORE["llava"].batch("right")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> Any:
        return torch.func.functional_call(model, parameters, (), batch).loss

    expected = torch.func.grad(loss)(parameters)
    gate = regate.apply(model, FULL, teacher=None, on_unsupported=on_unsupported)
    if on_unsupported == "raise":
        with pytest.raises(NoBlocksError, match=r"transform of torch\.func.*functional_call returns"):
            torch.func.grad(loss)(parameters)
        learning = {name: p.requires_grad_() for name, p in parameters.items()}
        made = torch.autograd.grad(loss(learning), list(learning.values()), allow_unused=True, materialize_grads=True)
        found = dict(zip(learning, made, strict=True))
    else:
        found = torch.func.grad(loss)(parameters)
        assert gate.report()["forwards_ungated"] == 1
        model(**batch)
        assert gate.report()["forwards_ungated"] == 1
        assert "transform of torch.func" in str(gate.report())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
