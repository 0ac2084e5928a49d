"""What names, weighs or counts labels in a call beside `labels`: it must be masked with them.

Sequence-parallel trainers pass `shift_labels`, others weights or masks of labels, or their number. Labels that a sparse
step drops must vanish from all of these, for at their predictors nothing was computed. Names tell them, and, whatever
its name, a value per position that says nothing but at labels. Where it says something, at labels or at their
predictors, tells how it is laid along them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from regate.errors import LabelsError
from regate.labels import IGNORED, predictors

_NAMES = re.compile(r"label|target")
_WEIGHS = re.compile(r"weight|loss|completion_mask|assistant|advantage|reward")
_COUNTS = re.compile(
    r"^(num|n|total|count)_\w*(items|tokens|labels|targets)|(items|tokens|labels|targets)_(count|num)$"
)
_OF_POSITIONS = re.compile(r"type|position|attention|segment|seq|cache|embed|input_ids")  # what they are called
_OF_IMAGES = re.compile(r"image|video|audio|visual|vision|pixel|patch|frame|tile")


def beside(call: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """The entries of a call that name, weigh or count labels [B, S] beside `labels` itself.

    Raises:
        LabelsError: one of them has a shape that cannot be laid along labels.
    """
    found = {}
    for name, x in call.items():
        if name == "labels" or x is None or isinstance(x, (bool, str)) or _OF_IMAGES.search(name):
            continue
        if _number(x):
            if _COUNTS.search(name):
                found[name] = x
        elif isinstance(x, Tensor) and _per_label(x, labels):
            if _NAMES.search(name) or _WEIGHS.search(name):
                _along(name, x, labels, labels)
                found[name] = x
            elif not _OF_POSITIONS.search(name) and _speaks_at(name, x, labels) is not None:
                found[name] = x
    return found


def masked(entries: Mapping[str, Any], labels: Tensor, kept: Tensor) -> dict[str, Any]:
    """The entries that `beside` found, for kept labels alone: names -100, weights 0, counts scaled.

    Args:
        entries: as found.
        labels: [B, S] int64.
        kept: [B, S] bool, on the CPU as `labels` are.
    """
    changed: dict[str, Any] = {}
    seen = int((labels[:, 1:] != IGNORED).sum())
    for name, x in entries.items():
        if _number(x):
            changed[name] = x * (int(kept.sum()) / max(seen, 1))
            continue
        stays = _along(name, x, kept, labels).to(x.device)
        changed[name] = x.masked_fill(~stays, _nothing(name, x))
    return changed


def has_tensors(entries: Mapping[str, Any]) -> bool:
    """Does any of them stand along the labels?"""
    return not all(_number(x) for x in entries.values())


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1)


def _per_label(x: Tensor, labels: Tensor) -> bool:
    """Has it an entry for about each label? One per row, per class or per image is another thing."""
    rows, length = labels.shape
    if x.dim() == 1:
        return x.numel() in (rows * length, rows * (length - 1)) and x.numel() != rows
    return x.dim() == 2 and x.shape[0] == rows and x.shape[1] > length // 2


def _nothing(name: str, x: Tensor) -> int:
    """What an entry says where it says nothing."""
    return IGNORED if _NAMES.search(name) and not x.is_floating_point() else 0


def _speaks_at(name: str, x: Tensor, labels: Tensor) -> Literal["labels", "predictors"] | None:
    """Where an entry of [B, S] or [B, S - 1] says something: at labels alone, at their predictors alone, or neither."""
    says, labelled = (x != _nothing(name, x)).cpu(), labels != IGNORED
    if tuple(x.shape) == (len(labels), labels.shape[1] - 1):
        return "labels" if bool(says.any()) and not bool((says & ~labelled[:, 1:]).any()) else None
    if x.shape != labels.shape or not bool(says.any()):
        return None
    if not bool((says & ~labelled).any()):
        return "labels"
    return None if bool((says & ~predictors(labelled)).any()) else "predictors"


def _along(name: str, x: Tensor, of_labels: Tensor, labels: Tensor) -> Tensor:
    """Values of labels [B, S] as an entry of this name and shape has them: at labels or at their predictors."""
    rows, length = of_labels.shape
    if tuple(x.shape) == (rows, length) or x.shape == (rows * length,):
        shifted = name.startswith("shift") or _speaks_at(name, x, labels) == "predictors"
        return (predictors(of_labels) if shifted else of_labels).reshape(x.shape)
    if tuple(x.shape) == (rows, length - 1) or x.shape == (rows * (length - 1),):
        return of_labels[:, 1:].reshape(x.shape)
    raise LabelsError(
        f"`{name}` {list(x.shape)} seems to name or weigh labels, and a sparse step must drop the same ones from it as "
        f"from `labels` [{rows}, {length}]; pass it as [B, S] like `labels` (as [B, S] or [B, S - 1] under a name that "
        "begins with `shift`, if it is shifted), or train with regate.Config(keep=1.0)"
    )
