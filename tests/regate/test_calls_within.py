"""Models that call themselves, or their decoder, once more within a training forward; and forwards that run twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import regate
from regate.errors import UnknownArchitectureError
from tests import oracle
from tests.steps import assert_same, step
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def _generates(model: Any, usual: Any, call: dict[str, Any]) -> Any:
    prompt = {name: x if name == "pixel_values" else x[:, :9] for name, x in call.items()}
    with torch.no_grad():
        model.generate(**prompt, max_new_tokens=2, do_sample=False)
    return 0.0


def _another_view(model: Any, usual: Any, call: dict[str, Any]) -> Any:
    with torch.no_grad():
        model(**call | {"pixel_values": 0 * call["pixel_values"]})
    return 0.0


def _text_alone(model: Any, usual: Any, call: dict[str, Any]) -> Any:
    with torch.no_grad():
        text = usual.forward(model, input_ids=call["input_ids"][:, 8:], attention_mask=call["attention_mask"][:, 8:])
    return 0.1 * text.logits.pow(2).mean()


def _with_gradients(model: Any, usual: Any, call: dict[str, Any]) -> Any:
    return model(**call).logits.mean()


def _made(within: Any) -> tuple[Any, dict[str, Any]]:
    torch._dynamo.reset()
    model = CORE["llava"].double()
    usual = type(model)

    class Own(usual):  # type: ignore[valid-type, misc]
        def forward(
            self,
            input_ids: Any = None,
            pixel_values: Any = None,
            attention_mask: Any = None,
            labels: Any = None,
            **others: Any,
        ) -> Any:
            call = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
            extra = 0.0 if labels is None else within(self, usual, call)
            output = usual.forward(self, **call, labels=labels, **others)
            if labels is not None:
                output.loss = output.loss + extra
            return output

    model.__class__ = Own
    return model, oracle.double(CORE["llava"].batch("none"))


@pytest.mark.parametrize("within", [_generates, _another_view, _text_alone])
def test_calls_without_gradients(within: Any) -> None:
    model, batch = _made(within)
    dense = step(model, batch)
    gate = regate.apply(model, FULL, teacher=None)
    for _ in range(2):
        assert_same(step(model, batch), dense)
    assert gate.report()["labels_seen"] == 2 * int((batch["labels"] != -100).sum())
    gate = regate.apply(model, SPARSE, teacher=None)
    loss, gradients = step(model, batch)
    last = gate.last
    assert last is not None
    assert 0 < int(last.active.sum()) < batch["labels"].numel()
    plain, _ = _made(lambda *others: 0.0)
    regate.apply(plain, SPARSE, teacher=None)
    expected, by_expected = step(plain, batch)
    expected = expected + within(plain, type(plain).__base__, {k: v for k, v in batch.items() if k != "labels"})
    assert_same((loss, gradients), (expected.detach(), by_expected))


def test_a_call_with_gradients_is_refused() -> None:
    model, batch = _made(_with_gradients)
    regate.apply(model, SPARSE, teacher=None)
    for _ in range(2):
        with pytest.raises(UnknownArchitectureError, match="calls itself within a training forward"):
            model(**batch)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_whole_forward_that_is_checkpointed(use_reentrant: bool) -> None:
    """It runs again in the backward pass. A reentrant checkpoint's first run has no gradients, and is not gated."""
    model, batch = _made(lambda *others: 0.0)
    gate = regate.apply(model, SPARSE, teacher=None)
    pixels = batch.pop("pixel_values").requires_grad_()

    def run(pixels: Tensor) -> Any:
        return model(**batch, pixel_values=pixels).loss

    def step() -> None:
        loss: Any = checkpoint(run, pixels, use_reentrant=use_reentrant)
        loss.backward()

    if use_reentrant:
        step()
        assert gate.report()["labels_seen"] == int((batch["labels"] != -100).sum())
        return
    for _ in range(2):  # before and after the proof, which goes backward within the first forward
        with pytest.raises(UnknownArchitectureError, match="Checkpoint its layers instead"):
            step()
        run(pixels).backward()
