"""What `regate.apply` does not take, it says: nothing that was asked for is passed over."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import regate
from regate.api import gate_of
from regate.errors import ConfigError, UnknownArchitectureError
from regate_patch import NotElidedError, UnknownBackendError
from tests.zoo import CORE


@pytest.mark.parametrize("model", [None, [], "llava"])
def test_a_model_is_a_module(model: Any) -> None:
    with pytest.raises(UnknownArchitectureError, match=r"got \w+; a trainer's is trainer\.model"):
        regate.apply(model)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"config": {"keep": 0.5}}, ConfigError, r"regate\.Config\(keep=\.\.\., \.\.\.\), got dict"),
        ({"teacher": "4bits"}, ConfigError, "'4bit', 'first', 'precomputed'.*got '4bits'"),
        ({"teacher": 3, "config": regate.Config(keep=1.0)}, ConfigError, "got 3"),
        ({"on_unsupported": "ignore"}, ConfigError, "'raise', 'warn'"),
        ({"backend": "induktor"}, UnknownBackendError, "'induktor'; torch has .*'inductor'"),
    ],
)
def test_a_choice_is_one_of_those_there_are(asked: dict[str, Any], error: type[Exception], said: str) -> None:
    model = CORE["llava"].build()
    with pytest.raises(error, match=said):
        regate.apply(model, **asked)
    assert gate_of(model) is None
    assert "forward" not in vars(model.model.language_model)


def test_what_cannot_be_set_on_a_gate() -> None:
    gate = regate.apply(CORE["llava"].build())
    with pytest.raises(ConfigError, match=r"regate\.apply\(model, config, store=gate\.store\)"):
        gate.config = regate.Config(keep=0.25)
    for step in (-1, "3"):
        with pytest.raises(ConfigError, match="from 0, got"):
            gate.step = step  # type: ignore[assignment]
    assert gate.step == 0


@pytest.mark.parametrize("logits", ["kept", "all"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_decoder_that_is_replaced_later(logits: Any, steps: int) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    regate.apply(model, regate.Config(warmup=1000, logits=logits), teacher=None)
    for _ in range(steps):
        model(**batch).loss.backward()
    model.model.language_model = copy.deepcopy(model.model.language_model)
    with pytest.raises(NotElidedError, match=r"was replaced after regate.apply.*call regate.apply\(model\) again"):
        model(**batch)
    regate.apply(model, teacher=None)
    model(**batch).loss.backward()
