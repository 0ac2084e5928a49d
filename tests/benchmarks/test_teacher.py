"""The benchmark of the teacher runs, and what it times gives the same losses either way."""

from __future__ import annotations

import argparse

import torch

from benchmarks import teacher
from regate.insight.estimate import Sample


def test_measures() -> None:
    torch.manual_seed(0)
    args = argparse.Namespace(model="narrow", rows=2, dtype="float32", repeats=1, device="cpu")
    found = teacher.measure(args, "", Sample(16, 8, 20))
    assert found["seconds"].keys() == {"elided", "padded", "dense step"}
    assert found["share_of_dense_epoch"] > 0
    assert found["largest_difference"] < 1e-4
