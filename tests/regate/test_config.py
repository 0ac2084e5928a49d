from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import regate


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep", 0.0), ("keep", 1.5), ("keep", -1), ("cycle", 0), ("full_steps", 129), ("full_steps", -1),
        ("warmup", -1), ("ema_decay", 1.0), ("student_weight", float("nan")),
        ("reference_weight", float("inf")), ("explore", -0.1), ("explore", 1.1), ("visual_keep", 0.0),
        ("selection", "best"), ("alignment", "token"), ("schedule", "cycle"), ("final_full_steps", 5),
        ("disable", "tail"), ("disable", 3), ("disable", (3,)), ("score", lambda m, ref: m), ("score", "m"),
        ("keep", "0.5"), ("warmup", 0.1), ("total_steps", 1e3), ("seed", None), ("explore", True),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(field: str, value: Any) -> None:
    wrong = "total_steps" if field == "final_full_steps" and value > 0 else field
    with pytest.raises(regate.RegateError, match=rf"Config\.{wrong} must be .*, got"):
        regate.Config(**{field: value})


def test_numbers_of_other_packages_are_numbers() -> None:
    assert regate.Config(keep=np.float32(0.5), warmup=np.int64(3)).is_full(2)


def test_schedule() -> None:
    config = regate.Config(warmup=2, cycle=4, full_steps=1, final_full_steps=1, total_steps=12, schedule="cycled")
    full = [config.is_full(step) for step in range(12)]
    assert full == [True, True, True, False, False, False, True, False, False, False, True, True]


def test_interleaved_steps_are_full_before_and_after_alone() -> None:
    settings: dict[str, Any] = {"warmup": 2, "final_full_steps": 1, "total_steps": 12, "schedule": "interleaved"}
    config = regate.Config(cycle=4, full_steps=1, **settings)
    assert [config.full_share(step) for step in range(12)] == [1.0, 1.0, *[0.25] * 9, 1.0]
    assert [step for step in range(12) if config.is_full(step)] == [0, 1, 11]
    always = regate.Config(cycle=4, full_steps=4, **settings)
    assert all(always.is_full(step) for step in range(12))


def test_defaults_are_the_papers() -> None:
    c = regate.Config()
    assert (c.cycle, c.full_steps, c.keep, c.warmup, c.ema_decay) == (128, 16, 0.5, 100, 0.9)
    assert (c.student_weight, c.reference_weight) == (1.0, 0.5)


def test_a_score_needs_a_weight() -> None:
    with pytest.raises(regate.RegateError, match=r"Config\.reference_weight must be other than 0 where student_weight"):
        regate.Config(student_weight=0.0, reference_weight=0.0)


def test_the_papers_settings_by_name() -> None:
    others = {
        "alignment": "predictor",
        "budget": "sample",
        "schedule": "cycled",
    }  # as the documentation of `Config` says
    assert regate.Config.paper() == regate.Config(**others)
    assert regate.Config.paper(keep=0.25, seed=3) == regate.Config(keep=0.25, seed=3, **others)


def test_exact_leaves_out_no_label_and_no_visual_token() -> None:
    config = regate.Config.exact(warmup=5)
    assert (config.keep, config.visual_keep, config.warmup) == (1.0, 1.0, 5)


@pytest.mark.parametrize("name", ["keep", "visual_keep"])
def test_exact_takes_no_share(name: str) -> None:
    with pytest.raises(regate.RegateError, match=rf"so {name} is 1, got 0\.5; regate\.Config\({name}=0\.5\) leaves"):
        regate.Config.exact(**{name: 0.5})
    assert getattr(regate.Config.exact(**{name: 1}), name) == 1


def test_scores_that_take_three() -> None:
    """A builtin does not say what it takes."""
    for score in (torch.add, lambda *x: x[0], lambda m, ref, prior, scale=2: m * scale, partial(max, 0)):
        assert regate.Config(score=score).score is score
