"""Batches that would be gated wrongly are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regate
from regate.errors import PackedRowsError
from tests.zoo import CORE

SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def _packed() -> dict[str, Tensor]:
    """Two samples in one row, as TRL's padding-free collator lays them out."""
    batch = CORE["llava"].batch("none", rows=1)
    length = batch["input_ids"].shape[1]
    position_ids = torch.cat([torch.arange(length - 4), torch.arange(4)])[None]
    return {k: v for k, v in batch.items() if k != "attention_mask"} | {"position_ids": position_ids}


@pytest.mark.parametrize("config", [SPARSE, regate.Config()], ids=["sparse", "full"])
def test_packed_rows(config: regate.Config) -> None:
    model = CORE["llava"].build()
    regate.apply(model, config, teacher=None)
    batch = _packed()
    with pytest.raises(PackedRowsError, match=f"restart at position {batch['input_ids'].shape[1] - 4}.*packing=False"):
        model(**batch)


def test_boundaries_of_packed_sequences() -> None:
    model = CORE["llava"].build()
    regate.apply(model, SPARSE, teacher=None)
    batch: dict[str, Any] = CORE["llava"].batch("none", rows=1)
    with pytest.raises(PackedRowsError, match="cu_seq_lens_q"):
        model(**batch, cu_seq_lens_q=torch.tensor([0, 10, batch["input_ids"].shape[1]]))


@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_positions_of_one_sample_pass(padding: Any) -> None:
    """Padding has any position id; the first of a left-padded row restarts nothing."""
    model = CORE["llava"].build()
    gate = regate.apply(model, SPARSE, teacher=None)
    batch = CORE["llava"].batch(padding)
    mask = batch["attention_mask"]
    model(**batch, position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, 1))
    assert gate.last is not None
    assert gate.last.active.sum() < mask.sum()
