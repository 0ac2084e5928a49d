"""IDEFICS (transformers: `models/idefics`): the decoder holds the vision tower and wants an image in every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from model_adapters.base import ModelAdapter


def _run_decoder(
    decoder: Any, embeddings: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None
) -> Tensor:
    """Text sees no image: its cross-attention gate is zero wherever `image_attention_mask` is."""
    embeds = embeddings(input_ids)
    return decoder(
        inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False,
        image_attention_mask=attention_mask.new_zeros(*embeds.shape[:2], 1),
        image_encoder_embeddings=embeds.new_zeros(len(embeds), 1, 1, decoder.config.vision_config.embed_dim),
    )[0]  # fmt: skip


IDEFICS = ModelAdapter(serves=("idefics",), run_decoder=_run_decoder)
