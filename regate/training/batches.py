"""The batch on the host, and what it must be for labels to be scored one by one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model_adapters import Batch, Layout
from regate.errors import LabelsError, PackedRowsError
from regate.labels import IGNORED

# Boundaries of packed sequences, as flash attention's variable-length kernels are told of them.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def on_host(batch: Batch, layout: Layout, *, vocabulary: int) -> Layout:
    """The layout on the CPU, fetched in one piece; refuses what would be gated wrongly.

    Args:
        batch: the arguments of the model's call.
        layout: what the adapter read of them.
        vocabulary: V.

    Raises:
        LabelsError: labels are not [B, S] like the decoder's input, or no ids below V.
        PackedRowsError: a row holds several samples.
    """
    _check_shapes(layout)
    position_ids = batch.get("position_ids")
    fields = [layout.input_ids, layout.labels, layout.valid, layout.visual]
    if not isinstance(position_ids, Tensor) or position_ids.shape != layout.valid.shape:
        position_ids = None  # several ids per token (M-RoPE) fall within an image, too, and say nothing
    else:
        fields.append(position_ids)
    input_ids, labels, valid, visual, *rest = torch.stack([x.long() for x in fields]).cpu()
    layout = replace(layout, input_ids=input_ids, labels=labels, valid=valid.bool(), visual=visual.bool())
    _check_labels(layout.labels, vocabulary)
    _check_rows(batch, layout.valid, rest)
    return layout


def _check_shapes(layout: Layout) -> None:
    shapes = {n: list(getattr(layout, n).shape) for n in ("input_ids", "labels", "valid", "visual")}
    if len({tuple(s) for s in shapes.values()}) > 1 or layout.labels.dim() != 2:
        raise LabelsError(
            "labels must be [B, S] like the decoder's input, one per position after visual expansion; got "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    highest = int(labels.max())
    if highest >= vocabulary or bool((labels < 0).logical_and(labels != IGNORED).any()):
        raise LabelsError(
            f"labels must be token ids below the vocabulary size {vocabulary}, or {IGNORED}; got values "
            f"from {int(labels.min())} to {highest}"
        )


def _check_rows(batch: Batch, valid: Tensor, position_ids: list[Tensor]) -> None:
    """Difficulties, reference losses and the share kept are all per sample, and a row is taken for one."""
    given = [name for name in _BOUNDARIES if batch.get(name) is not None]
    restart = _restart(position_ids[0], valid) if position_ids else None
    if given or restart is not None:
        sign = f"`{given[0]}` is given" if given else f"position_ids restart at position {restart}"
        raise PackedRowsError(
            f"a row of the batch holds several samples ({sign}), but a row must be one sample: its text is what the "
            "teacher reads, and its labels are what compete to be kept. Train without packing: in TRL "
            "packing=False and padding_free=False. Elision makes padding free by itself"
        )


def _restart(position_ids: Tensor, valid: Tensor) -> int | None:
    """The first position whose position id is lower than that before it, in a row of [B, S] ids, or None."""
    falls = torch.diff(position_ids) < 0
    falls = falls.logical_and(valid[:, 1:] & valid[:, :-1])
    return int(falls.any(0).nonzero()[0]) + 1 if bool(falls.any()) else None
