from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models; the tests run side by side instead

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Architectures share code objects, and with them Dynamo's cache: each test starts with an empty one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
