"""The ten families that every numerical test of the default run goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.common import CLIP, END, IMAGE, MROPE, PAD, START, TEXT, VIDEO, Specimen, images, patches


def _mistral3_images(rows: int) -> dict[str, Tensor]:
    return images(3, 16)(rows) | {"image_sizes": torch.tensor([[16, 16]] * rows)}


def _llava() -> Any:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def _qwen2_vl() -> Any:
    return tf.Qwen2VLConfig(
        text_config=tf.Qwen2VLConfig().text_config.__class__(**TEXT, rope_parameters=MROPE).to_dict(),
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def _qwen2_5_vl() -> Any:
    return tf.Qwen2_5_VLConfig(
        text_config=tf.Qwen2_5_VLConfig().text_config.__class__(**TEXT, rope_parameters=MROPE).to_dict(),
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2,
                       "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


_QWEN3_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2,
                 "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
_QWEN3 = {"vision_config": _QWEN3_VISION, "image_token_id": IMAGE, "video_token_id": VIDEO,
          "vision_start_token_id": START, "vision_end_token_id": END}  # fmt: skip


def _qwen3_vl() -> Any:
    return tf.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": MROPE | {"mrope_interleaved": True}}, **_QWEN3)


def _qwen3_vl_moe() -> Any:
    text = {
        **TEXT,
        "rope_parameters": MROPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }
    return tf.Qwen3VLMoeConfig(text_config=text, **_QWEN3)


def _internvl() -> Any:
    return tf.InternVLConfig(
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5,
    )  # fmt: skip


def _gemma3() -> Any:
    text = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8}  # fmt: skip
    return tf.Gemma3Config(
        text_config=text, vision_config=tf.SiglipVisionConfig(**CLIP), mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip


def _idefics3(config: type[Any]) -> Callable[[], Any]:
    def make() -> Any:
        return config(
            text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD,
            vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        )  # fmt: skip

    return make


def _mistral3() -> Any:
    return tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                             num_attention_heads=2, image_size=16, patch_size=4),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None), image_token_index=IMAGE, spatial_merge_size=2,
    )  # fmt: skip


def _token_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _image_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


_FOUR = (IMAGE,) * 4
_FRAMED = (START, *_FOUR, END)

MEMBERS: dict[str, Specimen] = {
    "llava": Specimen(_llava, _FOUR, images(3, 16)),
    "qwen2_vl": Specimen(_qwen2_vl, _FRAMED, patches(3 * 2 * 16), _image_types),
    "qwen2_5_vl": Specimen(_qwen2_5_vl, _FRAMED, patches(3 * 2 * 16), _image_types),
    "qwen3_vl": Specimen(_qwen3_vl, _FRAMED, patches(3 * 2 * 16), _image_types),
    "qwen3_vl_moe": Specimen(_qwen3_vl_moe, _FRAMED, patches(3 * 2 * 16), _image_types),
    "internvl": Specimen(_internvl, _FOUR, images(3, 16)),
    "gemma3": Specimen(
        _gemma3, _FRAMED, images(3, 16), lambda batch: {"token_type_ids": (batch["input_ids"] == IMAGE).long()}
    ),
    "smolvlm": Specimen(_idefics3(tf.SmolVLMConfig), _FOUR, images(3, 16, extra_axis=True)),
    "idefics3": Specimen(_idefics3(tf.Idefics3Config), _FOUR, images(3, 16, extra_axis=True)),
    "mistral3": Specimen(_mistral3, _FOUR, _mistral3_images),
}
