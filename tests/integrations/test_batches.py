"""What loaders really give: several turns, several images, rows without one, videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import regate
from model_adapters import conventional
from regate_patch import reference
from tests import oracle
from tests.zoo import CORE
from tests.zoo.common import END, IMAGE, START, VIDEO

pytestmark = pytest.mark.matrix
Batch = dict[str, Tensor]
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0, logits="all")


def turns(name: str) -> Batch:
    """The answer is interrupted by a question of three tokens."""
    batch = CORE[name].batch("right", answer=12)
    answer = (batch["labels"] != -100).int()
    place = answer.cumsum(1)
    batch["labels"][(place >= 5) & (place < 8)] = -100
    return batch


def without_images(name: str) -> Batch:
    """The last row is text alone."""
    batch = CORE[name].batch("right", rows=3)
    batch["input_ids"][-1][batch["input_ids"][-1] == IMAGE] = 17
    return batch | {"pixel_values": batch["pixel_values"][:2]}


def several_images(name: str) -> Batch:
    """Two images in the first row, one in the second."""
    batch = CORE[name].batch("none", rows=2, answer=16)
    ids = batch["input_ids"]
    ids[0, 9:13] = IMAGE
    batch["labels"][0, :13] = -100
    return batch | {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def video(name: str) -> Batch:
    """One row: two frames of four tokens each, and the text."""
    random = torch.Generator().manual_seed(2)
    text = torch.randint(3, 90, (18,), generator=random).tolist()
    ids = torch.tensor([[*text[:3], START, *[VIDEO] * 8, END, *text[3:]]])
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 11, -100, ids)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values_videos": torch.randn(32, 3 * 2 * 16, generator=random),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        "second_per_grid_ts": torch.tensor([1.0]),
    }


CASES: list[tuple[str, Callable[[str], Batch]]] = [
    ("llava", turns),
    ("qwen2_5_vl", turns),
    ("llava", without_images),
    ("internvl", several_images),
    ("qwen2_5_vl", video),
]


def _step(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "make"), CASES, ids=[f"{name}-{make.__name__}" for name, make in CASES])
def test_exact(name: str, make: Callable[[str], Batch]) -> None:
    """A full step is the unpatched model's; a sparse step is the per-layer masked reference's."""
    model, batch = CORE[name].build().double(), oracle.double(make(name))
    dense = _step(model, batch)
    gate = regate.apply(model, regate.Config(warmup=9, logits="all"), teacher=None)
    _assert_close(_step(model, batch), dense)
    gate = regate.apply(model, SPARSE)
    sparse = _step(model, batch)
    assert gate.last is not None
    last = gate.last
    assert int(last.active.sum()) < int(batch["attention_mask"].sum())
    regate.remove(model)
    batch["labels"] = torch.where(last.kept, batch["labels"], -100)
    with reference.masked(conventional.decoder(model).layers, last.active):
        _assert_close(sparse, _step(model, batch))


def _assert_close(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=1e-10, rtol=0)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-9, rtol=1e-9)
