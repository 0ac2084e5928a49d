"""BLIP (transformers: `models/blip`): a BERT that reads the image by cross-attention alone.

No position is visual. Without an image the cross-attention is skipped, and what is left is the text-only teacher.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from model_adapters import conventional
from model_adapters.base import ModelAdapter


def _text_decoder(model: nn.Module) -> Any:
    return conventional.unwrap(model).text_decoder


def _run_decoder(
    decoder: nn.Module, embeddings: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None
) -> Tensor:
    return decoder(input_ids=input_ids, attention_mask=attention_mask, is_decoder=True, use_cache=False)[0]


BLIP = ModelAdapter(
    serves=("blip",),
    decoder=lambda model: _text_decoder(model).bert,
    embeddings=lambda model: _text_decoder(model).bert.embeddings.word_embeddings,
    head=lambda model: _text_decoder(model).cls,
    position_ids=lambda model, batch: None,
    run_decoder=_run_decoder,
)
