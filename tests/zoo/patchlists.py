"""Families that list the patches of all images of a batch, as Qwen-VL does; most have positions of several axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.common import END, EXTRA, IMAGE, MROPE, START, TEXT, VIDEO, Specimen, images, patches, split_evenly

_FRAMED = (START, *(IMAGE,) * 4, END)
_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2,
           "patch_size": 4, "image_size": 16, "spatial_merge_size": 2, "initializer_range": 0.1}  # fmt: skip
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_QWEN = {"vision_start_token_id": START, "vision_end_token_id": END}
_GLM = {"image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": 96, "video_end_token_id": 97}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
           "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip


def _types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


def _config(
    model_type: str, markers: dict[str, Any], text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> Callable[[], Any]:
    def make() -> Any:
        return tf.AutoConfig.for_model(
            model_type,
            text_config={**TEXT, "rope_parameters": MROPE, "initializer_range": 0.1} | (text or {}),
            vision_config=_VISION | (vision or {}),
            **_IDS | markers,
        )

    return make


def _omni(model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Callable[[], Any]:
    """A thinker hears too: a small audio tower, left without audio."""
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "output_dim": 32,
             "num_mel_bins": 8, "downsample_hidden_size": 8}  # fmt: skip
    named = "image_token_index" if model_type.startswith("qwen2") else "image_token_id"
    video = named.replace("image", "video")
    ids = {named: IMAGE, video: VIDEO, named.replace("image", "audio"): EXTRA, "audio_start_token_id": 96}
    return _config(model_type, {"audio_config": audio, "user_token_id": 97, **_QWEN, **ids}, text, vision)


def _paddle(rows: int) -> dict[str, Tensor]:
    pixels = patches(3 * 16)(rows)
    return pixels | {"pixel_values": pixels["pixel_values"].reshape(-1, 3, 4, 4)}


def _tiles(rows: int) -> dict[str, Tensor]:
    return images(3, 16, extra_axis=True)(rows) | {"pixel_attention_mask": torch.ones(rows, 1, dtype=torch.bool)}


_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_TWO_ROPES = {"rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE}}
_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2}


def _minicpm(model_type: str, downsample: str) -> Callable[[], Any]:
    """Qwen3.5 behind a tower with a merger inside; only its image ids may be named."""
    return _config(
        model_type, {"insert_layer_id": 0, "image_size": 32, "patch_size": 4, "downsample_mode": downsample},
        {"model_type": "qwen3_5_text"} | _LINEAR | _HALF,
        _TOWER | {"patch_size": 4, "image_size": 32, "insert_layer_id": 0},
    )  # fmt: skip


def _strip(grid: int) -> Callable[[int], dict[str, Tensor]]:
    """All patches side by side in one picture, `grid` x `grid` of them an image."""

    def pixels(rows: int) -> dict[str, Tensor]:
        strip = torch.randn(1, 3, 4, 4 * grid * grid * rows, generator=torch.Generator().manual_seed(5))
        return {"pixel_values": strip, "target_sizes": torch.tensor([[grid, grid]] * rows)}

    return pixels


def _split_strip(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    strips = batch["pixel_values"].chunk(rows, dim=3)
    rest = split_evenly({k: v for k, v in batch.items() if k != "pixel_values"}, rows)
    return [piece | {"pixel_values": strip} for piece, strip in zip(rest, strips, strict=True)]


_GLM_MOE = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1}  # fmt: skip
_HALF = {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
_PATCH = patches(3 * 2 * 16)

MEMBERS: dict[str, Specimen] = {
    "glm4v": Specimen(_config("glm4v", _GLM), _FRAMED, _PATCH, _types),
    "glm46v": Specimen(_config("glm46v", _GLM), _FRAMED, _PATCH, _types),
    "glmga": Specimen(_config("glmga", _GLM), _FRAMED, _PATCH, _types),
    "glm_ocr": Specimen(_config("glm_ocr", _GLM), _FRAMED, _PATCH, _types),
    "glm4v_moe": Specimen(_config("glm4v_moe", _GLM, _GLM_MOE | _HALF), _FRAMED, _PATCH, _types),
    "qwen3_5": Specimen(
        _config("qwen3_5", _QWEN, _LINEAR | _HALF, {"num_position_embeddings": 16}), _FRAMED, _PATCH, _types
    ),
    "qwen3_5_moe": Specimen(
        _config(
            "qwen3_5_moe", _QWEN,
            _LINEAR | _HALF | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
            {"num_position_embeddings": 16},
        ),
        _FRAMED, _PATCH, _types,
    ),
    "exaone4_5": Specimen(
        _config(
            "exaone4_5", {},
            {"model_type": "exaone4", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
             "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            {"num_key_value_heads": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        ),
        _FRAMED, _PATCH,
    ),
    "cohere_compass": Specimen(
        _config(
            "cohere_compass", _QWEN, _WINDOWS | _TWO_ROPES | {"logit_scale": 0.25},
            {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        ),
        _FRAMED, _PATCH, _types,
    ),
    "cosmos3_omni": Specimen(
        _config(
            "cosmos3_omni", _QWEN, {"model_type": "qwen3_vl_text"},
            {"model_type": "qwen3_vl_vision", "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        ),
        _FRAMED, _PATCH, _types,
    ),
    "cosmos3_edge": Specimen(
        _config("cosmos3_edge", _QWEN | {"projector_hidden_size": 24}, None, _TOWER | {"num_patches": 16}),
        _FRAMED, patches(3 * 16), _types,
    ),
    "paddleocr_vl": Specimen(_config("paddleocr_vl", _QWEN, None, _TOWER), _FRAMED, _paddle, _types),
    "hunyuan_vl": Specimen(
        _config(
            "hunyuan_vl", {"im_start_id": START, "im_end_id": END, "im_newline_id": EXTRA},
            {"rope_parameters": MROPE | {"mrope_section": [1, 1, 1, 1]}},
            _TOWER | {"max_image_size": 16, "min_image_size": 8, "temporal_patch_size": 1, "text_hidden_size": 32},
        ),
        (START, *(IMAGE,) * 8, END), patches(3 * 16), _types,
    ),
    "ernie4_5_vl_moe": Specimen(
        _config(
            "ernie4_5_vl_moe", _GLM,
            {"moe_intermediate_size": [24, 16], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1,
             "mlp_layer_types": ["dense", "sparse"]},
        ),
        _FRAMED, patches(3 * 16), _types,
    ),
    "qwen2_5_omni_thinker": Specimen(
        _omni("qwen2_5_omni_thinker", {"use_sliding_window": False}, {"window_size": 16, "fullatt_block_indexes": [1]}),
        _FRAMED, _PATCH,
    ),
    "qwen3_omni_moe_thinker": Specimen(
        _omni(
            "qwen3_omni_moe_thinker", _EXPERTS | {"num_experts": 4, "rope_parameters": MROPE},
            {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        ),
        _FRAMED, _PATCH,
    ),
    "minicpmv4_6": Specimen(_minicpm("minicpmv4_6", "16x"), _FRAMED, _strip(8), split=_split_strip),
    "minicpmv4_7": Specimen(_minicpm("minicpmv4_7", "16x"), _FRAMED, _strip(8), _types, _split_strip),
    "minicpm_ocr": Specimen(_minicpm("minicpm_ocr", "4x"), _FRAMED, _strip(4), split=_split_strip),
    "granite_docling": Specimen(
        _config(
            "granite_docling", {"pad_token_id": 0, "density_router_hidden_size": 8},
            {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
             "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            _TOWER | {"scale_factor": 2, "deepstack_visual_indexes": [0]},
        ),
        (IMAGE,) * 4, _tiles,
    ),
}  # fmt: skip
