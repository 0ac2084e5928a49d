"""Losses of labels from whatever a model's forward returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regate
from regate.errors import LogitsError
from tests.zoo import CORE

FULL = regate.Config(warmup=9, logits="all")


def test_a_fused_loss_leaves_no_logits() -> None:
    """Liger's forward returns a loss and no logits: difficulties are the same all the same."""
    stored = []
    for fused in (False, True):
        model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
        gate = regate.apply(model, FULL, teacher=None)
        if fused:
            forward = model.forward

            def without_logits(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                output.logits = None
                return output

            model.forward = without_logits
        model(**batch).loss.backward()
        gate.flush()
        stored.append(dict(gate.store.items("difficulty")))
    assert stored[0].keys() == stored[1].keys()
    for key, losses in stored[0].items():
        torch.testing.assert_close(torch.from_numpy(stored[1][key]), torch.from_numpy(losses), atol=2e-3, rtol=0)


def test_logits_of_another_length() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    regate.apply(model, FULL, teacher=None)
    forward = model.forward

    def shorter(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.logits = output.logits[:, -3:]
        return output

    model.forward = shorter
    with pytest.raises(LogitsError, match=r"its output has \{'logits': \[2, 3, 100\]\}"):
        model(**batch)
