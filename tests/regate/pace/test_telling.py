"""What ranks tell one another; here by one that talks to itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import regate
from regate.pace.telling import Call, _pieces, handed_over
from tests.zoo import CORE


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_call_arrives_as_it_was_sent() -> None:
    learnt = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    args = (learnt.t(), [torch.tensor([True, False]), None, 3], torch.tensor(7))
    kwargs = {"sizes": (torch.empty(0, 4), "text"), "mask": torch.zeros(2, 2)[:, :1]}
    call = handed_over(Call(args, kwargs, False), 0, "Tower")
    assert not call.gradients
    torch.testing.assert_close(call.args[0], learnt.t(), atol=0, rtol=0)
    assert call.args[0].is_leaf
    assert call.args[0].requires_grad
    assert not call.kwargs["mask"].requires_grad
    assert call.args[1][0].tolist() == [True, False]
    assert call.args[1][1:] == [None, 3]
    assert int(call.args[2]) == 7
    assert call.kwargs["sizes"][0].shape == (0, 4)
    assert call.kwargs["sizes"][1] == "text"
    assert call.size == 6 + 2 + 1 + 0 + 2


@pytest.mark.usefixtures("group")
def test_arguments_that_cannot_be_sent_are_told_by_name() -> None:
    with pytest.raises(regate.RegateError, match="arguments of Tower cannot be sent"):
        handed_over(Call((lambda: None,), {}, True), 0, "Tower")


def test_what_a_batch_holds() -> None:
    nothing = {
        "a": None,
        "b": torch.empty(0, 3),
        "c": [],
        "d": [None, []],
        "e": 5,
        "f": [[3, 4], [5]],
        "g": {"h": None},
    }
    assert not list(_pieces(nothing))
    batch = {"ids": torch.zeros(3), "images": [torch.zeros(2), [torch.zeros(1), None]], "files": ["a.png", "b.png"]}
    assert list(_pieces(batch)) == [".ids", ".images", ".images", ".files", ".files"]
    assert list(_pieces({0: batch})) == [".0" + name for name in _pieces(batch)]


def test_nothing_is_watched_where_nothing_is_split() -> None:
    model: Any = CORE["llava"].build()
    before = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    regate.apply(model, teacher=None)
    model(**CORE["llava"].batch("right")).loss.backward()
    text = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[-100, -100, 5, 6]])}
    model(**text).loss.backward()
    towers = [model.model.vision_tower, model.model.multi_modal_projector]
    assert all(not tower._forward_pre_hooks for tower in towers)
    regate.remove(model)
    after = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    assert all(after[name][0] == number for name, (number, _) in before.items())
