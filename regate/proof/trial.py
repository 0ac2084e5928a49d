"""A model once, forward and backward, untouched or as a full step of some level; do two such runs agree?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regate.errors import ConfigError
from regate.output.head import Reading, embeddings, hidden_states, is_aside, with_hidden_states
from regate.output.logits import LazyHead
from regate.output.outputs import loss_of
from regate.proof.reads import Read
from regate.training.hooks import standing_in
from regate.undisturbed import undisturbed
from regate_patch import PatchError, to_device

_PARAMETERS = 3  # of the decoder, whose gradients are compared
_SCALE = 2.0**10  # of a loss in float16, as trainers scale it: its gradients would fall below what float16 can tell


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
class Run:
    """What one run gave.

    Attributes:
        loss: of few labels; not always reduced to one number.
        by_hidden: [B, S, D], its gradient by the decoder's output.
        by_head: by the head's parameters, where they are compared.
        behind: by the decoder's input and some of its parameters, where the decoder ran.
        output: of the decoder, detached.
        dtype: the narrowest that the decoder computed in: its output's, or autocast's, which may begin inside the
            model's own forward (accelerate).
    """

    loss: Tensor
    by_hidden: Tensor
    by_head: list[Tensor | None]
    behind: list[Tensor | None]
    output: Any
    dtype: torch.dtype


def run(
    s: Subject, level: Read | None, *, reading: Reading | None = None, output: Any = None, lazily: bool = False
) -> Run | None:
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

    shape = tuple(s.labels.shape)

    def enter(decoder: nn.Module, args: Any, kwargs: Any) -> None:
        if not is_aside(args, kwargs, shape):
            seen["input"] = embeddings(args, kwargs)

    def leave(decoder: nn.Module, args: Any, kwargs: Any, made: Any) -> Any:
        if is_aside(args, kwargs, shape):
            return made
        hidden = hidden_states(made)
        leaf = hidden.detach().requires_grad_()
        seen.update(hidden=hidden, leaf=leaf, output=with_hidden_states(made, hidden.detach()))
        seen["dtype"] = _computed_in(hidden)
        made = with_hidden_states(made, leaf)
        return made if reading is None else reading.shorten(made)

    with contextlib.ExitStack() as scope:
        scope.enter_context(torch.enable_grad())
        scope.enter_context(undisturbed(s.model))
        scope.enter_context(_hooked(s.decoder, enter, leave))
        if call["labels"].is_cuda and level is None and output is None:  # no more memory than a gated step takes
            scope.enter_context(torch.autograd.graph.save_on_cpu())
        with contextlib.ExitStack() as forward:
            if level is not None:
                forward.enter_context(s.elide(level, reading is not None and level == Read.KEPT))
            if output is not None:
                forward.enter_context(standing_in(s.decoder, lambda *args, **kwargs: output))
            if lazily and s.lazy is not None:
                forward.enter_context(s.lazy.standing_in(rows=rows))
            loss = loss_of(s.model.forward(**call))
        if loss is None or "leaf" not in seen:
            return None
        head = [*s.lazy.trained().values()] if s.lazy is not None and s.backward and reading is not None else []
        scaled = loss.sum() * (_SCALE if seen["dtype"] == torch.float16 else 1)
        by_hidden, *by_head = torch.autograd.grad(scaled, [seen["leaf"], *head], allow_unused=True, retain_graph=True)
        if by_hidden is None:
            by_hidden = torch.zeros_like(seen["leaf"])
        behind = [] if output is not None else _behind(s, scaled, seen["hidden"], by_hidden, seen["input"])
    return Run(loss.detach(), by_hidden, list(by_head), behind, seen["output"], seen["dtype"])


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


def tried(run: Callable[[], Run | None]) -> tuple[Run | None, str | None]:
    """What it gives, or why it gives nothing: what a model makes of an unusual call is no reason to stop."""
    try:
        found = run()
        return found, None if found is not None else "there is no loss with a gradient"
    except (ConfigError, PatchError):
        raise  # the decoder cannot be gated at all, or not so, and the user must know
    except Exception as error:
        return None, f"the model cannot: {type(error).__name__}: {error}"


def agree(a: Run, b: Run) -> bool:
    """Equal up to half of the digits that the decoder's dtype has, and float32's for the loss."""
    allowed = tolerance(b)
    pairs: list[tuple[Tensor | None, Tensor | None]] = [(a.loss, b.loss), (a.by_hidden, b.by_hidden)]
    for some, others in ((a.by_head, b.by_head), (a.behind, b.behind)):  # where both runs have them
        pairs += zip(some, others, strict=True) if some and others else []
    return all(close(x, y, allowed) for x, y in pairs)


def tolerance(run: Run) -> float:
    return max(torch.finfo(run.dtype).eps ** 0.5, 1e-6)


def is_finite(run: Run) -> bool:
    found = [run.loss, run.by_hidden, *run.by_head, *run.behind]
    return all(bool(x.isfinite().all()) for x in found if x is not None)


def close(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    norm = partial(torch.linalg.vector_norm, dtype=torch.promote_types(b.dtype, torch.float32))
    return bool(norm(a - b) <= tolerance * norm(b) + 1e-6 * tolerance)


def _computed_in(x: Tensor) -> torch.dtype:
    """The narrowest dtype that takes part."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return max(x.dtype, autocast, key=lambda dtype: torch.finfo(dtype).eps)


@contextlib.contextmanager
def _hooked(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
