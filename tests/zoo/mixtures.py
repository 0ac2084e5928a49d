"""Families whose decoder mixes kinds of layers: convolution, recurrence, experts, shared keys, sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

from tests.zoo.common import CLIP, END, EXTRA, IMAGE, START, TEXT, VIDEO, Specimen, images, split_evenly

_FOUR = (IMAGE,) * 4
_FRAMED = (START, *_FOUR, END)


def _without(name: str) -> dict[str, Any]:
    return {other: value for other, value in TEXT.items() if other != name}


def _image_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


def _blocks(*shape: int, **grid: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    """The blocks of all images in one list; `shape` is that of one image's."""

    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        values = torch.randn(rows * shape[0], *shape[1:], generator=random)
        return {"pixel_values": values} | {name: torch.tensor([size] * rows) for name, size in grid.items()}

    return pixels


class _Gemma3nVisionConfig(Gemma3nVisionConfig):
    model_type = "zoo_gemma3n_vision"


class _Gemma3nVision(tf.PreTrainedModel):
    """Stands in for the MobileNet, which only timm has."""

    config_class = _Gemma3nVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 8, 8)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


tf.AutoModel.register(_Gemma3nVisionConfig, _Gemma3nVision)


def _gemma3n() -> Any:
    text = {
        **TEXT, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
        "vocab_size_per_layer_input": END, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 4,
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    }  # fmt: skip
    audio = {"hidden_size": 16, "vocab_size": 4, "vocab_offset": EXTRA + 1, "conf_num_attention_heads": 2,
             "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [4, 4], "input_feat_size": 16}  # fmt: skip
    return tf.Gemma3nConfig(
        text_config=text, audio_config=audio, vision_soft_tokens_per_image=4, boi_token_id=START, eoi_token_id=END,
        vision_config=_Gemma3nVisionConfig(hidden_size=16, vocab_size=4, vocab_offset=END),
        image_token_id=IMAGE, audio_token_id=EXTRA, boa_token_id=97, eoa_token_id=98, tie_word_embeddings=False,
    )  # fmt: skip


def _siglip2_patches(rows: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.randn(rows, 16, 3 * 16, generator=random),
            "spatial_shapes": torch.tensor([[4, 4]] * rows),
            "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long)}  # fmt: skip


def _lfm2_vl() -> Any:
    text = tf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    vision = tf.Siglip2VisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                    patch_size=4, num_patches=16, vision_use_head=False)  # fmt: skip
    return tf.Lfm2VlConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, projector_hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip


def _nemotron_h_omni() -> Any:
    text = _without("num_hidden_layers") | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "ssm_state_size": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "expand": 1, "chunk_size": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    }  # fmt: skip
    vision = tf.RadioConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2.0, patch_size=4,
                            image_size=16, max_img_size=16, video_temporal_patch_size=2)  # fmt: skip
    return tf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=tf.NemotronHConfig(**text), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=EXTRA, projector_hidden_size=32, vision_hidden_size=16,
    )  # fmt: skip


def _aria() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    text = {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return tf.AriaConfig(
        text_config=text,
        vision_config=vision,
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
        initializer_range=0.1,
    )


_SAM = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 24,
        "downsample_channels": [16, 16], "initializer_range": 0.1}  # fmt: skip
_DEEPSEEK_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}


def _deepseek_ocr2() -> Any:
    encoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1}  # fmt: skip
    return tf.DeepseekOcr2Config(
        text_config={**TEXT, **_DEEPSEEK_MOE, "mlp_layer_types": ["dense", "sparse"]},
        vision_config={"sam_config": _SAM, "encoder_config": encoder}, image_token_id=IMAGE,
    )  # fmt: skip


_GEMMA4 = {**TEXT, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
           "sliding_window": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
           "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "use_bidirectional_attention": "vision",
           "final_logit_softcapping": 30.0}  # fmt: skip
_GEMMA4_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": EXTRA, "boi_token_id": START,
               "eoi_token_id": END, "tie_word_embeddings": False}  # fmt: skip


def _gemma4() -> Any:
    text = {**_GEMMA4, "vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8, "enable_moe_block": True,
            "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
              "position_embedding_size": 8}  # fmt: skip
    return tf.Gemma4Config(text_config=text, vision_config=vision, **_GEMMA4_IDS)


def _gemma4_unified() -> Any:
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 8,
              "output_proj_dims": 16}  # fmt: skip
    return tf.Gemma4UnifiedConfig(text_config=_GEMMA4, vision_config=vision, **_GEMMA4_IDS)


def _placed(side: int, dim: int) -> Callable[[int], dict[str, Tensor]]:
    """Gemma 4: the patches of an image in a row of the batch, each with its place."""

    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
        return {"pixel_values": torch.rand(rows, side * side, dim, generator=random),
                "image_position_ids": places.repeat(rows, 1, 1)}  # fmt: skip

    return pixels


_INKLING = {
    **TEXT, "num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 12,
    "log_scaling_n_floor": 4, "unpadded_vocab_size": 98, "moe_intermediate_size": 24, "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def _inkling2() -> Any:
    text = _INKLING.copy()
    del text["intermediate_size"]
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": 4, "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32}  # fmt: skip
    return tf.Inkling2Config(
        text_config={**text, "n_layers_per_attn_res_block": 2}, vision_config=vision, image_token_id=IMAGE
    )


def _inkling() -> Any:
    text = {**_INKLING, "mlp_layer_types": ["dense", *["sparse"] * 3], "logits_mup_width_multiplier": 2.0}
    return tf.InklingConfig(
        text_config=text, vision_config={"patch_size": 5, "num_hidden_layers": 3}, image_token_id=IMAGE,
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8}, audio_token_id=EXTRA,
        image_bos_token_id=START, audio_bos_token_id=END,
    )  # fmt: skip


_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "num_key_value_heads": 4}  # fmt: skip
_MLA_TEXT = _without("head_dim") | _DEEPSEEK_MOE | _MLA


def _kimi_k25() -> Any:
    text = _MLA_TEXT | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    vision = {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "num_attention_heads": 2, "hidden_size": 16,
              "num_hidden_layers": 2, "intermediate_size": 24}  # fmt: skip
    return tf.Kimi_K25Config(
        text_config=tf.DeepseekV3Config(**text), vision_config=vision, projection_hidden_size=16, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip


def _lfm3_vl() -> Any:
    text = {**TEXT, "num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"],
            "sliding_window": 8, "conv_L_cache": 4}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "patch_size": 4, "layer_types": ["conv", "full_attention"]}  # fmt: skip
    return tf.Lfm3VlConfig(
        text_config=tf.Lfm3Config(**text), vision_config=vision, projector_hidden_size=32, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip


def _llama4() -> Any:
    text = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_layers": [1],
            "no_rope_layers": [1, 0], "attention_chunk_size": 8, "floor_scale": 4}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16,
              "projector_output_dim": 16}  # fmt: skip
    return tf.Llama4Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )


def _minimax_m3_vl() -> Any:
    text = {
        **TEXT, "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"],
        "num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 48, "shared_intermediate_size": 24,
        "rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    return tf.MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, projector_hidden_size=32, image_token_index=IMAGE,
        video_token_index=VIDEO,
    )  # fmt: skip


_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 16}


def _mistral4() -> Any:
    rope = {**_YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1, "mscale_all_dim": 1.0,
            "mscale": 1.0}  # fmt: skip
    return tf.Mistral4Config(**_MLA_TEXT, first_k_dense_replace=1, rope_parameters=rope)


def _mistral_large4() -> Any:
    text = _MLA_TEXT | {
        "num_hidden_layers": 4, "rope_parameters": _YARN, "index_topk": 6,
        "index_head_dim": 8, "index_n_heads": 8, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "no_rope_layers": [1, 1, 1, 0], "kv_source_layers": [0, 0, 0, 3],
        "indexer_types": ["full", "shared", "full", "full"],
    }  # fmt: skip
    del text["q_lora_rank"]
    vision = tf.PixtralVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                    image_size=16, patch_size=4)  # fmt: skip
    return tf.MistralLarge4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)


def _mistral_images(rows: int) -> dict[str, Tensor]:
    return images(3, 16)(rows) | {"image_sizes": torch.tensor([[16, 16]] * rows)}


def _molmo2() -> Any:
    text = {**TEXT, "vocab_size": START, "additional_vocab_size": 9, "rope_scaling_layers": [1],
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 8, "image_size": [16, 16], "patch_size": 4,
              "initializer_range": 0.1}  # fmt: skip
    adapter = {"vision_feature_layer": [1, 0], "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
               "head_dim": 8, "intermediate_size": 24, "text_hidden_size": 32, "initializer_range": 0.1}  # fmt: skip
    return tf.Molmo2Config(
        text_config=text, vision_config=vision, adapter_config=adapter, image_start_token_id=START,
        low_res_image_start_token_id=EXTRA, image_end_token_id=END, image_patch_id=IMAGE, frame_start_token_id=96,
        frame_end_token_id=97,
    )  # fmt: skip


def _molmo2_crops(rows: int) -> dict[str, Tensor]:
    """Two crops an image, the whole one first; a token pools 2 x 2 patches."""
    patches = torch.arange(rows * 2 * 16).reshape(-1, 2, 2, 2, 2).transpose(2, 3)
    return _blocks(2, 16, 3 * 16, image_grids=(2, 2, 2, 2))(rows) | {
        "image_token_pooling": patches.reshape(-1, 4), "image_num_crops": torch.full((rows,), 2),
    }  # fmt: skip


def _molmo2_split(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Pooling names patches by their number in the whole batch."""
    pieces = split_evenly(batch, rows)
    return [p | {"image_token_pooling": p["image_token_pooling"] - 32 * row} for row, p in enumerate(pieces)]


_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_MUSE_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "patch_size": 4, "pos_emb_height": 2, "pos_emb_width": 2, "max_position_embeddings": 4,
                "layer_types": ["window_attention", "full_attention"]}  # fmt: skip
_MUSE = {"vision_config": _MUSE_VISION, "image_token_id": IMAGE, "video_token_id": VIDEO, "out_hidden_size": 64,
         "projector_hidden_size": 32}  # fmt: skip


def _muse_glimmer() -> Any:
    return tf.MuseGlimmerConfig(text_config={**TEXT, **_WINDOWS}, **_MUSE)


def _muse_spark() -> Any:
    text = {**TEXT, **_WINDOWS, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_hidden_size": 16}  # fmt: skip
    audio = {"patch_sizes": [2, 2], "hidden_sizes": [8, 8], "depths": [1, 1], "num_hidden_layers": 2,
             "conv_kernel_size": 3, "out_hidden_size": 32}  # fmt: skip
    return tf.MuseSparkConfig(text_config=text, audio_config=audio, audio_token_id=EXTRA, **_MUSE)


def _step3p7() -> Any:
    text = {**TEXT, **_WINDOWS, "num_sliding_attention_heads": 6, "mlp_layer_types": ["dense", "sparse"],
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "share_expert_dim": 24,
            "swiglu_limits": [0.0, 0.05], "swiglu_limits_shared": [0.0, 0.05], "rope_theta": [10000.0, 100000.0],
            "partial_rotary_factors": [1.0, 0.5]}  # fmt: skip
    vision = {"hidden_size": 16, "mlp_ratio": 1.5, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 4}  # fmt: skip
    return tf.Step3p7Config(text_config=text, vision_config=vision, image_token_id=IMAGE)


def _unlimited_ocr() -> Any:
    text = {**TEXT, **_DEEPSEEK_MOE, "mlp_layer_types": ["dense", "sparse"], "sliding_window": 8,
            "layer_types": ["reference_sliding_attention", "full_attention"]}  # fmt: skip
    return tf.UnlimitedOcrConfig(
        text_config=text, vision_config={"sam_config": _SAM, "encoder_config": CLIP}, image_token_id=IMAGE
    )


def _dots3_note() -> Any:
    text = {
        **TEXT, **_DEEPSEEK_MOE, **_MLA, "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["sliding_attention", "indexed_attention"], "sliding_window": 8, "index_topk": 6,
        "index_head_dim": 8, "index_n_heads": 8, "shared_experts_intermediate_size": 24, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": 4, "moe_intermediate_size": 24, "mlp_layer_types": ["dense", "sparse"],
              "num_local_experts": 4, "num_experts_per_tok": 2, "adapter_in_dim": 16,
              "adapter_out_dim": 32}  # fmt: skip
    audio = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "feature_size": 8, "downsample_hidden_size": 4, "adapter_input_size": 16,
             "adapter_out_dim": 32}  # fmt: skip
    return tf.Dots3NoteConfig(
        text_config=text, vision_config=vision, audio_config=audio, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=EXTRA,
    )  # fmt: skip


def _whole_ids(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row without image ids comes out as floats."""
    return {name: value.long() for name, value in batch.items()}


MEMBERS: dict[str, Specimen] = {
    "gemma3n": Specimen(_gemma3n, _FRAMED, images(3, 16)),
    "lfm2_vl": Specimen(_lfm2_vl, _FRAMED, _siglip2_patches),
    "nemotron_h_omni": Specimen(_nemotron_h_omni, _FRAMED, _blocks(16, 3 * 16, image_grid_hw=(4, 4))),
    "aria": Specimen(_aria, _FOUR, images(3, 16)),
    # 144 queries and a separator stand for an image of any size
    "deepseek_ocr2": Specimen(_deepseek_ocr2, (IMAGE,) * 145, images(3, 32)),
    "gemma4": Specimen(_gemma4, _FRAMED, _placed(4, 3 * 16), _image_types),
    "gemma4_unified": Specimen(_gemma4_unified, _FRAMED, _placed(2, 3 * 64), _image_types),
    # its router is float32
    "inkling2": Specimen(_inkling2, _FOUR, _blocks(4, 8, 8, 3, image_grid_thw=(1, 2, 2)), dtype=torch.float32),
    "inkling_mm_model": Specimen(_inkling, (START, *_FOUR), _blocks(4, 2, 5, 5, 3)),
    "kimi_k25": Specimen(_kimi_k25, _FRAMED, _blocks(16, 3, 4, 4, image_grid_thw=(1, 4, 4))),
    "lfm3_vl": Specimen(_lfm3_vl, _FRAMED, _blocks(16, 3 * 2 * 16, image_grid_thw=(1, 4, 4))),
    "llama4": Specimen(_llama4, _FRAMED, images(3, 16)),
    "minimax_m3_vl": Specimen(_minimax_m3_vl, _FRAMED, _blocks(16, 3 * 2 * 16, image_grid_thw=(1, 4, 4))),
    "mistral4": Specimen(_mistral4, extra=_whole_ids),  # text alone: the class has no vision tower
    "mistral_large4": Specimen(_mistral_large4, _FOUR, _mistral_images),
    "molmo2": Specimen(_molmo2, (EXTRA, *_FOUR, END, *_FRAMED), _molmo2_crops, _image_types, _molmo2_split),
    "muse_glimmer": Specimen(_muse_glimmer, _FRAMED, _blocks(16, 2 * 3 * 16, image_grid_thw=(1, 4, 4))),
    "muse_spark": Specimen(_muse_spark, _FRAMED, _blocks(16, 2 * 3 * 16, image_grid_thw=(1, 4, 4))),
    "step3p7": Specimen(_step3p7, _FRAMED, images(3, 32)),
    # a row of the image's 2 x 2 tokens ends with a newline token, the image with a separator
    "unlimited_ocr": Specimen(_unlimited_ocr, (IMAGE,) * 7, images(3, 32)),
    "dots3_note": Specimen(_dots3_note, _FRAMED, _blocks(16, 3 * 16, image_grid_thw=(1, 4, 4))),
}
