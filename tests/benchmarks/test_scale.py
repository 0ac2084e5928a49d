"""What is carried on from small measurements agrees with them, and with what they were made of."""

from __future__ import annotations

import json
from math import log10
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale


def _store(samples: int) -> dict[str, Any]:
    milliseconds = {"get_both_tables": 0.1 + 0.2 * log10(samples), "put": 1.0 + 0.1 * log10(samples)}
    return {
        "samples": samples, "labels": 100, "disk_bytes": 500 * samples, "fill_seconds": 2e-5 * samples,
        "microseconds_per_batch": {name: {"median": 1e3 * x} for name, x in milliseconds.items()},
    }  # fmt: skip


EXCHANGE = {
    "rows": 8, "step_seconds": 0.5,
    "runs": [{"ranks": r, "bytes_sent_per_step": 800, "milliseconds_per_step_with_a_core_per_rank": 0.3 + 0.16 * r}
             for r in (4, 16)],
}  # fmt: skip


def test_fits_find_what_figures_were_made_of() -> None:
    found = scale.Measured.of([_store(10**4), _store(10**6)], EXCHANGE)
    assert (found.read.a, found.read.b) == pytest.approx((0.1, 0.2))
    assert found.write(10**9) == pytest.approx(1.9)
    assert found.fill == pytest.approx(1e-5)
    assert found.told_seconds == pytest.approx(2e-5)
    assert found.told(8) == 0, "ranks of one node share a file"
    assert found.writer(4096) == pytest.approx(4088 * 8 * 2e-5)


def test_tables(tmp_path: Path) -> None:
    assert scale.tables(tmp_path) == ""
    for samples in (10**4, 10**6):
        (tmp_path / f"store-{samples}.json").write_text(json.dumps(_store(samples)))
    (tmp_path / "exchange.json").write_text(json.dumps(EXCHANGE))
    text = scale.tables(tmp_path)
    assert "| 10^6 | 0.5 GB | 1.30 ms | 1.60 ms | 10 s |" in text
    assert "| 4,096 | 512 | 32,704 | 3.3 MB | 130.8% |" in text
    assert "from 164 ranks on" in text  # 8 + 5% of 0.5 s at 8 * 2e-5 s for each
