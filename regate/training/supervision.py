"""What names, weighs or counts labels in a call beside `labels`: it must be masked with them.

Sequence-parallel trainers pass `shift_labels`, others weights or masks of labels, or their number, in the call or in a
dict of it. Labels that a sparse step drops must vanish from all of these, for at their predictors nothing was computed,
and a loss that is divided by all labels would be too small. Names tell them, and, whatever its name, a value that says
nothing but at labels, or that is their number. Where it says something, at labels or at their predictors, tells how it
is laid along them.

A value may be their number by chance, as two seconds per frame are where an answer has two tokens. So one whose name
does not say what it is counts them as long as it was their number in every batch, and that cannot be by chance: it is
large, or the batches had different numbers of labels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from regate.errors import LabelsError
from regate.labels import IGNORED, predicted, predictors
from regate.names import Name, of_name

_BY_CHANCE = 8  # labels, of which something else may be as many

_Counts = Callable[[], list[Tensor]]


@dataclass
class Numbers:
    """What numbers were in earlier calls, of those whose names do not say whether they count labels.

    By name, within dicts as `options.total`.

    Attributes:
        others: those that once were another number than that of labels: they count none.
        small: of these, those whose names say that they count labels, but which were far fewer when they came first.
        called: those whose names say so, and which were not: one may be a mean, which is fewer in a long batch.
        as_many: the values of all others, in every call so far as many as labels.
    """

    others: set[str] = field(default_factory=set)
    small: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    as_many: dict[str, set[float]] = field(default_factory=dict)

    def see(self, name: str, values: set[float], *, as_many: bool) -> None:
        """It has these values in this call."""
        if not as_many:
            self.others.add(name)
        elif len(seen := self.as_many.setdefault(name, set())) < 2:
            seen |= values

    def counts(self, name: str) -> bool:
        """Does it count labels, and not by chance?"""
        return name in self._telling - self.others

    @property
    def given_up(self) -> set[str]:
        """Those that counted labels until they were another number."""
        return self._telling & self.others

    def state_dict(self) -> dict[str, Any]:
        names = {name: sorted(getattr(self, name)) for name in ("others", "small", "called")}
        return {**names, "as_many": {name: sorted(seen) for name, seen in self.as_many.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.others = set(state["others"])
        self.small, self.called = set(state.get("small", ())), set(state.get("called", ()))
        self.as_many = {name: set(seen) for name, seen in state["as_many"].items()}

    @property
    def _telling(self) -> set[str]:
        return {name for name, seen in self.as_many.items() if len(seen) > 1 or max(seen) > _BY_CHANCE}


@dataclass(frozen=True)
class _Count:
    """A number of labels, or one for each row, [B] or [B, 1].

    `guessed` is its name where that does not tell so; `by_chance` says that it may be as many by chance.
    """

    value: Any
    guessed: str | None = None
    by_chance: bool = False

    def of(self, kept: Tensor, labels: Tensor) -> Any:
        """Of the kept ones: as many as their share of the labels."""
        if self.by_chance:
            return self.value
        labelled = predicted(labels)
        if _is_number(self.value):
            return self.value * (int(kept.sum()) / max(int(labelled.sum()), 1))
        share = torch.where(labelled.any(1), kept.sum(1).double() / labelled.sum(1).clamp(min=1), 1.0)
        dtype = self.value.dtype if self.value.is_floating_point() else torch.get_default_dtype()
        return self.value * share.view(self.value.shape).to(self.value.device, dtype)


@dataclass(frozen=True)
class _Within:
    """A dict of the call, and what was found in it."""

    whole: MutableMapping[str, Any]
    found: dict[str, Any]


def beside(call: Mapping[str, Any], labels: Tensor, numbers: Numbers | None = None) -> dict[str, Any]:
    """The entries of a call that name, weigh or count labels [B, S] beside `labels` itself.

    Args:
        numbers: those of earlier calls; what they are in this one is added.

    Raises:
        LabelsError: one of them has a shape that cannot be laid along labels.
    """
    counts = functools.cache(lambda: _counts(labels, call.get("labels")))
    return _Search(labels, counts, Numbers() if numbers is None else numbers).within(
        {name: x for name, x in call.items() if name != "labels"}
    )


@dataclass(frozen=True)
class _Search:
    """Of one call; arguments as in `beside`."""

    labels: Tensor
    counts: _Counts
    numbers: Numbers

    def within(self, call: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        of_names = ((name, x) for name, x in call.items() if isinstance(name, str))  # keys of a dict may be anything
        found = ((name, self.entry(name, x, f"{path}{name}")) for name, x in of_names)
        return {name: entry for name, entry in found if entry is not None}

    def entry(self, name: str, x: Any, path: str) -> Any:
        """What is masked of it, or None."""
        named = of_name(name)
        if x is None or isinstance(x, (bool, str)):
            return None
        if isinstance(x, MutableMapping):
            inside = self.within(x, f"{path}.") if named.holds else {}
            return _Within(x, inside) if inside else None
        if (count := self.count(named, x, path)) is not None:
            return count
        if isinstance(x, Tensor) and _per_label(x, self.labels):
            return x if self.lies_along(name, x) else None
        if named.weighs and _is_odd(x, self.labels):
            raise _refused(name, list(x.shape) if isinstance(x, Tensor) else "(a list)", self.labels)
        return None

    def count(self, named: Name, x: Any, path: str) -> _Count | None:
        """The number of labels, of all or of each row."""
        if named.counts == "yes" and _is_number(x):
            return _Count(x)
        if path in self.numbers.others:
            return None
        if named.counts == "if not too small" and _is_number(x):
            counts = path in self.numbers.called or 2 * float(x) >= min(float(n.sum()) for n in self.counts())
            (self.numbers.called if counts else self.numbers.small).add(path)
            self.numbers.others |= self.numbers.small
            return _Count(x) if counts else None
        if named.counts == "no" or (values := _values(x, len(self.labels))) is None:
            return None
        as_many = _are_their_number(values, one=_is_number(x), counts=self.counts)
        if as_many is None:
            return None
        self.numbers.see(path, set(values), as_many=as_many)
        return _Count(x, guessed=path, by_chance=not self.numbers.counts(path)) if as_many else None

    def lies_along(self, name: str, x: Tensor) -> bool:
        """By its name; or by what it says, where its name does not say that it is of something else.

        What has the name of masks of positions or of images must say something at all labels: then it is their mask.
        """
        named = of_name(name)
        if named.lies in ("must", "if it can"):
            can = _length_along(x, self.labels) is not None
            if not can and named.lies == "must":
                raise _refused(name, list(x.shape), self.labels)
            return can
        if named.lies == "no" or _speaks_at(named, x, self.labels) is None:
            return False
        says = x[x != _nothing(named, x)]
        at_all = says.numel() == int(predicted(self.labels).sum())
        alike = named.lies != "if alike at all" or bool((says == says[0]).all())
        return named.lies == "if it says so" or (at_all and alike)


def guesses(entries: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Of what `beside` found, numbers of labels that nothing but their value tells, and which may be so by chance."""
    for x in entries.values():
        if isinstance(x, _Within):
            yield from guesses(x.found)
        elif isinstance(x, _Count) and x.guessed is not None:
            yield x.guessed, x.by_chance


def divides(call: Mapping[str, Any], entries: Mapping[str, Any], ratio: float) -> str | None:
    """The name of a number of the call, about `ratio`, that `beside` did not find."""
    for name, x in call.items():
        inside = entries.get(name)
        if isinstance(x, Mapping):
            if found := divides(x, inside.found if isinstance(inside, _Within) else {}, ratio):
                return f"{name}.{found}"
        elif inside is None and _is_number(x) and abs(float(x) - ratio) <= 1e-3 * ratio:
            return str(name)
    return None


def masked(entries: Mapping[str, Any], labels: Tensor, kept: Tensor) -> dict[str, Any]:
    """The entries that `beside` found, for kept labels alone: names -100, weights 0, counts scaled.

    Args:
        entries: as found.
        labels: [B, S] int64.
        kept: [B, S] bool, on the CPU as `labels` are.
    """
    changed: dict[str, Any] = {}
    for name, x in entries.items():
        if isinstance(x, _Within):
            changed[name] = copy.copy(x.whole)
            changed[name].update(masked(x.found, labels, kept))
        elif isinstance(x, _Count):
            changed[name] = x.of(kept, labels)
        else:
            named = of_name(name)
            stays = _along(named, x, kept, labels).to(x.device)
            changed[name] = x.masked_fill(~stays, _nothing(named, x))
    return changed


def has_tensors(entries: Mapping[str, Any]) -> bool:
    """Does any of them stand along the labels?"""
    return any(has_tensors(x.found) if isinstance(x, _Within) else isinstance(x, Tensor) for x in entries.values())


# -- their number -----------------------------------------------------------------------------------------


def _is_number(x: Any) -> bool:
    """One of Python's or NumPy's, or the only one in a tensor."""
    if isinstance(x, (Tensor, np.ndarray)):
        return x.dtype not in (torch.bool, np.bool_) and (x.numel() == 1 if isinstance(x, Tensor) else x.ndim == 0)
    return isinstance(x, Real) and not isinstance(x, bool)


def _values(x: Any, rows: int) -> list[float] | None:
    """A number, or one for each row, [B] or [B, 1]; None if it is neither."""
    if _is_number(x):
        return [float(x)]
    if not isinstance(x, Tensor) or x.dtype == torch.bool or tuple(x.shape) not in ((rows,), (rows, 1)):
        return None
    return [float(n) for n in x.flatten().tolist()]


def _counts(labels: Tensor, brought: Any) -> list[Tensor]:
    """How many labels each row has, int64 [B], by each way to count them: shifted, as brought, and unshifted."""
    ways = [predicted(labels).sum(1)]
    if isinstance(brought, Tensor) and brought.dim() == 2 and len(brought) == len(labels):
        labelled = (brought != IGNORED).cpu()
        ways += [labelled[:, 1:].sum(1), labelled.sum(1)]
    return ways


def _are_their_number(values: list[float], *, one: bool, counts: _Counts) -> bool | None:
    """Are they as many as the labels of each row, or is the `one` as many as all? None if these are too few to tell."""
    of_labels = [[float(n.sum())] if one else n.tolist() for n in counts()]
    if max(max(n) for n in of_labels) <= 1:
        return None
    return max(values) > 1 and any(values in (n, [max(i, 1) for i in n]) for n in of_labels)


# -- along them -------------------------------------------------------------------------------------------


def _laid(x: Tensor) -> Tensor:
    """Without an axis of one value that stands beside rows and positions, [B, S, 1] or [B, 1, S]."""
    return x.squeeze(2).squeeze(1) if x.dim() == 3 else x


def _per_label(x: Tensor, labels: Tensor) -> bool:
    """Has it an entry for about each label? One per row, per class or per image is another thing."""
    rows, length = labels.shape
    x = _laid(x)
    if x.dim() == 1:
        return x.numel() in (rows * length, rows * (length - 1)) and x.numel() != rows
    return x.dim() == 2 and x.shape[0] == rows and x.shape[1] > length // 2


def _is_odd(x: Any, labels: Tensor) -> bool:
    """Has it, in no form that can be laid along labels, entries for more than half of a row's?"""
    rows, most = len(labels), int((labels != IGNORED).sum(1).max())
    of_rows = x if isinstance(x, list | tuple) else []
    if rows == 1 and of_rows and all(_is_number(entry) for entry in of_rows):
        of_rows = [of_rows]
    if isinstance(x, Tensor) and x.dim() == 2:
        of_rows = list(x)
    if len(of_rows) != rows or not all(isinstance(row, list | tuple | Tensor) for row in of_rows):
        return False
    return min(row.numel() if isinstance(row, Tensor) else len(row) for row in of_rows) > max(most // 2, 2)


def _nothing(named: Name, x: Tensor) -> int:
    """What an entry says where it says nothing."""
    return 0 if x.is_floating_point() else named.nothing


def _speaks_at(named: Name, x: Tensor, labels: Tensor) -> Literal["labels", "predictors"] | None:
    """Where an entry of [B, S] or [B, S - 1] says something: at labels alone, at their predictors alone, or neither."""
    says, labelled = (_laid(x) != _nothing(named, x)).cpu(), labels != IGNORED
    if tuple(says.shape) == (len(labels), labels.shape[1] - 1):
        return "labels" if bool(says.any()) and not bool((says & ~labelled[:, 1:]).any()) else None
    if says.shape != labels.shape or not bool(says.any()):
        return None
    if not bool((says & ~labelled).any()):
        return "labels"
    return None if bool((says & ~predictors(labelled)).any()) else "predictors"


def _length_along(x: Tensor, labels: Tensor) -> int | None:
    """How many labels of a row it has entries for: S, or all but the first, S - 1. None if it is laid otherwise."""
    rows, length = labels.shape
    shape = tuple(_laid(x).shape)
    return next((n for n in (length, length - 1) if shape in ((rows, n), (rows * n,))), None)


def _along(named: Name, x: Tensor, of_labels: Tensor, labels: Tensor) -> Tensor:
    """Values of labels [B, S] as an entry that lies along them has them: at labels or at their predictors."""
    if _length_along(x, labels) == labels.shape[1] - 1:
        return of_labels[:, 1:].reshape(x.shape)
    shifted = named.shifted or _speaks_at(named, x, labels) == "predictors"
    return (predictors(of_labels) if shifted else of_labels).reshape(x.shape)


def _refused(name: str, shape: Any, labels: Tensor) -> LabelsError:
    return LabelsError(
        f"`{name}` {shape} seems to name or weigh labels, and a sparse step must drop the same ones from it as from "
        f"`labels` {list(labels.shape)}; pass it as [B, S] like `labels` (as [B, S] or [B, S - 1] under a name that "
        "begins with `shift`, if it is shifted), or train with regate.Config(keep=1.0)"
    )
