"""Gemma 3n and Gemma 4: every layer reads an embedding of the token's id, so the teacher needs ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import conventional
from model_adapters.base import ModelAdapter


def run_gemma3n(
    decoder: Any, embeddings: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None
) -> Tensor:
    """As the multimodal model calls it: ids beyond the table that layers read (those around an image) take its first.

    Some releases' text models read beyond the table where they are given such ids.
    """
    in_table = input_ids < decoder.config.vocab_size_per_layer_input
    states: Tensor = decoder(
        inputs_embeds=embeddings(input_ids),
        per_layer_inputs=decoder.get_per_layer_inputs(torch.where(in_table, input_ids, 0)),
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
    )[0]
    return states


GEMMA_3N = ModelAdapter(serves=("gemma3n",), run_decoder=run_gemma3n)
GEMMA_4 = ModelAdapter(serves=("gemma4",), run_decoder=conventional.run_decoder_on_ids)
