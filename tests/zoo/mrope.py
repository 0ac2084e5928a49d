"""Families with rotary positions in three axes (M-RoPE) and their kin among the newest releases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.common import END, EXTRA, IMAGE, MROPE, START, TEXT, VIDEO, Specimen, images, patches, split_evenly

_FOUR = (IMAGE,) * 4
_FRAMED = (START, *_FOUR, END)
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
             "vision_end_token_id": END}  # fmt: skip
_GLM_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START,
            "image_end_token_id": END, "video_start_token_id": 96, "video_end_token_id": 97}  # fmt: skip
_PARTIAL = MROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.75}
_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
           "out_hidden_size": 32}  # fmt: skip
_QWEN3_VISION = _VISION | {"num_position_embeddings": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DELTA = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
          "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4}  # fmt: skip


def _image_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


def _qwen3_5(config: str, **more: Any) -> Callable[[], Any]:
    text = {**TEXT, **_DELTA, **more, "rope_parameters": _PARTIAL | {"mrope_interleaved": True}}
    return lambda: getattr(tf, config)(text_config=dict(text), vision_config=dict(_QWEN3_VISION), **_QWEN_IDS)


def _glm(config: str, **more: Any) -> Callable[[], Any]:
    text = {**TEXT, **more, "rope_parameters": _PARTIAL}
    vision = _VISION | {"image_size": 16}
    return lambda: getattr(tf, config)(text_config=dict(text), vision_config=dict(vision), **_GLM_IDS)


def _cosmos3_omni() -> Any:
    text = {**TEXT, "rope_parameters": MROPE | {"mrope_interleaved": True}}
    vision = _QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]}
    return tf.Cosmos3OmniConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def _exaone4_5() -> Any:
    text = {**TEXT, "model_type": "exaone4", "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    vision = _VISION | {"num_key_value_heads": 1, "window_size": 16, "fullatt_block_indexes": [1]}
    return tf.Exaone4_5_Config(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)


def _cosmos3_edge() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": 4, "num_patches": 16}  # fmt: skip
    text = {**TEXT, "rope_parameters": MROPE}
    return tf.Cosmos3EdgeConfig(text_config=text, vision_config=vision, projector_hidden_size=48, **_QWEN_IDS)


def _cohere_compass() -> Any:
    rope = MROPE | {"mrope_interleaved": True}
    text = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": rope, "full_attention": None}, "logit_scale": 0.5}  # fmt: skip
    vision = _QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]}
    return tf.CohereCompassConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def _ernie4_5_vl_moe() -> Any:
    text = {**TEXT, "rope_parameters": MROPE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_intermediate_size": [24, 16], "mlp_layer_types": ["dense", "sparse"]}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    return tf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_GLM_IDS)


def _ernie_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts for images also take the markers."""
    visual = torch.isin(batch["input_ids"], torch.tensor([START, IMAGE, END]))
    return _image_types(batch) | {"moe_mm_token_type_ids": visual.int()}


def _hunyuan_vl() -> Any:
    rope = MROPE | {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "mrope_section": [1, 1, 1, 1]}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": 4, "max_image_size": 32, "out_hidden_size": 32}  # fmt: skip
    return tf.HunYuanVLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, im_start_id=START,
        im_end_id=END, im_newline_id=EXTRA, tie_word_embeddings=False,
    )  # fmt: skip


def _hunyuan_split(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """One axis of the positions numbers the images of the whole batch."""
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(_hunyuan_vl()).model
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions = model.get_rope_index(**{name: batch[name] for name in wanted})[0]
    return [p | {"position_ids": positions[:, row, None]} for row, p in enumerate(split_evenly(batch, rows))]


def _paddleocr_vl() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    text = {**TEXT, "rope_parameters": MROPE}
    return tf.PaddleOCRVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_QWEN_IDS)


def _paddle_patches(rows: int) -> dict[str, Tensor]:
    flat = patches(3 * 16)(rows)
    return flat | {"pixel_values": flat["pixel_values"].reshape(-1, 3, 4, 4)}


_OMNI_IDS = _QWEN_IDS | {"audio_token_id": EXTRA, "audio_start_token_id": 96, "audio_end_token_id": 97}
_OMNI_AUDIO = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
               "d_model": 16, "max_source_positions": 16, "n_window": 2, "output_dim": 32}  # fmt: skip


def _qwen2_5_omni_thinker() -> Any:
    text = {**TEXT, "rope_parameters": MROPE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    vision = _VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
    return tf.Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=dict(_OMNI_AUDIO), **_OMNI_IDS
    )  # fmt: skip


def _qwen3_omni_moe_thinker() -> Any:
    text = {**TEXT, **_MOE, "rope_parameters": MROPE | {"mrope_interleaved": True}}
    vision = _QWEN3_VISION | {"deepstack_visual_indexes": [0, 1]}
    audio = _OMNI_AUDIO | {"downsample_hidden_size": 8}
    return tf.Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=vision, audio_config=audio, **_OMNI_IDS)


_MINICPM_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "image_size": 32, "patch_size": 4}  # fmt: skip


def _minicpm(config: str, **more: Any) -> Callable[[], Any]:
    """`insert_layer_id`: the vision layer after which windows of 2 x 2 patches become one."""
    text = {**TEXT, **_DELTA, "model_type": "qwen3_5_text"}
    text["rope_parameters"] = _PARTIAL | {"mrope_interleaved": True}
    return lambda: getattr(tf, config)(
        text_config=dict(text), vision_config=dict(_MINICPM_VISION), insert_layer_id=0, image_token_id=IMAGE,
        video_token_id=VIDEO, tie_word_embeddings=False, **more,
    )  # fmt: skip


def _minicpm_patches(side: int) -> Callable[[int], dict[str, Tensor]]:
    """The patches of all images side by side in one long picture."""

    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        picture = torch.randn(1, 3, 4, 4 * side * side * rows, generator=random)
        return {"pixel_values": picture, "target_sizes": torch.tensor([[side, side]] * rows)}

    return pixels


def _minicpm_split(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    pictures = batch["pixel_values"].chunk(rows, dim=-1)
    others = {name: value for name, value in batch.items() if name != "pixel_values"}
    return [p | {"pixel_values": pictures[row]} for row, p in enumerate(split_evenly(others, rows))]


_GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
            "attention_multiplier": 0.25}  # fmt: skip


def _granite4_vision() -> Any:
    """Four patches become one token; text layers 0, 1 and 2 get features of their own. The Q-Former wants 64 a head."""
    vision = tf.SiglipVisionConfig(hidden_size=64, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                   image_size=16, patch_size=4)  # fmt: skip
    qformer = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 24,
               "cross_attention_frequency": 1, "use_qformer_text_input": False, "hidden_dropout_prob": 0.0,
               "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return tf.Granite4VisionConfig(
        text_config={**TEXT, **_GRANITE, "num_hidden_layers": 3}, vision_config=vision, qformer_config=qformer,
        image_token_index=IMAGE, vision_feature_select_strategy="full", image_grid_pinpoints=[[16, 16]],
        downsample_rate="1/2", deepstack_layer_map=[(1, 0)], spatial_target_layers=[1, 2], projector_dropout=0.0,
    )  # fmt: skip


def _granite4_tiles(rows: int) -> dict[str, Tensor]:
    """The whole image and one tile: 4 tokens, and 2 x 2 with a newline after each row."""
    pixels = torch.randn(rows, 2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]] * rows)}


def _granite_docling() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 2, "scale_factor": 4, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    return tf.GraniteDoclingConfig(
        text_config={**TEXT, **_GRANITE}, vision_config=vision, image_token_id=IMAGE, pad_token_id=0,
        density_router_hidden_size=8, tie_word_embeddings=False,
    )  # fmt: skip


def _docling_tiles(rows: int) -> dict[str, Tensor]:
    tiles = images(3, 16, extra_axis=True)(rows)
    return tiles | {"pixel_attention_mask": torch.ones(rows, 1, dtype=torch.bool), "router_labels": torch.ones(rows)}


def _qwen4_exp() -> Any:
    """Layers 0 and 2 add embeddings of n-grams; attention goes to the 4 best pairs of keys."""
    text = {**TEXT, **_DELTA, **_MOE, "shared_expert_intermediate_size": 24, "hc_count": 2, "hc_lowrank": 8,
            "ple_layer_ids": [1, 3], "ple_embed_dim": 16, "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
            "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1, "indexer_n_heads": 16,
            "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
            "rope_parameters": _PARTIAL | {"mrope_interleaved": True}}  # fmt: skip
    return tf.Qwen4ExpConfig(text_config=text, vision_config=dict(_QWEN3_VISION), **_QWEN_IDS)


def _glm5_next() -> Any:
    text = {
        **TEXT, "num_hidden_layers": 4, "num_key_value_heads": 4, "hc_mult": 2, "kv_lora_rank": 16, "q_lora_rank": 16,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "index_topk": 8,
        "index_kpool": 2, "index_head_dim": 8, "index_n_heads": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "n_group": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
        "indexer_types": ["full", "full", "shared", "full"],
    }  # fmt: skip
    vision = _VISION | {"image_size": 16, "projection_intermediate_size": 24}
    return tf.Glm5NextConfig(text_config=text, vision_config=vision, **_GLM_IDS)


_PATCHES = patches(3 * 2 * 16)
_FLAT = patches(3 * 16)  # no time axis
_MINICPM_MARKERS = {"image_start_id": START, "image_end_id": END, "slice_start_id": 96, "slice_end_id": 97,
                    "newline_id": 98}  # fmt: skip
_QWEN3_5_MOE = {**_MOE, "shared_expert_intermediate_size": 24}
_GLM_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
            "n_group": 2}  # fmt: skip

MEMBERS: dict[str, Specimen] = {
    "qwen3_5": Specimen(_qwen3_5("Qwen3_5Config"), _FRAMED, _PATCHES, _image_types),
    "qwen3_5_moe": Specimen(_qwen3_5("Qwen3_5MoeConfig", **_QWEN3_5_MOE), _FRAMED, _PATCHES, _image_types),
    "qwen4_exp": Specimen(_qwen4_exp, _FRAMED, _PATCHES, _image_types),
    "glm4v": Specimen(_glm("Glm4vConfig"), _FRAMED, _PATCHES, _image_types),
    "glm46v": Specimen(_glm("Glm46VConfig"), _FRAMED, _PATCHES, _image_types),
    "glmga": Specimen(_glm("GlmgaConfig"), _FRAMED, _PATCHES, _image_types),
    "glm_ocr": Specimen(_glm("GlmOcrConfig"), _FRAMED, _PATCHES, _image_types),
    "glm4v_moe": Specimen(_glm("Glm4vMoeConfig", **_GLM_MOE), _FRAMED, _PATCHES, _image_types),
    "glm5_next": Specimen(_glm5_next, _FRAMED, _PATCHES),
    "cosmos3_omni": Specimen(_cosmos3_omni, _FRAMED, _PATCHES, _image_types),
    "cosmos3_edge": Specimen(_cosmos3_edge, _FRAMED, _FLAT, _image_types),
    "cohere_compass": Specimen(_cohere_compass, _FRAMED, _PATCHES, _image_types),
    "exaone4_5": Specimen(_exaone4_5, _FRAMED, _PATCHES),
    "ernie4_5_vl_moe": Specimen(_ernie4_5_vl_moe, _FRAMED, _FLAT, _ernie_types),
    "hunyuan_vl": Specimen(_hunyuan_vl, (START, *_FOUR, *_FOUR, END), _FLAT, _image_types, _hunyuan_split),
    "paddleocr_vl": Specimen(_paddleocr_vl, _FRAMED, _paddle_patches, _image_types),
    "qwen2_5_omni_thinker": Specimen(_qwen2_5_omni_thinker, _FRAMED, _PATCHES),
    "qwen3_omni_moe_thinker": Specimen(_qwen3_omni_moe_thinker, _FRAMED, _PATCHES),
    "minicpmv4_6": Specimen(_minicpm("MiniCPMV4_6Config"), _FRAMED, _minicpm_patches(8), split=_minicpm_split),
    "minicpmv4_7": Specimen(
        _minicpm("MiniCPMV4_7Config", **_MINICPM_MARKERS), _FRAMED, _minicpm_patches(8), _image_types, _minicpm_split
    ),
    "minicpm_ocr": Specimen(_minicpm("MiniCPMOcrConfig"), _FRAMED, _minicpm_patches(4), split=_minicpm_split),
    "granite4_vision": Specimen(_granite4_vision, (IMAGE,) * 10, _granite4_tiles),
    "granite_docling": Specimen(_granite_docling, _FOUR, _docling_tiles),
}
