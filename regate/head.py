"""The vocabulary projection where it is needed: hidden states that predict no kept label never reach it.

The decoder's output is shortened to the positions that predict kept labels, and the labels with it, so that position t
still predicts label t + 1: the model's own head and loss then run on a short sequence, whatever they are.

    decoder output   h0 h1 h2 h3 h4 h5        shortened   h2 h4 h4
    labels           -  -  -  y3 -  y5        shortened   -  y3 y5

That a model's loss is the same on both is not taken for granted: `proven` compares them once, on the first batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate.outputs import get
from regate.selection import IGNORED


@dataclass(frozen=True)
class Reading:
    """Which positions of the decoder's output the head reads.

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
        index = self.index.to(hidden.device)
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


@torch.no_grad()
def proven(
    module: nn.Module, decoder: nn.Module, call: dict[str, Any], output: Any, decoded: Any, reading: Reading
) -> str | None:
    """Does `module` find the same loss on the shortened sequence? None if so, else why not.

    Runs the model around its decoder a second time, without gradients; the decoder gives what it gave before.

    Args:
        module: the causal language model.
        decoder: the module inside it.
        call: the arguments of the forward that gave `output`.
        output: what it gave.
        decoded: what its decoder gave.
        reading: where kept labels are predicted.
    """
    loss = get(output, "loss")
    if loss is None:
        return "the model returns no loss"
    own = decoder.__dict__.get("forward")
    hook = decoder.register_forward_hook(lambda decoder, args, output: reading.shorten(output))
    try:
        decoder.forward = lambda *args, **kwargs: decoded
        with torch.random.fork_rng(devices=[loss.device.index] if loss.is_cuda else []):
            short = get(module.forward(**{**call, "labels": reading.labels}), "loss")
    except Exception as error:  # whatever the model makes of a short sequence, it is no reason to stop training
        return f"the model cannot: {type(error).__name__}: {error}"
    finally:
        hook.remove()
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
    if short is None or not torch.allclose(short.float(), loss.float(), rtol=1e-3, atol=1e-5):
        return f"the model's loss on the short sequence is {short}, on the whole one {loss}"
    return None
