"""The vocabulary projection where it is needed: hidden states that predict no kept label never reach it.

The decoder's output is shortened to the positions that predict kept labels, and the labels with it, so that position t
still predicts label t + 1: the model's own head and loss then run on a short sequence, whatever they are.

    decoder output   h0 h1 h2 h3 h4 h5        shortened   h2 h4 h4
    labels           -  -  -  y3 -  y5        shortened   -  y3 y5

That a model's loss is the same on both, and with logits that are computed in chunks (`logits.py`), is not taken for
granted: `prove` compares them once, before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regate.labels import IGNORED
from regate.output.logits import LazyHead
from regate.output.outputs import get
from regate.training.hooks import standing_in
from regate_patch import PatchError, is_sharded, to_device


@dataclass(frozen=True)
class Reading:
    """Which positions of the decoder's output the head reads; on the CPU.

    Attributes:
        index: int64 [B, N + 1], the predictors of kept labels, at the end of each row filled with any position.
        labels: int64 [B, N + 1], aligned with them as labels are with positions; -100 first and on the filling.
    """

    index: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, kept: Tensor) -> Reading:
        """From labels [B, S] and those kept, bool [B, S]."""
        count = kept.sum(1, keepdim=True)
        n = int(count.max())
        places = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :n]  # kept ones first, in order
        real = torch.arange(n, device=labels.device) < count
        short = labels.new_full((len(labels), n + 1), IGNORED)
        short[:, 1:] = torch.where(real, labels.gather(1, places), IGNORED)
        predictors = (places - 1).clamp(min=0)
        return cls(torch.cat([predictors, predictors[:, -1:]], dim=1), short)

    def shorten(self, output: Any) -> Any:
        """The decoder's output with hidden states [B, S, D] at `index` alone."""
        hidden = hidden_states(output)
        index = to_device(self.index, hidden.device)
        return with_hidden_states(output, hidden[torch.arange(len(index), device=hidden.device)[:, None], index])


def hidden_states(output: Any) -> Tensor:
    """A decoder's last hidden states, in any of the ways to return them."""
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output if isinstance(output, Tensor) else output[0]
    return found


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """The same output with others."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


class ShortHead:
    """Finds out once whether a model's head may run at kept labels alone, and a chunk at a time.

    Attributes:
        allowed: may it run at kept labels alone? None until it was tried.
        lazy: makes its logits lazy; None where they must be computed at once.
    """

    def __init__(self, module: nn.Module, decoder: nn.Module, head: nn.Module, *, wanted: bool) -> None:
        self.module, self.decoder = module, decoder
        self.allowed: bool | None = None if wanted else False
        self.lazy: LazyHead | None = LazyHead(head)

    def try_out(self, call: dict[str, Any], labels: Tensor, kept: Tensor) -> str | None:
        """Settle both on the forward at hand (see `prove`); what the user should know of it, if anything."""
        if is_sharded(self.module):
            self.lazy = None
        proof = prove(self.module, self.decoder, self.lazy, call, labels, kept)
        self.allowed = proof.long is None
        if proof.long is not None:
            return f"the vocabulary projection runs at every position: {proof.long}"
        if proof.eager is not None:
            self.lazy = None
            return f"logits at kept labels are computed all at once: {proof.eager}"
        return None

    def chunks(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the head's logits exist a chunk at a time, if they may."""
        return contextlib.nullcontext() if self.lazy is None else self.lazy.standing_in()

    @property
    def losses(self) -> Tensor | None:
        """Of the last forward's labels, if the model took its cross-entropy of lazy logits; see `LazyHead.losses`."""
        return None if self.lazy is None else self.lazy.losses


_FEW = 64  # labels of each row that a proof looks at: enough to tell, and few enough to fit wherever training does
_LOSS, _GRADIENT = 1e-3, 2e-2  # relative differences; single entries of a gradient may be rounded to bfloat16


@dataclass(frozen=True)
class Proof:
    """What was found out about a model's head and loss.

    Attributes:
        long: why the vocabulary projection must run at every position; None if it need not.
        eager: why logits must be computed at once; None if they need not.
    """

    long: str | None
    eager: str | None


def prove(
    module: nn.Module, decoder: nn.Module, lazy: LazyHead | None, call: dict[str, Any], labels: Tensor, kept: Tensor
) -> Proof:
    """Does `module` find the same loss on a shortened sequence, and the same loss and gradient with lazy logits?

    Runs the model three times more than training does: up to the decoder's output as in training, so that the decoder
    is captured once; from there on at a few labels of each row, on the whole sequence, on the shortened one, and on
    the shortened one with lazy logits. No parameter gets a gradient.

    Args:
        module: the causal language model.
        decoder: the module inside it.
        lazy: of the model's head; None if its logits must be computed at once anyway.
        call: the arguments of the forward at hand.
        labels, kept: [B, S] on the CPU, as the batch brought them, and those kept, bool.
    """
    few = kept & (kept.cumsum(1) <= _FEW)
    reading = Reading.of(labels, few)
    device = call["labels"].device
    whole_call = {**call, "labels": to_device(torch.where(few, labels, IGNORED), device)}
    short_call = {**call, "labels": to_device(reading.labels, device)}
    decoded: list[Any] = []

    def leave(decoder: nn.Module, args: Any, output: Any) -> Any:
        torch.set_grad_enabled(False)
        decoded.append(with_hidden_states(output, hidden_states(output).detach()))
        return decoded[-1]

    def chunks(lazily: bool, rows: int | None = None) -> contextlib.AbstractContextManager[None]:
        return lazy.standing_in(rows=rows) if lazily and lazy is not None else contextlib.nullcontext()

    def whole(*, lazily: bool) -> Any:
        with torch.enable_grad(), _hooked(decoder, leave), chunks(lazily):
            return get(module.forward(**whole_call), "loss")

    def short(*, lazily: bool) -> list[Tensor | None]:
        """The loss, and its gradients by the shortened hidden states and by the head's parameters."""
        output = reading.shorten(decoded[-1])
        hidden = hidden_states(output).requires_grad_()
        given = with_hidden_states(output, hidden)
        thirds = reading.index.numel() // 3 + 1
        with torch.enable_grad(), standing_in(decoder, lambda *args, **kwargs: given), chunks(lazily, thirds):
            loss = get(module.forward(**short_call), "loss")
        learning = [] if lazy is None else lazy.trained()
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, *learning], allow_unused=True)]

    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        loss, eager = _tried(lambda: whole(lazily=True))
        if eager is not None:
            loss = whole(lazily=False)  # what it raises now is the model's own
        if loss is None or not decoded:
            return Proof("the model returns no loss" if decoded else "the model does not call its decoder", None)
        plain, long = _tried(lambda: short(lazily=False))
        if plain is None:
            return Proof(long, eager)
        found, problem = _tried(lambda: short(lazily=True)) if lazy is not None else (None, None)
        eager = eager or problem
        if found is not None and not all(map(_same, found, plain, [_LOSS, *[_GRADIENT] * len(plain)])):
            eager = f"its loss or gradient would be others: the loss {found[0]}, not {plain[0]}"
        if eager is not None:
            loss = whole(lazily=False)
    if not _same(plain[0], loss, _LOSS):
        return Proof(f"the model's loss on the short sequence is {plain[0]}, on the whole one {loss}", eager)
    return Proof(None, eager)


def _same(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    """Equal as a whole up to rounding."""
    if a is None or b is None:
        return a is b
    norm = partial(torch.linalg.vector_norm, dtype=torch.promote_types(b.dtype, torch.float32))
    return bool(norm(a - b) <= tolerance * norm(b) + 1e-6)


def _tried(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it gives, or why it gives nothing: what a model makes of an unusual call is no reason to stop."""
    try:
        return run(), None
    except PatchError:
        raise  # the decoder cannot be gated at all, and the user must know
    except Exception as error:
        return None, f"the model cannot: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
