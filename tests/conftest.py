from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models; the tests run side by side instead
# Dynamo's memory of what operations return pays in deep decoders; of one with two layers it takes a third of the time.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Architectures share code objects, and with them Dynamo's cache: each test starts with an empty one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is marked `few(n)` the default run takes n cases, evenly spread; the others are `matrix`.

    A case that is asked for by its id runs.
    """
    cases: defaultdict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        few = item.get_closest_marker("few")
        if few is not None and not any(map(item.get_closest_marker, ("slow", "zoo", "matrix", "gpu"))):
            cases[item.nodeid.partition("[")[0], few.args[0]].append(item)
    for (_, n), of_one in cases.items():
        chosen = {round(i * (len(of_one) - 1) / max(n - 1, 1)) for i in range(n)}
        for i, item in enumerate(of_one):
            if i not in chosen:
                item.add_marker("matrix")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many random cases of each relation ran (`test_relations.py`), in whichever process."""
    ran: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            ran.update({name: n for name, n in report.user_properties if name.startswith("cases of: ")})
    for name, cases in ran.items():
        terminalreporter.write_line(f"{name.removeprefix('cases of: ')}: {cases} random cases")
