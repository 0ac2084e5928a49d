"""Who reads what of the decoder's output, and which savings that allows.

A label's loss reads the position that predicts it, and nothing else; what no one reads need not be computed. But other
things may read more: a loss of the model's own over all logits, an auxiliary head on hidden states, a hook. The least
that makes them right is then computed, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

from torch import nn


class Read(IntEnum):
    """What a full step computes; each level adds what the one before leaves out."""

    KEPT = 0
    """The last layer's tail, as the head, at predictors of kept labels alone; nothing after the last of them."""
    LIVE = 1
    """Every position up to a row's last kept label, through the whole decoder."""
    VALID = 2
    """What follows the last label, too."""
    ALL = 3
    """Padding, too: full steps run the decoder as it is."""


GIVEN_UP = {
    Read.KEPT: "nothing",
    Read.LIVE: "the last layer runs at every position before the last label",
    Read.VALID: "positions after the last label are computed",
    Read.ALL: "full steps run the decoder as it is, padding and all; on sparse steps positions that are left out have "
    "the value with which the residual stream enters the first layer",
}

_ASKED = ("output_hidden_states", "output_attentions")
_PLUMBING = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "regate", "regate_patch")


def inner_reader(call: Mapping[str, Any], model: nn.Module, decoder: nn.Module) -> str | None:
    """Who reads values inside the decoder, or its output by a hook; None if nobody does."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _ASKED:
        asked = call.get(name)
        if asked or (asked is None and (getattr(config, name, False) or getattr(text, name, False))):
            return f"{name}=True hands the decoder's values to the caller"
    return _hooked(decoder, inside=True)


def logits_reader(head: nn.Module) -> str | None:
    """Who reads by a hook what the head is given or gives; None if nobody does."""
    return _hooked(head, inside=False)


def capturing(decoder: nn.Module) -> None:
    """Let transformers install the hooks by which it collects hidden states, which it does behind a lock otherwise."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    if recording is not None:
        recording.maybe_install_capturing_hooks(decoder)


def _hooked(module: nn.Module, *, inside: bool) -> str | None:
    """A hook of the user's on the module or its parts; `inside`: what the module itself is given does not count."""
    if not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return None
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            continue  # sees nothing of the output
        before = {} if inside and part is module else part._forward_pre_hooks
        for hook in (*part._forward_hooks.values(), *before.values()):
            if _origin(hook).partition(".")[0] not in _PLUMBING:
                where = f"{type(module).__name__}.{name}" if name else type(module).__name__
                return f"a forward hook ({_origin(hook)}) hangs on {where}"
    return None


def _origin(hook: Callable[..., Any]) -> str:
    """The module that a hook's code is from."""
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return getattr(hook, "__module__", None) or type(hook).__module__
