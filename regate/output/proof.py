"""What a full step may leave out, proven on the first batch against the untouched model.

That a loss reads only predictors of labels, that the head may run on a shortened sequence, that logits may be computed
in chunks: nothing of this is taken for granted. With the first batch and a few of its labels, once,

    untouched   the model's own forward and backward: its loss, which positions of the decoder's output have a
                gradient, and the gradients of the decoder's input and of some parameters
    gated       the same of a full step, with all savings first. Where loss or gradients are others, with one saving
                less, and so on, until they are equal; with none left it is the untouched model

Random numbers are drawn from one seed in each run; dropout in the decoder, which draws for other positions when gated,
must be off (`without_dropout`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regate.errors import LabelsError
from regate.labels import predictors
from regate.output.head import Reading, embeddings, hidden_states, with_hidden_states
from regate.output.logits import LazyHead
from regate.output.outputs import get
from regate.output.reads import GIVEN_UP, Read
from regate.training.hooks import standing_in
from regate_patch import PatchError, to_device

FEW = 64  # labels of each row that a proof looks at: enough to tell, and few enough to fit wherever training does
_PARAMETERS = 3  # of the decoder, whose gradients are compared
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
    """

    read: Read
    short: bool
    lazy: bool
    notes: tuple[str, ...] = ()
    other: bool = False

    def weakened(self, later: Proven) -> Proven:
        """What both say may be left out; the notes and doubts are the later one's."""
        return replace(
            later, read=max(self.read, later.read), short=self.short and later.short, lazy=self.lazy and later.lazy
        )


NOTHING = Proven(Read.ALL, short=False, lazy=False)  # was proven: nothing is left out


@dataclass(frozen=True)
class Subject:
    """A model, and how to run it.

    Attributes:
        model, decoder: the causal language model, and the module inside it.
        call: the arguments of its call, with few labels.
        labels, few: [B, S] on the CPU: the labels as the batch brought them, and those few, bool.
        live, valid: [B, S] bool on the CPU: positions up to the last of few labels; positions that are no padding.
        elide: `(read, tail)`: a context in which the decoder computes what this level asks for, with `tail` its last
            layer's tail only where few labels are predicted.
        lazy: of the model's head; None if its logits must be computed at once anyway.
        short: may the head be asked to run at kept labels alone?
        at_least: computed in any case.
        backward: may gradients be taken through the decoder and of parameters? Not where they are sharded.
        highest: of the numbers that ranks say, the highest. Ranks of a sharded model run in step, so that what each
            finds in its own batch decides for all.
    """

    model: nn.Module
    decoder: nn.Module
    call: dict[str, Any]
    labels: Tensor
    few: Tensor
    live: Tensor
    valid: Tensor
    elide: Callable[[Read, bool], contextlib.AbstractContextManager[Any]]
    lazy: LazyHead | None
    short: bool
    at_least: Read
    backward: bool
    highest: Callable[[int], int]

    def all(self, this: bool) -> bool:
        """Is it so on every rank?"""
        return not self.highest(int(not this))


@dataclass
class _Run:
    """What one run gave.

    Attributes:
        loss: of few labels.
        by_hidden: [B, S, D], its gradient by the decoder's output.
        by_head: by the head's parameters, where they are compared.
        behind: by the decoder's input and some of its parameters, where the decoder ran.
        output: of the decoder, detached.
    """

    loss: Tensor
    by_hidden: Tensor
    by_head: list[Tensor | None]
    behind: list[Tensor | None]
    output: Any


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
    short, long = _tried(partial(_run, s, max(Read.KEPT, s.at_least), reading=reading)) if tries else (None, None)
    if tries and not s.all(short is not None):
        short, long = None, long or _ELSEWHERE
    eager, lazily = None, s.lazy is not None
    if short is not None and lazily:
        chunked, eager = _tried(partial(_run, s, None, reading=reading, output=short.output, lazily=True))
        if chunked is not None and not _same(chunked, short):
            eager = f"its loss or gradient would be others: the loss {chunked.loss}, not {short.loss}"
    own, problem = _tried(partial(_run, s, None, lazily=True)) if lazily and eager is None else (None, None)
    eager = eager or problem
    if own is None:
        own = _run(s, None)  # what it raises now is the model's own
    if not s.all(own is not None) or own is None:
        return replace(NOTHING, notes=(_note(Read.ALL, "the model returns no loss"),))
    if not s.all(_is_finite(own)):
        return replace(NOTHING, notes=(_note(Read.ALL, _NO_NUMBERS),))
    implied, why = _implied(s, (own.by_hidden != 0).any(-1).cpu())
    if (anywhere := Read(s.highest(implied))) > implied:
        implied, why = anywhere, _ELSEWHERE
    if short is not None and implied == Read.KEPT:
        same = _same(short, own)
        if s.all(same):
            notes = () if eager is None else (f"logits at kept labels are computed all at once: {eager}",)
            return Proven(s.at_least, short=True, lazy=lazily and eager is None, notes=notes)
        long = _ELSEWHERE if same else _other_numbers(short, own, "on the short sequence", "on the whole")
    why, other = why or long, False
    for level in (Read.LIVE, Read.VALID):
        if level < max(implied, s.at_least):
            continue
        found, problem = _tried(partial(_run, s, level))
        same = found is not None and _same(found, own)
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


def _other_numbers(run: _Run, own: _Run, here: str, there: str) -> str:
    """What of the run is not the model's."""
    if _close(run.loss, own.loss, _tolerance(own)):
        return f"gradients {here} are others than {there}"
    return f"the model's loss {here} is {run.loss}, {there} {own.loss}"


def _implied(s: Subject, read: Tensor) -> tuple[Read, str | None]:
    """The level that positions [B, S] with a gradient ask for, and why it is not the first."""
    predict = predictors(s.few)
    beyond = read & ~predict
    if not bool(beyond.any()):
        return Read.KEPT, None
    if not bool((read & predict).any()):
        raise LabelsError(
            f"the loss of {type(s.model).__name__} does not read the positions before its labels, as a causal language "
            "model's does; register an adapter whose `layout` lays labels along the decoder's positions"
        )
    row, position = beyond.nonzero()[0].tolist()
    why = f"the model's loss reads {int(beyond.sum())} positions that predict no label, such as {position} of row {row}"
    for level, computed in ((Read.LIVE, s.live), (Read.VALID, s.valid)):
        if not bool((beyond & ~computed).any()) and not bool(computed.all()):  # else this batch cannot tell
            return level, why
    return Read.ALL, why


def _run(
    s: Subject, level: Read | None, *, reading: Reading | None = None, output: Any = None, lazily: bool = False
) -> _Run | None:
    """The model once, forward and backward; None if it has no loss.

    Args:
        level: as a full step of this level; None leaves the model untouched.
        reading: the head runs on the shortened sequence.
        output: of the decoder, from which on the model runs.
        lazily: with logits in chunks.
    """
    call, rows = s.call, None
    if reading is not None:
        call = {**call, "labels": to_device(reading.labels, call["labels"].device)}
        rows = reading.index.numel() // 3 + 1  # so that there are several chunks
    seen: dict[str, Any] = {}

    def enter(decoder: nn.Module, args: Any, kwargs: Any) -> None:
        seen["input"] = embeddings(args, kwargs)

    def leave(decoder: nn.Module, args: Any, made: Any) -> Any:
        hidden = hidden_states(made)
        leaf = hidden.detach().requires_grad_()
        seen.update(hidden=hidden, leaf=leaf, output=with_hidden_states(made, hidden.detach()))
        made = with_hidden_states(made, leaf)
        return made if reading is None else reading.shorten(made)

    with contextlib.ExitStack() as scope:
        scope.enter_context(torch.enable_grad())
        scope.enter_context(_hooked(s.decoder, enter, leave))
        if call["labels"].is_cuda and level is None and output is None:  # no more memory than a gated step takes
            scope.enter_context(torch.autograd.graph.save_on_cpu())
        with contextlib.ExitStack() as forward:
            forward.enter_context(
                torch.random.fork_rng(devices=[call["labels"].device] if call["labels"].is_cuda else [])
            )
            torch.manual_seed(0)
            if level is not None:
                forward.enter_context(s.elide(level, reading is not None and level == Read.KEPT))
            if output is not None:
                forward.enter_context(standing_in(s.decoder, lambda *args, **kwargs: output))
            if lazily and s.lazy is not None:
                forward.enter_context(s.lazy.standing_in(rows=rows))
            loss = loss_of(s.model.forward(**call))
        if loss is None or "leaf" not in seen:
            return None
        head = s.lazy.trained() if s.lazy is not None and s.backward and reading is not None else []
        by_hidden, *by_head = torch.autograd.grad(loss, [seen["leaf"], *head], allow_unused=True, retain_graph=True)
        if by_hidden is None:
            by_hidden = torch.zeros_like(seen["leaf"])
        behind = [] if output is not None else _behind(s, loss, seen["hidden"], by_hidden, seen["input"])
    return _Run(loss.detach(), by_hidden, list(by_head), behind, seen["output"])


def _behind(s: Subject, loss: Tensor, hidden: Tensor, by_hidden: Tensor, entered: Tensor | None) -> list[Tensor | None]:
    """Gradients by the decoder's input and some of its parameters; none where they cannot be taken on their own."""
    layers = [m for m in s.decoder.modules() if not isinstance(m, nn.Embedding)]  # ids are embedded before it, too
    learning = [p for m in layers for p in m.parameters(recurse=False) if p.requires_grad] if s.backward else []
    some = [learning[i * (len(learning) - 1) // (_PARAMETERS - 1)] for i in range(_PARAMETERS)] if learning else []
    wanted = [x for x in [entered, *some] if x is not None and x.requires_grad]
    if not s.backward or not hidden.requires_grad or not wanted:
        return []
    try:
        found = torch.autograd.grad([loss, hidden], wanted, [torch.ones_like(loss), by_hidden], allow_unused=True)
        return [_off_padding(s, x) if wanted[0] is entered and i == 0 else x for i, x in enumerate(found)]
    except RuntimeError as error:
        if "use_reentrant" in str(error):  # such checkpoints only serve a backward pass that fills every `.grad`
            return []
        raise


def _off_padding(s: Subject, gradient: Tensor | None) -> Tensor | None:
    """By the decoder's input [B, S, D]: padding learns nothing, and may have no number there (a root's, of zeros)."""
    if gradient is None or gradient.shape[:2] != s.valid.shape:
        return gradient
    return gradient.masked_fill(~to_device(s.valid, gradient.device)[..., None], 0.0)


def loss_of(output: Any) -> Tensor | None:
    """The loss that a model returns, or, of a head that returns log-probabilities alone (TRL's), their mean."""
    loss, log_probs, mask = get(output, "loss"), get(output, "log_probs"), get(output, "label_mask")
    if loss is None and log_probs is not None and mask is not None:
        loss = -(log_probs * mask).sum() / mask.sum()
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _same(a: _Run, b: _Run) -> bool:
    """Equal up to half of the digits that the decoder's dtype has, and float32's for the loss."""
    tolerance = _tolerance(b)
    pairs: list[tuple[Tensor | None, Tensor | None]] = [(a.loss, b.loss), (a.by_hidden, b.by_hidden)]
    for some, others in ((a.by_head, b.by_head), (a.behind, b.behind)):  # where both runs have them
        pairs += zip(some, others, strict=True) if some and others else []
    return all(_close(x, y, tolerance) for x, y in pairs)


def _tolerance(run: _Run) -> float:
    return max(torch.finfo(_computed_in(run.by_hidden)).eps ** 0.5, 1e-6)


def _is_finite(run: _Run) -> bool:
    found = [run.loss, run.by_hidden, *run.by_head, *run.behind]
    return all(bool(x.isfinite().all()) for x in found if x is not None)


def _close(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    norm = partial(torch.linalg.vector_norm, dtype=torch.promote_types(b.dtype, torch.float32))
    return bool(norm(a - b) <= tolerance * norm(b) + 1e-6 * tolerance)


def _computed_in(x: Tensor) -> torch.dtype:
    """The narrowest dtype that takes part."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return max(x.dtype, autocast, key=lambda dtype: torch.finfo(dtype).eps)


def _tried(run: Callable[[], _Run | None]) -> tuple[_Run | None, str | None]:
    """What it gives, or why it gives nothing: what a model makes of an unusual call is no reason to stop."""
    try:
        found = run()
        return found, None if found is not None else "there is no loss with a gradient"
    except PatchError:
        raise  # the decoder cannot be gated at all, and the user must know
    except Exception as error:
        return None, f"the model cannot: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _hooked(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[bool]:
    """Inside, dropout in the module is off; yields whether there was any."""
    changed: list[tuple[nn.Module, str, float]] = []
    for part in module.modules():
        named = "dropout" in type(part).__name__.lower()
        for name, number in vars(part).items():
            if isinstance(number, float) and number > 0 and ("dropout" in name or (named and name == "p")):
                changed.append((part, name, number))
    for part, name, _ in changed:
        setattr(part, name, 0.0)
    try:
        yield bool(changed)
    finally:
        for part, name, number in changed:
            setattr(part, name, number)
