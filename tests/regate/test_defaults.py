"""Defaults that a script sets for the tensors it makes are not the gate's: what it decides is as it was without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import regate
from model_adapters import find_adapter
from regate.scoring.selection import keep_highest
from tests.zoo import CORE

FULL_THEN_SPARSE = regate.Config(warmup=1, cycle=1, full_steps=0, explore=0.2)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _trained(teacher: Any, default: contextlib.AbstractContextManager[None]) -> list[Any]:
    """What is kept in a full step and two sparse ones under this default, and what the store has then."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    with default:
        gate = regate.apply(model, FULL_THEN_SPARSE, teacher=teacher)
        if teacher is not None:
            gate.precompute([batch], progress=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        found = []
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert gate.last is not None
            found.append(gate.last.kept.tolist())
        gate.flush()
        assert gate.report()["attention_blocks"]
    tables: tuple[Any, ...] = ("reference", "difficulty")
    return found + [{key: x.tolist() for key, x in gate.store.items(table)} for table in tables]


def _assert_alike(found: list[Any], expected: list[Any]) -> None:
    assert found[:3] == expected[:3]
    for got, known in zip(found[3:], expected[3:], strict=True):
        assert got.keys() == known.keys()
        for key, losses in known.items():
            assert got[key] == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "teacher"), [(torch.bfloat16, "copy"), (torch.float64, "copy"), (torch.float16, None)]
)
def test_another_default_dtype_changes_no_choice(dtype: torch.dtype, teacher: Any) -> None:
    expected = _trained(teacher, contextlib.nullcontext())
    _assert_alike(_trained(teacher, _default_dtype(dtype)), expected)


@contextlib.contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("teacher", ["copy", None])
def test_another_default_device_changes_nothing(teacher: Any) -> None:
    """What is made on "meta", which stands for an accelerator here, has no values."""
    expected = _trained(teacher, contextlib.nullcontext())
    _assert_alike(_trained(teacher, _default_device("meta")), expected)


def test_full_turns_packed_rows_and_visible_positions_on_another_default_device() -> None:
    config = regate.Config(warmup=0, cycle=4, full_steps=1, elided="visible", visual_keep=0.5)
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=4)
    row = {name: batch[name].view(1, -1) for name in ("input_ids", "labels")}
    row["position_ids"] = torch.arange(batch["labels"].shape[1]).repeat(4)[None]
    row["pixel_values"] = batch["pixel_values"]
    regate.apply(model, config, teacher=None)
    with _default_device("meta"):
        for call in (batch, row, batch):
            model(**call).loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_no_count(dtype: torch.dtype) -> None:
    """Of more labels than bfloat16 can count."""
    candidates = torch.ones(1, 1001, dtype=torch.bool)
    with _default_dtype(dtype):
        assert int(keep_highest(torch.rand(1, 1001), candidates, 0.5).sum()) == 501


def test_adapters_may_count_on_the_default_device() -> None:
    """Some run the model's encoder to tell where its tokens stand."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    own, seen = find_adapter(model), []

    def layout(of: Any, batch: Any) -> Any:
        seen.append(torch.zeros(1).device.type)
        return own.layout(of, batch)

    gate = regate.apply(model, teacher=None, adapter=replace(own, layout=layout))
    with _default_device("meta"):
        gate.choose(batch)
    assert seen == ["meta"]
