"""The vocabulary projection where it is needed: hidden states that predict no kept label never reach it.

The decoder's output is shortened to the positions that predict kept labels, and the labels with it, so that position t
still predicts label t + 1: the model's own head and loss then run on a short sequence, whatever they are. Labels are
dealt out to as many rows as there are, in order and equally many to each, or rows that keep few would be filled up to
those that keep many.

    decoder output   h0 h1 h2 h3 h4 h5        shortened   h2 h4 h4
    labels           -  -  -  y3 -  y5        shortened   -  y3 y5

That a model's loss is the same on both is not taken for granted: see `regate/proof`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regate.labels import IGNORED
from regate.output.loss import Places
from regate_patch import to_device


@dataclass(frozen=True)
class Reading:
    """Which positions of the decoder's output the head reads; on the CPU.

    Attributes:
        index: int64 [B, N + 1], `row * S + position` of the predictors of kept labels, filled at the end with any.
        labels: int64 [B, N + 1], aligned with them as labels are with positions; -100 first and on the filling.
    """

    index: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, kept: Tensor) -> Reading:
        """From labels [B, S] and those kept, bool [B, S]."""
        rows, length = labels.shape
        row, column = kept.nonzero(as_tuple=True)
        n = -(-len(row) // rows)
        missing = (0, rows * n - len(row))
        short = labels.new_full((rows, n + 1), IGNORED)
        short[:, 1:] = F.pad(labels[row, column], missing, value=IGNORED).view(rows, n)
        index = F.pad(row * length + column - 1, missing).view(rows, n)
        return cls(torch.cat([index, index[:, -1:]], dim=1), short)

    @property
    def places(self) -> Places:
        """Of kept labels, in the short sequence."""
        return Places.of(self.labels, self.labels != IGNORED)

    @property
    def unread(self) -> Tensor:
        """bool [B, N + 1] on the CPU, positions from which no loss predicts a label: the last, and the filling."""
        return F.pad(self.labels[:, 1:] == IGNORED, (0, 1), value=True)

    def shorten(self, output: Any) -> Any:
        """The decoder's output with hidden states [B, S, D] at `index` alone."""
        hidden = hidden_states(output)
        return with_hidden_states(output, hidden.flatten(0, 1)[to_device(self.index, hidden.device)])


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


def is_aside(args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Is this call of a decoder no part of the training on a batch [B, S], but one without gradients on another?"""
    if torch.is_grad_enabled():
        return False
    found = embeddings(args, kwargs)
    found = kwargs.get("input_ids") if found is None else found
    return isinstance(found, Tensor) and tuple(found.shape[:2]) != shape


def embeddings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The embeddings [B, S, D] that a decoder is called with, if it is."""
    found = kwargs.get("inputs_embeds", kwargs.get("hidden_states", args[0] if args else None))
    return found if isinstance(found, Tensor) and found.dim() == 3 else None
