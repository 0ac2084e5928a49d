"""Logits that a training forward did not make: whoever reads them is told, wherever they stand in an output."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regate
from regate.errors import LogitsError
from tests import oracle
from tests.steps import assert_same, step
from tests.zoo import CORE, members
from tests.zoo.releases import case

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def _made(padding: Any, name: str = "llava") -> tuple[Any, dict[str, Any]]:
    torch._dynamo.reset()
    return CORE[name].build().double(), oracle.double(CORE[name].batch(padding))


def test_logits_that_were_not_made_say_so() -> None:
    model, batch = _made("right")
    regate.apply(model, FULL, teacher=None)
    logits = model(**batch).logits
    assert logits.shape == (*batch["labels"].shape, 100)
    assert logits.float().detach().dtype == torch.float32  # passing them on is no reading
    for read in (lambda: logits[:, -1], lambda: logits.argmax(-1), lambda: logits + 1, lambda: float(logits.sum())):
        with pytest.raises(LogitsError, match=r"regate\.Config\(logits='all'\)"):
            read()
    with pytest.raises(LogitsError, match="do not exist"):
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("name", [case("blip-2")])
def test_logits_within_an_output_say_so_too(name: str) -> None:
    model, batch = members()[name].build(), members()[name].batch("right")
    regate.apply(model, FULL, teacher=None)
    inner = model(**batch).language_model_outputs.logits
    assert inner.shape == (*batch["labels"].shape, 100)
    with pytest.raises(LogitsError, match=r"regate\.Config\(logits='all'\)"):
        inner.float().mean()


@dataclass(frozen=True)
class _Own:
    loss: Tensor
    scores: Tensor


@dataclass(slots=True)
class _Slots:
    loss: Tensor
    scores: Tensor


class _Named(NamedTuple):
    loss: Tensor
    scores: Tensor


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("made", "read"),
    [
        pytest.param(lambda o: [o.loss, o.logits], lambda output: (output[0], output[1]), id="list"),
        pytest.param(
            lambda o: {"loss": o.loss, "scores": o.logits}, lambda o: (o["loss"], o["scores"]), id="another name"
        ),
        pytest.param(lambda o: {"loss": o.loss, 0: o.logits}, lambda o: (o["loss"], o[0]), id="no name"),
        pytest.param(lambda o: _Named(o.loss, o.logits), lambda o: (o.loss, o.scores), id="named tuple"),
        pytest.param(lambda o: _Own(o.loss, o.logits), lambda o: (o.loss, o.scores), id="frozen"),
        pytest.param(lambda o: _Slots(o.loss, o.logits), lambda o: (o.loss, o.scores), id="slots"),
    ],
)
def test_logits_in_outputs_of_ones_own_say_so(made: Any, read: Any) -> None:
    model, batch = _made("right")
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: made(forward(*args, **kwargs)))
    expected = step(model, batch, lambda output: read(output)[0])
    regate.apply(model, FULL, teacher=None)
    assert_same(step(model, batch, lambda output: read(output)[0]), expected)
    logits = read(model(**batch))[1]
    assert logits.shape == (*batch["labels"].shape, 100)
    with pytest.raises(LogitsError, match=r"regate\.Config\(logits='all'\)"):
        logits.float().mean()
    regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0, logits="all"), teacher=None)
    with pytest.raises(LogitsError, match=r"gate\.last\.labels_left"):
        read(model(**batch))[1].pow(2).mean().backward()


def test_logits_in_a_tuple_are_watched() -> None:
    model, batch = _made("right")
    gate = regate.apply(model, SPARSE, teacher=None)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert gate.last is not None
    with pytest.raises(LogitsError, match=r"gate\.last\.labels_left"):
        (loss + logits.pow(2).mean()).backward()


def test_a_loss_outside_must_take_the_labels_that_are_kept() -> None:
    """On sparse steps: logits at the others mean nothing, and a gradient that comes from there is an error."""
    model, batch = _made("right")
    config = regate.Config(warmup=0, cycle=1, full_steps=0, logits="all")
    gate = regate.apply(model, config, teacher=None)

    def outside(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    output = model(**batch)
    with pytest.raises(LogitsError, match=r"gate\.last\.labels_left"):
        outside(output.logits, batch["labels"]).backward()
    output = model(**batch)
    assert gate.last is not None
    loss = outside(output.logits, gate.last.labels_left)
    loss.backward()
    torch.testing.assert_close(loss.float(), output.loss.float())
