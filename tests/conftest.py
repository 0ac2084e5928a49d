from __future__ import annotations

import os
from collections import Counter
from typing import Any

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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many random cases of each relation ran (`test_relations.py`), in whichever process."""
    ran: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            ran.update({name: n for name, n in report.user_properties if name.startswith("cases of: ")})
    for name, cases in ran.items():
        terminalreporter.write_line(f"{name.removeprefix('cases of: ')}: {cases} random cases")
