"""Values that count for nothing."""

from __future__ import annotations

import torch

from regate.pace.weightless import behind, edges, instead, leaf_of, tensors, with_weightless


def test_nothing_is_added_and_zeros_come_back() -> None:
    """Infinities and what is no number stay without effect, as a product with zero would not."""
    value = torch.randn(2, 3, requires_grad=True)
    weights = torch.tensor([torch.inf, torch.nan, 1.0], requires_grad=True)
    found = with_weightless(value, [weights + 1, (weights[2:] * 2).half()])
    assert torch.equal(found, value)
    found.mul_(2.0).sum().backward()
    assert torch.equal(value.grad, torch.full((2, 3), 2.0))
    assert torch.equal(weights.grad, torch.zeros(3))


def test_a_value_without_a_gradient_carries_zeros_to_others() -> None:
    weights = torch.ones(3, requires_grad=True)
    with_weightless(torch.randn(2, 3), [weights.exp()]).sum().backward()
    assert torch.equal(weights.grad, torch.zeros(3))


def test_what_a_value_comes_from() -> None:
    used, unused, loose = (torch.ones(2, requires_grad=True) for _ in range(3))
    made = {"a": (used * 2, "no tensor"), "b": [unused * 3, torch.ones(2)]}
    standing = edges(made)
    found = behind([{"x": made["a"][0].exp() + loose}, None])
    assert [edge in found if edge else None for edge in standing] == [True, None, False, None]
    leaves = [leaf for edge in found if (leaf := leaf_of(edge)) is not None]
    assert {id(leaf) for leaf in leaves} == {id(used), id(loose)}
    assert [x is not None for x in tensors(made)] == [True, False, True, True]


def test_one_leaf_is_replaced() -> None:
    old, new = torch.ones(2), torch.zeros(2)
    assert instead({"a": (old, torch.ones(2))}, old, new)["a"][0] is new
