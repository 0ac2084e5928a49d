"""The batch on the host, and what it must be for labels to be scored one by one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import Batch, Layout
from model_adapters.conventional import text_config
from regate.errors import LabelsError
from regate.labels import IGNORED
from regate.training.segments import Segments, starts

NO_LABELS = (
    "the batch for {name} has no `labels`, by which the gate knows what is answer; it has {got}. Let the collator make "
    "them: the ids of the answers, and -100 elsewhere"
)
_IGNORE = ("ignore_index", "ignored_index")
_OUT_OF_BOUNDS = f"Target {IGNORED} is out of bounds"  # torch's cross-entropy


def on_host(
    batch: Batch, layout: Layout, *, vocabulary: int, model: nn.Module | None = None
) -> tuple[Layout, Segments, Tensor | None]:
    """The layout on the CPU and where its samples stand, fetched in one piece; labels that belong to padding.

    A label with which a sample begins is dropped: no position of one sample predicts one of the next, and none the
    first of a row. So are those that stand on padding or are predicted from there, with which a sample may begin, too:
    they are no sample's, for how many there are depends on the batch. They are given back, int64 [B, S] and -100
    elsewhere, or None where there are none.

    Args:
        batch: the arguments of the model's call.
        layout: what the adapter read of them.
        vocabulary: V.
        model: whose loss the labels enter; None where none is run.

    Raises:
        LabelsError: labels are not [B, S] like the decoder's input, or no ids below V; there are none at all; or they
            are ignored by another index than -100.
        PackedRowsError: boundaries of samples that do not fit the batch.
    """
    _check_shapes(layout)
    fields = [layout.input_ids, layout.labels, layout.valid, layout.visual]
    begins = starts(batch, layout)
    input_ids, labels, valid, visual, *rest = torch.stack(
        [x.to(layout.input_ids.device, torch.int64) for x in (*fields, *([] if begins is None else [begins]))]
    ).cpu()
    _check_labels(labels, vocabulary)
    _check_ignored(batch, labels, model)
    first = rest[0].bool() if rest else torch.zeros_like(valid, dtype=torch.bool)
    segments = Segments.of(first if rest else None, (labels.shape[0], labels.shape[1]))
    valid = valid.bool()
    inside = valid & valid.roll(1, 1)
    first &= inside
    first[:, 0] = True
    labels = labels.masked_fill(first, IGNORED)
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
    if not layout.labels.numel():
        raise LabelsError(
            f"the batch is empty: labels {shapes['labels']} have no position to learn from; leave such batches out "
            "(DataLoader(drop_last=True), where it is what is left of the last)"
        )


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    highest = int(labels.max())
    if highest >= vocabulary or bool((labels < 0).logical_and(labels != IGNORED).any()):
        raise LabelsError(
            f"labels must be token ids below the vocabulary size {vocabulary}, or {IGNORED}; got values "
            f"from {int(labels.min())} to {highest}"
        )


def _check_ignored(batch: Batch, labels: Tensor, model: nn.Module | None) -> None:
    """Is another index told by which labels are ignored? What the model has counts only where labels go by it."""
    for name, index in _indices(batch):
        if index != IGNORED:
            raise _ignored_by(f"the call's `{name}` is {index}")
    if model is None or bool((labels == IGNORED).any()):
        return
    for where, index in _indices_of(model):
        if bool((labels == index).any()):
            raise _ignored_by(f"{where} has ignore_index={index}, no label is {IGNORED}, and some are {index}")


def _indices(call: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, x in call.items():
        if isinstance(x, Mapping):
            yield from _indices(x)
        elif name in _IGNORE and isinstance(x, int) and not isinstance(x, bool):
            yield name, x


def _indices_of(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Those of its config, and of losses that it holds."""
    for name in _IGNORE:
        if isinstance(index := getattr(text_config(model), name, None), int):
            yield "the model's config", index
    loss = vars(model).get("loss_function", vars(model).get("_loss_function"))
    if isinstance(loss, functools.partial):
        yield from (("the model's loss", index) for _, index in _indices(loss.keywords))
    for name, module in model.named_modules():
        if isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss):
            yield f"the model's `{name}`", module.ignore_index


@contextlib.contextmanager
def ignored_as_here() -> Iterator[None]:
    """Around the model's first run with labels of -100: does its own loss know them?

    Raises:
        LabelsError: it does not.
    """
    try:
        yield
    except IndexError as error:
        if _OUT_OF_BOUNDS not in str(error):
            raise
        raise _ignored_by(f"the model's loss takes {IGNORED} for a token id") from error


def _ignored_by(why: str) -> LabelsError:
    return LabelsError(
        f"{why}: labels seem to be ignored by another index than {IGNORED}, by which the gate ignores those that a "
        f"step does not learn from. Set ignored labels to {IGNORED}, and let the loss ignore that"
    )
