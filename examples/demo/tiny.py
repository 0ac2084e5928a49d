"""A small real MLLM and its processor from transformers classes: LLaVA with CLIP and Llama."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH = 32, 8
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "user", "assistant", ":")
_CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def build_processor(texts: Iterable[str]) -> Any:
    """A processor whose vocabulary is the words of `texts`."""
    words = sorted({word for text in texts for word in text.split()} - set(_SPECIAL))
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_CHAT, image_token="<image>",
    )  # fmt: skip


def build_model(processor: Any, *, width: int = 128, layers: int = 4, seed: int = 0) -> LlavaForConditionalGeneration:
    """About two million parameters, random. The vision encoder has four layers, or as few as the language model."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    text = LlamaConfig(
        **shape, num_hidden_layers=layers, num_key_value_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    seen = {"image_size": IMAGE_SIZE, "patch_size": PATCH, "num_channels": 3}
    vision = CLIPVisionConfig(**shape, **seen, num_hidden_layers=min(layers, 4))
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def encoder_of(model: Any) -> nn.Module:
    encoder: nn.Module = model.model.vision_tower
    return encoder


def see(encoder: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What the encoder makes of each image, [B, D]: its patches, averaged; LLaVA leaves the class token out."""
    states: Tensor = encoder(batch["pixel_values"]).last_hidden_state
    return states[:, 1:].mean(1)
