"""Which attention is taken over samples laid end to end."""

from __future__ import annotations

import pytest
import torch
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
