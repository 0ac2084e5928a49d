from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Architectures share code objects, and with them Dynamo's cache: each test starts with an empty one."""
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
