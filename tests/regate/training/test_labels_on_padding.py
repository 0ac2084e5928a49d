"""Labels that are the ids, as collators make them that copy `input_ids`: some stand on padding, or padding predicts
them. Full steps train on them as the model does; they are no sample's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regate
from regate_patch import reference
from tests import oracle
from tests.steps import assert_same, step
from tests.zoo import CORE
from tests.zoo.common import IMAGE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
PAD = 2  # the end-of-sequence token, with an embedding that is not zero


def _made() -> Any:
    torch._dynamo.reset()
    return CORE["llava"].double()


def _batch(padding: Any, *, seed: int = 0, masked: bool) -> dict[str, Tensor]:
    """Ids as labels; `masked`: not on padding, which then still predicts a row's first token where it is left."""
    batch = oracle.double(CORE["llava"].batch(padding, seed=seed))
    ids = batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, PAD)
    batch["labels"] = ids.masked_fill(ids == IMAGE, -100)
    if masked:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize(("padding", "masked"), [("right", False), ("left", False), ("left", True)])
def test_full_steps_are_the_unpatched_model(padding: Any, masked: bool) -> None:
    """Also where the first batch, on which the proof is made, has no padding."""
    model, batch = _made(), _batch(padding, seed=5, masked=masked)
    dense = step(model, batch)
    gate = regate.apply(model, FULL, teacher=None)
    step(model, _batch("none", masked=masked))
    assert_same(step(model, batch), dense)
    assert "labels stand on padding" in str(gate.report())
    assert gate.last is not None
    assert torch.equal(gate.last.labels_left[:, 1:], batch["labels"][:, 1:])


@pytest.mark.parametrize(("padding", "masked"), [("right", False), ("left", False), ("left", True)])
def test_sparse_steps_leave_them_out(padding: Any, masked: bool) -> None:
    model, batch = _made(), _batch(padding, masked=masked)
    gate = regate.apply(model, SPARSE, teacher=None)
    got, last = step(model, batch), gate.last
    assert last is not None
    inside = batch["attention_mask"].bool()
    assert not (last.kept & ~(inside & inside.roll(1, 1))).any()
    regate.remove(model)
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), last.active):
        assert_same(got, step(model, batch | {"labels": last.labels_left}))


@pytest.mark.parametrize(("padding", "masked"), [("right", False), ("left", False), ("left", True)])
def test_a_sample_is_itself_whatever_its_padding(padding: Any, masked: bool) -> None:
    model, batch = _made(), _batch(padding, masked=masked)
    gate = regate.apply(model, SPARSE)
    step(model, batch)
    inside = batch["attention_mask"][0].bool()
    alone = {name: x[:1] if name == "pixel_values" else x[:1, inside] for name, x in batch.items()}
    step(model, alone)
    gate.flush()
    assert gate.store.stats()["difficulty"] == len(batch["labels"])


def test_a_packed_sample_is_itself_wherever_it_stands() -> None:
    """Its first label is no one's in any place, the first of the row's among them."""
    model, batch = _made(), _batch("none", masked=True)
    gate = regate.apply(model, FULL, teacher=None)
    position_ids = torch.arange(batch["labels"].shape[1]).repeat(2)[None]
    for order in ([0, 1], [1, 0]):
        row = {name: batch[name][order].reshape(1, -1) for name in ("input_ids", "labels")}
        model(**row, position_ids=position_ids, pixel_values=batch["pixel_values"][order])
    gate.flush()
    assert gate.store.stats()["difficulty"] == 2
