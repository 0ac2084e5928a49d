"""A product costs the same by whatever call it is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import regate_patch
from tests.plain import Block, Decoder

Product = Callable[[Tensor, Tensor], Tensor]


def _in_rows(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


PRODUCTS: dict[str, Product] = {
    "@": lambda a, b: a @ b,
    "matmul": torch.matmul,
    "method": lambda a, b: a.matmul(b),
    "bmm": _in_rows,
    "einsum": lambda a, b: torch.einsum("bhqk,bhkd->bhqd", a, b),
    "einsum with dots": lambda a, b: torch.einsum("...qk,...kd->...qd", a, b),
}


def _costs(product: Product, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    def attend(self: Block, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = product(q, k.transpose(-2, -1)).masked_fill(hidden, float("-inf"))
        return self.out(product(scores.softmax(-1), v).transpose(1, 2).flatten(2))

    monkeypatch.setattr(Block, "attend", attend)
    (graph,) = regate_patch.inspect(Decoder(), torch.randn(2, 6, 16)).graphs
    return graph.flops_linear, graph.flops_quadratic


@pytest.mark.parametrize("by", PRODUCTS)
def test_attention_costs_what_its_products_cost(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 3 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 32)
    assert _costs(PRODUCTS[by], monkeypatch) == (2 * weights, 3 * 2 * 2 * 16)
