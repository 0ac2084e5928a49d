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

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from regate.errors import LabelsError
from regate.labels import predicted, predictors
from regate.output.head import Reading
from regate.proof.reads import GIVEN_UP, LEFT_OUT, Read
from regate.proof.trial import Run, Subject, agree, close, is_finite, run, tolerance, tried

FEW = 64  # labels of each row that a proof looks at: enough to tell, and few enough to fit wherever training does
_ELSEWHERE = "another rank's batch asks for it"
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
        rows: did the batch tell a mean of labels from a mean of rows' means? One row, or rows with as many labels each,
            cannot; then `short` holds for such batches alone.
    """

    read: Read
    short: bool
    lazy: bool
    notes: tuple[str, ...] = ()
    other: bool = False
    rows: bool = True

    def weakened(self, later: Proven) -> Proven:
        """What both say may be left out; the notes and doubts are the later one's."""
        return replace(
            later, read=max(self.read, later.read), short=self.short and later.short, lazy=self.lazy and later.lazy
        )


def few_of(labels: Tensor) -> Tensor:
    """The labels that a proof looks at, of labels [B, S]: bool [B, S].

    Spread over each row, so that later samples of a packed one, and the far end of a long one, are compared, too.
    """
    candidates = predicted(labels)
    every = (-(-candidates.sum(1) // FEW)).clamp(min=1)
    if len(every) > 1:  # as many in each row would hide that a loss is a mean of rows' means
        every[0] *= 2
    return candidates & ((candidates.cumsum(1) - 1) % every[:, None] == 0)


def tells_rows(labels: Tensor) -> bool:
    """Has one row more of these labels, bool [B, S], than another that has some?"""
    counts = labels.sum(1)
    counts = counts[counts > 0]
    return len(counts) > 1 and bool(counts.min() < counts.max())


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
    own, problem = tried(partial(run, s, None, lazily=True)) if lazily and eager is None else (None, None)
    eager = eager or problem
    if own is None:
        own = run(s, None)  # what it raises now is the model's own
    if not s.all(own is not None) or own is None:
        return replace(NOTHING, notes=(_note(Read.ALL, "the model returns no loss"),))
    if not s.all(is_finite(own)):
        return replace(NOTHING, notes=(_note(Read.ALL, _NO_NUMBERS),))
    implied, why = _implied(s, (own.by_hidden != 0).any(-1).cpu())
    if (anywhere := Read(s.highest(implied))) > implied:
        implied, why = anywhere, _ELSEWHERE
    if short is not None and implied == Read.KEPT:
        same = agree(short, own)
        if s.all(same):
            notes = () if eager is None else (f"logits at kept labels are computed all at once: {eager}",)
            return Proven(s.at_least, True, lazily and eager is None, notes, rows=s.all(tells_rows(s.few)))
        long = _ELSEWHERE if same else _other_numbers(short, own, "on the short sequence", "on the whole")
    why, other = why or long, False
    for level in (Read.LIVE, Read.VALID):
        if level < max(implied, s.at_least):
            continue
        found, problem = tried(partial(run, s, level))
        same = found is not None and agree(found, own)
        if s.all(same):
            asked = s.short or level > Read.LIVE  # else nobody wanted more to be left out
            return Proven(level, short=False, lazy=False, notes=(_note(level, why),) if why and asked else ())
        other = found is not None and not same
        without = "without positions after the last label" if level == Read.LIVE else "without padding"
        why = why or problem or (None if found is None else _other_numbers(found, own, without, "with them"))
    return replace(NOTHING, notes=(_note(Read.ALL, str(why)),), other=bool(s.highest(int(other))))


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
