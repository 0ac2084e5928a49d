"""The vocabulary projection where it is needed: hidden states that predict no kept label never reach it.

The decoder's output is shortened to the positions that predict kept labels, and the labels with it, so that position t
still predicts label t + 1: the model's own head and loss then run on a short sequence, whatever they are.

    decoder output   h0 h1 h2 h3 h4 h5        shortened   h2 h4 h4
    labels           -  -  -  y3 -  y5        shortened   -  y3 y5

That a model's loss is the same on both is not taken for granted: `proven` compares them once, before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate.outputs import get
from regate.selection import IGNORED
from regate_patch import to_device


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


def proven(module: nn.Module, decoder: nn.Module, call: dict[str, Any], reading: Reading) -> str | None:
    """Does `module` find the same loss on the shortened sequence? None if so, else why not.

    Runs the model once more than training does: up to the decoder's output as in training, so that the decoder is
    captured once; from there on without gradients, for both sequences.

    Args:
        module: the causal language model.
        decoder: the module inside it.
        call: the arguments of the forward at hand, with labels [B, S] of which only kept ones are left.
        reading: where kept labels are predicted.
    """
    whole: list[Any] = []

    def leave(decoder: nn.Module, args: Any, output: Any) -> Any:
        torch.set_grad_enabled(False)
        whole.append(with_hidden_states(output, hidden_states(output).detach()))
        return whole[-1]

    device = call["labels"].device
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        with torch.enable_grad(), _hooked(decoder, leave):
            loss = get(module.forward(**call), "loss")
        if loss is None or not whole:
            return "the model returns no loss" if whole else "the model does not call its decoder"
        with torch.no_grad(), _standing_in(decoder, reading.shorten(whole[-1])):
            try:
                short = get(module.forward(**{**call, "labels": to_device(reading.labels, device)}), "loss")
            except Exception as error:  # whatever the model makes of a short sequence, it is no reason to stop
                return f"the model cannot: {type(error).__name__}: {error}"
    if short is None or not torch.allclose(short.float(), loss.float(), rtol=1e-3, atol=1e-5):
        return f"the model's loss on the short sequence is {short}, on the whole one {loss}"
    return None


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _standing_in(module: nn.Module, output: Any) -> Iterator[None]:
    """Calls of `module` give this output."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
