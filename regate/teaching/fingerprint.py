"""What reference losses depend on, so that those of one teacher are not taken for another's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from regate.teaching.weights import sampled

# What is in the names of a text config's settings that change numbers while weights stay as they are: of rotary
# positions, norms, windows, soft caps, scales and multipliers, activations, heads, experts and kinds of layers.
_SETTINGS = (
    "rope", "rotary", "theta", "norm", "eps", "window", "attention_chunk", "cap", "scal", "multiplier", "_act",
    "activation", "heads", "per_tok", "layer_types", "bidirectional",
)  # fmt: skip
_IN_TRAINING = ("dropout", "init", "loss")  # in names of others, which change nothing that a teacher says


def fingerprint_of(
    parts: Iterable[Iterable[tuple[str, nn.Parameter]]],
    config: Any,
    *,
    architecture: str,
    padding: Mapping[str, Any],
) -> dict[str, str]:
    """Of a teacher; some values of each of its parameters stand for its weights.

    Args:
        parts: its embeddings, decoder and head, each as the names and values of the parameters that answer.
        config: its text config.
        architecture: its decoder's class.
        padding: how it sees visual positions.
    """
    digest = blake2b(digest_size=16)
    for parameters in parts:
        for name, parameter in sorted(parameters):
            # As a copy has them on CUDA: one teacher is the same wherever it was copied, and uncopied.
            values = sampled(parameter).bfloat16().view(torch.int16)
            digest.update(name.replace(_CHECKPOINT_PREFIX, "").encode() + values.numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "settings": json.dumps(settings(config), sort_keys=True),
        "architecture": architecture,
        "vocabulary": str(getattr(config, "vocab_size", None)),
        "padding": json.dumps(padding),
    }


def settings(config: Any) -> dict[str, Any]:
    """Those of a text config on which a teacher's numbers depend beside its weights.

    What is off, or zero, is left out: releases of transformers bring new settings, which are off for what there was.
    """
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    return {name: value for name, value in told.items() if value and _is_setting(name) and _is_plain(value)}


def _is_setting(name: str) -> bool:
    return (
        not name.startswith("_")
        and any(part in name for part in _SETTINGS)
        and not any(part in name for part in _IN_TRAINING)
    )


def _is_plain(value: Any) -> bool:
    """Numbers, text, and lists and mappings of them, which are told alike by any process."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(inner) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
