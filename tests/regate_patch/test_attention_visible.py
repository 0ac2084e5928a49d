"""Attention of active positions over all of their rows: both ways of computing it against the formula, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library

from regate_patch import Active, attention_visible
from regate_patch.attention_visible import attend_by_rows, attend_filled, may_see

ROWS, LENGTH, DIM = 4, 13, 8


def _written_out(query: Tensor, key: Tensor, value: Tensor, active: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Row by row and query by query; [1, H, T, D]."""
    groups, found = query.shape[1] // key.shape[1], []
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    for t, (row, place) in enumerate(active.nonzero().tolist()):
        seen = visible[row] & (torch.arange(LENGTH) <= place)
        scores = torch.einsum("hd,hsd->hs", query[0, :, t], key[row][:, seen]) * scale
        found.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), value[row][:, seen]))
    return torch.stack(found, 1)[None]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("filled", [False, True])
def test_against_the_formula(filled: bool, groups: int, scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that compute all, some and nothing, with padding on either side, and in more parts than one."""
    monkeypatch.setattr(attention_visible, "_QUERIES", 3)
    torch.manual_seed(0)
    visible = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    visible[1, :3], visible[2, 10:] = False, False
    active = visible & (torch.rand(ROWS, LENGTH) < 0.5)
    active[0], active[3] = True, False
    chosen = Active.from_mask(active)
    rows, places, _, longest, _, slots = chosen.end_to_end(apart=False)
    heads = 2 * groups
    query, key, value = (
        torch.randn(size, dtype=torch.double, requires_grad=True)
        for size in ((1, heads, len(rows), DIM), (ROWS, 2, LENGTH, DIM), (ROWS, 2, LENGTH, DIM))
    )
    if filled:
        found = attend_filled(query, key, value, rows, slots, may_see(rows, places, slots, longest, visible), scale)
    else:
        found = attend_by_rows(query, key, value, places, chosen.of_rows, visible, scale)
    expected = _written_out(query, key, value, active, visible, DIM**-0.5 if scale is None else scale)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(found)
    grads = torch.autograd.grad((found * weights).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_operator_is_one_that_compilers_can_trust() -> None:
    """Its fake results, its gradients and what it saves are those that it says."""
    active = torch.rand(ROWS, LENGTH) < 0.5
    active[:, 0] = True
    chosen = Active.from_mask(active)
    rows, places, *_ = chosen.end_to_end(apart=False)
    query, key, value = (
        torch.randn(size, requires_grad=True)
        for size in ((1, 2, len(rows), DIM), (ROWS, 2, LENGTH, DIM), (ROWS, 2, LENGTH, DIM))
    )
    everything = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    library.opcheck(
        attention_visible._attend, (query, key, value, places, chosen.of_rows, everything, DIM**-0.5),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_gradients(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's backward has none: where one asks for them (`create_graph`), gradients are taken without it."""
    monkeypatch.setattr(attention_visible, "_QUERIES", 3)
    visible = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    visible[1, :3] = False
    active = visible & (torch.rand(ROWS, LENGTH) < 0.4)
    active[0], active[3] = True, False
    chosen = Active.from_mask(active)
    rows, places, *_ = chosen.end_to_end(apart=False)
    query, key, value = (
        torch.randn(size, dtype=torch.double)
        for size in ((1, 2, len(rows), 2), (ROWS, 2, LENGTH, 2), (ROWS, 2, LENGTH, 2))
    )
    learning = (query.requires_grad_(), value.requires_grad_(not frozen))

    def attend(query: Tensor, value: Tensor) -> Tensor:
        return attend_by_rows(query, key, value, places, chosen.of_rows, visible, None)

    assert torch.autograd.gradgradcheck(attend, learning)
