"""The same samples in rows of their own, and laid end to end in one row."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import regate
from model_adapters import conventional
from tests import oracle
from tests.zoo import CORE


def rows_of(name: str, rows: int, seed: int) -> dict[str, Any]:
    """Samples of several lengths, one a row, padded right; no sample begins with a label."""
    batch = oracle.double(CORE[name].batch("right", rows=rows, seed=seed))
    batch["labels"][:, 0] = -100
    random.seed(seed)
    for row, mask in enumerate(batch["attention_mask"]):  # an end of its own for each
        end = int(mask.sum()) - random.randrange(3)
        for key, fill in (("attention_mask", 0), ("labels", -100), ("input_ids", 0)):
            batch[key][row, end:] = fill
    return batch


def packed(model: Any, batch: dict[str, Any], *, padding: int = 0) -> dict[str, Any]:
    """The same samples laid end to end in one row, told apart by position ids as TRL's padding-free collator does."""
    masks = [mask.bool() for mask in batch["attention_mask"]]
    whole = {}
    for key, x in batch.items():
        if isinstance(x, Tensor) and x.shape[:2] == batch["input_ids"].shape:
            whole[key] = torch.cat([row[mask] for row, mask in zip(x, masks, strict=True)])[None]
    text = torch.cat([torch.arange(int(mask.sum())) for mask in masks])[None]
    if hasattr(conventional.unwrap(model).model, "compute_3d_position_ids"):
        ids = regate.ModelAdapter(serves=()).position_ids(model, batch)
        assert ids is not None
        of_rows = [ids[:, row][:, mask] for row, mask in enumerate(masks)]
        text = torch.cat([text[None], torch.cat(of_rows, -1)[:, None]])
    if padding:  # at the end, where position ids do not restart
        for key, fill in (("input_ids", 0), ("labels", -100)):
            whole[key] = torch.nn.functional.pad(whole[key], (0, padding), value=fill)
    del whole["attention_mask"]
    others = {k: x for k, x in batch.items() if k not in whole and k != "attention_mask"}
    return whole | others | {"position_ids": text}
