"""What a full step may leave out, proven on the first batch against the untouched model.

That a loss reads only predictors of labels, that the head may run on a shortened sequence, that logits may be computed
in chunks: nothing of this is taken for granted. With the first batch and a few of its labels, once,

    untouched   the model's own forward and backward: its loss, which positions of the decoder's output have a
                gradient, and the gradients of the decoder's input and of some parameters
    gated       the same of a full step, with all savings first. Where loss or gradients are others, with one saving
                less, and so on, until they are equal; with none left it is the untouched model

Each run leaves the model as it was (`undisturbed`); dropout in the decoder, which draws for other positions when gated,
must be off (`without_dropout`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from regate.errors import LabelsError
from regate.labels import predicted, predictors
from regate.names import is_of_others
from regate.output.head import Reading
from regate.proof.reads import GIVEN_UP, LEFT_OUT, Read
from regate.proof.trial import (
    Run,
    Subject,
    agree,
    agree_by_chance,
    agree_on_output,
    close,
    is_finite,
    run,
    tolerance,
    tried,
    untouched,
)

FEW = 64  # labels of each row that a proof looks at: enough to tell, and few enough to fit wherever training does
_ELSEWHERE = "another rank's batch asks for it"
_REENTRANT = "its head or its loss is checkpointed with use_reentrant=True, through which no gradient can be compared"
_CHANGES = "the model's own loss changes from one call to the next, so that nothing can be compared"
_NO_NUMBERS = "the model's own loss or gradients are not finite on the first batch, so that nothing can be compared"


@dataclass(frozen=True)
class Proven:
    """What was found out.

    Attributes:
        read: what full steps compute.
        short: may the head run at kept labels alone?
        lazy: may its logits exist a chunk at a time?
        notes: what was given up, and why.
        other: with every position computed that is no padding, the engine's numbers are not the model's.
        rows: did the batch tell whether it matters in which row a label stands (see `tells_rows`)? Else `short` holds
            for rows with as many labels each alone.
        empty: had it a row without labels? Else `short` holds for rows with some alone.
    """

    read: Read
    short: bool
    lazy: bool
    notes: tuple[str, ...] = ()
    other: bool = False
    rows: bool = True
    empty: bool = True

    def weakened(self, later: Proven) -> Proven:
        """What both say may be left out, of whatever either has seen; the notes are the later one's."""
        return replace(
            later,
            read=max(self.read, later.read),
            short=self.short and later.short,
            lazy=self.lazy and later.lazy,
            rows=self.rows or later.rows,
            empty=self.empty or later.empty,
        )


def few_of(labels: Tensor) -> Tensor:
    """The labels that a proof looks at, of labels [B, S]: bool [B, S].

    Spread over each row, so that later samples of a packed one, and the far end of a long one, are compared, too; half
    of them at most, as on a sparse step, so that what reads a label's position for something else is seen to.
    """
    candidates = predicted(labels)
    every = (-(-candidates.sum(1) // FEW)).clamp(min=2)
    if len(every) > 1:  # as many in each row would hide that a loss is a mean of rows' means
        every[0] *= 2
    return candidates & ((candidates.cumsum(1) - 1) % every[:, None] == 0)


def tells_rows(labels: Tensor, call: Mapping[str, Any]) -> bool:
    """Does it show with these labels, bool [B, S], whether it matters in which row a label stands?

    For a mean of rows' means, where one row has more labels than another that has some. For a number that the call
    gives each row, such as a weight, where these are unlike.
    """
    counts = labels.sum(1)
    counts = counts[counts > 0]
    if len(counts) < 2 or bool(counts.min() == counts.max()):
        return False
    of_rows = (x for name, x in call.items() if not is_of_others(name) and _is_of_rows(x, labels))
    return not any(bool((x == x[0]).all()) for x in (x if isinstance(x, Tensor) else torch.tensor(x) for x in of_rows))


def _is_of_rows(x: Any, labels: Tensor) -> bool:
    """A number for each row?"""
    if isinstance(x, Tensor):
        return x.dim() == 1 and len(x) == len(labels)
    return isinstance(x, list | tuple) and len(x) == len(labels) and all(isinstance(n, int | float) for n in x)


NOTHING = Proven(Read.ALL, short=False, lazy=False)  # was proven: nothing is left out


def prove(subject: Subject) -> Proven:
    """See the module's description. No parameter gets a gradient.

    Raises:
        LabelsError: the model's loss does not read what the adapter says predicts its labels.
        PatchError: the decoder cannot be rewritten.
    """
    s = subject
    if s.at_least == Read.ALL:
        return NOTHING
    reading = Reading.of(s.labels, s.few)
    tries = s.all(s.short)
    short, long = tried(partial(run, s, max(Read.KEPT, s.at_least), reading=reading)) if tries else (None, None)
    if tries and not s.all(short is not None):
        short, long = None, long or _ELSEWHERE
    eager, lazily = None, s.lazy is not None
    if short is not None and lazily:
        chunked, eager = tried(partial(run, s, None, reading=reading, output=short.output, lazily=True))
        if chunked is not None and not agree(chunked, short):
            eager = f"its loss or gradient would be others: the loss {chunked.loss}, not {short.loss}"
    own, problem = tried(partial(untouched, s, lazily=True)) if lazily and eager is None else (None, None)
    eager = eager or problem
    if own is None:
        try:
            own = untouched(s)  # what it raises now is the model's own
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            return replace(NOTHING, notes=(_note(Read.ALL, _REENTRANT),))
    if not s.all(own is not None) or own is None:
        return replace(NOTHING, notes=(_note(Read.ALL, "the model returns no loss"),))
    if not s.all(is_finite(own)):
        return replace(NOTHING, notes=(_note(Read.ALL, _NO_NUMBERS),))
    implied, why = _implied(s, (own.by_hidden != 0).any(-1).cpu())
    if (anywhere := Read(s.highest(implied))) > implied:
        implied, why = anywhere, _ELSEWHERE
    shaken = cache(lambda: tried(partial(untouched, s, lazily=lazily and eager is None, shaken=own.eps))[0])
    if short is not None and implied == Read.KEPT:
        here, everywhere = _same(s, short, own, shaken)
        if everywhere:
            notes = () if eager is None else (f"logits at kept labels are computed all at once: {eager}",)
            rows, empty = s.all(tells_rows(s.few, s.call)), s.all(not bool(s.few.any(1).all()))
            return Proven(s.at_least, True, lazily and eager is None, notes, rows=rows, empty=empty)
        long = _ELSEWHERE if here else _other_numbers(short, own, "on the short sequence", "on the whole")
    why, other = why or long, False
    for level in (Read.LIVE, Read.VALID):
        if level < max(implied, s.at_least):
            continue
        found, problem = tried(partial(run, s, level))
        here, everywhere = _same(s, found, own, shaken)
        if everywhere:
            asked = s.short or level > Read.LIVE  # else nobody wanted more to be left out
            return Proven(level, short=False, lazy=False, notes=(_note(level, why),) if why and asked else ())
        other = found is not None and not here
        without = "without positions after the last label" if level == Read.LIVE else "without padding"
        why = why or problem or (None if found is None else _other_numbers(found, own, without, "with them"))
    other = bool(s.highest(int(other)))
    if other:
        again, _ = tried(partial(untouched, s, lazily=lazily and eager is None))
        if not s.all(again is not None and agree_on_output(again, own)):
            why, other = _CHANGES, False
    return replace(NOTHING, notes=(_note(Read.ALL, str(why)),), other=other)


def _same(s: Subject, found: Run | None, own: Run, shaken: Callable[[], Run | None]) -> tuple[bool, bool]:
    """Are these the model's own numbers, here, and on every rank? `shaken` is asked where that may be chance."""
    here = found is not None and agree(found, own)
    if s.all(here):
        return True, True
    if not s.all(found is not None and agree_on_output(found, own)):
        return here, False
    chance = shaken()
    here = found is not None and chance is not None and agree_by_chance(found, own, chance)
    return here, s.all(here)


def _note(read: Read, why: str) -> str:
    more = "" if read == Read.LIVE else f", and {GIVEN_UP[read]}"
    return f"the vocabulary projection runs at every position{more}: {why}"


def _other_numbers(run: Run, own: Run, here: str, there: str) -> str:
    """What of the run is not the model's."""
    if close(run.loss, own.loss, tolerance(own)):
        return f"gradients {here} are others than {there}"
    if run.loss.shape != own.loss.shape:
        return f"the model's loss {here} is of shape {list(run.loss.shape)}, {there} of {list(own.loss.shape)}"
    return f"the model's loss {here} is {run.loss}, {there} {own.loss}"


def _implied(s: Subject, read: Tensor) -> tuple[Read, str | None]:
    """The level that positions [B, S] with a gradient ask for, and why it is not the first."""
    predict = predictors(s.few)
    beyond = read & ~predict
    if not bool(beyond.any()):
        return Read.KEPT, None
    if torch.equal(read, s.few) or not bool((read & predict).any()):
        raise LabelsError(
            f"the loss of {type(s.model).__name__} does not read the positions before its labels, as a causal language "
            "model's does; register an adapter whose `layout` lays labels along the decoder's positions"
            + (", for the batch brings them shifted by one already" if torch.equal(read, s.few) else "")
        )
    row, position = beyond.nonzero()[0].tolist()
    why = f"the model's loss reads {int(beyond.sum())} positions that predict no label, such as {position} of row {row}"
    for level, computed in ((Read.LIVE, s.live), (Read.VALID, s.valid)):
        if not bool((beyond & ~computed).any()) and not bool(computed.all()):  # else this batch cannot tell
            return level, f"{why}; {LEFT_OUT}"
    return Read.ALL, why
