"""The batch on the host, and what it must be for labels to be scored one by one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model_adapters import Batch, Layout
from regate.errors import LabelsError
from regate.labels import IGNORED
from regate.training.segments import Segments, starts


def on_host(batch: Batch, layout: Layout, *, vocabulary: int) -> tuple[Layout, Segments, Tensor | None]:
    """The layout on the CPU and where its samples stand, fetched in one piece; labels that belong to padding.

    A label with which a sample begins is dropped: no position of one sample predicts one of the next, and none the
    first of a row. So are those that stand on padding or are predicted from there, which are no sample's: how many
    there are depends on the batch. They are given back, int64 [B, S] and -100 elsewhere, or None where there are none.

    Args:
        batch: the arguments of the model's call.
        layout: what the adapter read of them.
        vocabulary: V.

    Raises:
        LabelsError: labels are not [B, S] like the decoder's input, or no ids below V.
        PackedRowsError: boundaries of samples that do not fit the batch.
    """
    _check_shapes(layout)
    fields = [layout.input_ids, layout.labels, layout.valid, layout.visual]
    begins = starts(batch, layout)
    input_ids, labels, valid, visual, *rest = torch.stack(
        [x.long() for x in (*fields, *([] if begins is None else [begins]))]
    ).cpu()
    _check_labels(labels, vocabulary)
    first = rest[0].bool() if rest else torch.zeros_like(valid, dtype=torch.bool)
    segments = Segments.of(first if rest else None, (labels.shape[0], labels.shape[1]))
    first[:, 0], valid = True, valid.bool()
    labels = labels.masked_fill(first, IGNORED)
    inside = valid & valid.roll(1, 1)
    on_padding = labels.masked_fill(inside, IGNORED)
    labels = labels.masked_fill(~inside, IGNORED)
    layout = replace(layout, input_ids=input_ids, labels=labels, valid=valid, visual=visual.bool())
    return layout, segments, on_padding if bool((on_padding != IGNORED).any()) else None


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
