"""Chameleon (transformers: `models/chameleon`): the decoder module holds the image tokenizer too."""

from __future__ import annotations

from typing import Any

from torch import nn

from model_adapters import conventional
from model_adapters.base import ModelAdapter


def _decoder(model: nn.Module) -> Any:
    decoder = conventional.decoder(model)
    vocabulary: Any = decoder.vocabulary_mapping
    for name in dir(type(vocabulary)):  # lazy tables behind a lock, which cannot be captured: fill them now
        getattr(vocabulary, name)
    return decoder


CHAMELEON = ModelAdapter(serves=("chameleon",), decoder=_decoder)
