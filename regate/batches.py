"""What a batch must be for labels to be scored one by one, checked before anything is computed of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_adapters import Batch, Layout
from regate.errors import LabelsError, PackedRowsError
from regate.selection import IGNORED

# Boundaries of packed sequences, as flash attention's variable-length kernels are told of them.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def check(batch: Batch, layout: Layout, *, vocabulary: int) -> None:
    """Refuse what would be gated wrongly.

    Args:
        batch: the arguments of the model's call.
        layout: what the adapter read of them.
        vocabulary: V.

    Raises:
        LabelsError: labels are not [B, S] like the decoder's input, or no ids below V.
        PackedRowsError: a row holds several samples.
    """
    _check_labels(layout, vocabulary)
    _check_rows(batch, layout)


def _check_labels(layout: Layout, vocabulary: int) -> None:
    shapes = {n: list(getattr(layout, n).shape) for n in ("input_ids", "labels", "valid", "visual")}
    if len({tuple(s) for s in shapes.values()}) > 1 or layout.labels.dim() != 2:
        raise LabelsError(
            "labels must be [B, S] like the decoder's input, one per position after visual expansion; got "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
    highest = int(layout.labels.max())
    if highest >= vocabulary or bool((layout.labels < 0).logical_and(layout.labels != IGNORED).any()):
        raise LabelsError(
            f"labels must be token ids below the vocabulary size {vocabulary}, or {IGNORED}; got values "
            f"from {int(layout.labels.min())} to {highest}"
        )


def _check_rows(batch: Batch, layout: Layout) -> None:
    """Difficulties, reference losses and the share kept are all per sample, and a row is taken for one."""
    given = [name for name in _BOUNDARIES if batch.get(name) is not None]
    restart = _restart(batch.get("position_ids"), layout.valid)
    if given or restart is not None:
        sign = f"`{given[0]}` is given" if given else f"position_ids restart at position {restart}"
        raise PackedRowsError(
            f"a row of the batch holds several samples ({sign}), but a row must be one sample: its text is what the "
            "teacher reads, and its labels are what compete to be kept. Train without packing: in TRL "
            "packing=False and padding_free=False. Elision makes padding free by itself"
        )


def _restart(position_ids: Any, valid: Tensor) -> int | None:
    """The first position whose position id is lower than that before it, in a row of [B, S] ids, or None.

    Several ids per token (M-RoPE) fall within an image, too, and say nothing.
    """
    if not isinstance(position_ids, Tensor) or position_ids.shape[-1:] != valid.shape[-1:] or position_ids.dim() != 2:
        return None
    falls = torch.diff(position_ids) < 0
    falls = falls.logical_and(valid[:, 1:] & valid[:, :-1])
    return int(falls.any(0).nonzero()[0]) + 1 if bool(falls.any()) else None
