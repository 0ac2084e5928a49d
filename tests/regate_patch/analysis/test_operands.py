"""A call has one form, however it was written, and is the same call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from regate_patch.analysis.operands import put_in_place

CALLS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int, set[str]]] = {
    "in any order": (lambda x, w: F.linear(weight=w, input=x), 2, set()),
    "the second": (lambda x, w: torch.matmul(x, other=w), 2, set()),
    "three": (lambda x, w: torch.baddbmm(batch2=x, batch1=x, input=x, beta=2), 3, {"beta"}),
    "numbers stay": (lambda x, w: F.softmax(input=x, dim=1), 1, {"dim"}),
    "what stands behind them, too": (lambda x, w: torch.gather(input=x, dim=1, index=x.long()), 1, {"dim", "index"}),
    "NumPy's names": (lambda x, w: torch.mean(x, axis=1, keepdims=True), 1, {"dim", "keepdim"}),
    "of a method": (lambda x, w: x.masked_fill(mask=x > 0, value=1.0), 2, {"value"}),
    "another overload": (lambda x, w: torch.max(input=x, dim=1), 1, {"dim"}),
    "never by place": (lambda x, w: torch.add(input=x, other=x, alpha=2), 2, {"alpha"}),
    "a list": (lambda x, w: torch.cat(tensors=[x, x], dim=1), 1, {"dim"}),
    "linear algebra": (lambda x, w: torch.linalg.norm(input=x, dim=1), 1, {"dim"}),
    "transforms": (lambda x, w: torch.fft.fft(input=x, dim=1), 1, {"dim"}),
    "written in Python": (lambda x, w: F.group_norm(input=x, num_groups=1), 1, {"num_groups"}),
    "attention, read by name": (lambda x, w: F.scaled_dot_product_attention(x, x, value=x), 2, {"value"}),
}


@pytest.mark.parametrize(("call", "by_place", "by_name"), CALLS.values(), ids=CALLS.keys())
def test_one_form(call: Callable[..., Any], by_place: int, by_name: set[str]) -> None:
    calls: list[fx.Node] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        put_in_place(gm).recompile()
        calls.extend(n for n in gm.graph.nodes if n.op.startswith("call") and n.target is not operator.getitem)
        return gm.forward

    x, w = torch.zeros(4, 4, 4), torch.randn(4, 4)
    made = torch.compile(call, backend=keep, fullgraph=True)(x, w)
    torch.testing.assert_close(pytree.tree_leaves(made), pytree.tree_leaves(call(x, w)))
    assert len(calls[-1].args) == by_place
    assert set(calls[-1].kwargs) == by_name
