"""Which attention is taken over samples laid end to end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regate_patch import attention


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "served"),
    [
        ((9, 0), 128, torch.bfloat16, True),
        ((8, 0), 256, torch.float16, True),
        ((7, 5), 128, torch.float16, False),
        ((9, 0), 512, torch.bfloat16, False),
        ((9, 0), 36, torch.bfloat16, False),
        ((9, 0), 128, torch.float32, False),
    ],
)
def test_where_flash_attention_has_a_kernel(
    capability: tuple[int, int], width: int, dtype: torch.dtype, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the others keep their rows: `scaled_dot_product_attention` has a kernel for each."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        query = torch.empty(1, 2, 5, width, device="cuda", dtype=dtype)
    assert attention.serves(query, query) is served


@pytest.mark.parametrize("lengths", [[4, 6], [0, 7, 3], [0]])
def test_compilers_are_told_the_layout_of_results(lengths: list[int]) -> None:
    total = sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value, grad = (torch.randn(1, 2, total, 8) for _ in range(4))
    output, sums = torch.ops.regate.attend_laid(query, key, value, starts, 0.3)
    by = torch.ops.regate.attend_laid_backward(grad, query, key, value, output, sums, starts, 0.3)
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) for x in (query, key, value, starts, grad, output, sums)]
        told = torch.ops.regate.attend_laid(*inputs[:4], 0.3)
        told_back = torch.ops.regate.attend_laid_backward(inputs[4], *inputs[:3], *inputs[5:], inputs[3], 0.3)
    for real, fake in zip((output, sums, *by), (*told, *told_back), strict=True):
        assert real.shape == fake.shape
        assert not total or real.stride() == fake.stride()
    if total:
        assert output.transpose(1, 2).is_contiguous(), "heads are put side by side without a copy"


@pytest.mark.parametrize("lengths", [[4, 2], [0, 3, 1], [0]])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_gradients(lengths: list[int], frozen: bool) -> None:
    """The kernel's backward has none: where one asks for them (`create_graph`), gradients are taken without it."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = (torch.randn(1, 2, sum(lengths), 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    key.requires_grad_(not frozen)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.attend(query, key, value, starts, max(lengths), None)

    assert torch.autograd.gradgradcheck(attend, (query, key, value))
    once = torch.autograd.grad(attend(query, key, value).square().sum(), (query, value))
    again = torch.autograd.grad(attend(query, key, value).square().sum(), (query, value), create_graph=True)
    torch.testing.assert_close(again, once)


def test_gradients_that_can_be_differentiated_where_a_key_is_the_value() -> None:
    """Or one was made of the other: a gradient's way from the one to the other is autograd's, and is gone once."""
    starts = torch.tensor([0, 4, 6], dtype=torch.int32)
    query, source = (torch.randn(1, 2, 6, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    found = []
    for create_graph in (False, True):
        for as_value in (lambda key: key, torch.tanh):
            key = source * 2
            value = as_value(key)
            result = attention.attend(query, key, value, starts, 4, None).sin().sum()
            found.append(torch.autograd.grad(result, source, create_graph=create_graph)[0].detach())
    torch.testing.assert_close(found[2:], found[:2])
