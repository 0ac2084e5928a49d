"""Families of the common make: a vision tower, a projector, and a language model that sees a sequence of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.zoo.common import CLIP, END, EXTRA, IMAGE, START, TEXT, VIDEO, Specimen, images, patches

# wider weights than common's: what an image shows is to matter, which a projector of small weights would hide
_TEXT = {**TEXT, "initializer_range": 0.1}
_COARSE = {**CLIP, "initializer_range": 0.1}
_FINE = {**_COARSE, "patch_size": 4}  # 4 x 4 patches, for those that merge 2 x 2 of them
_SAM = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 4, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 24,
        "initializer_range": 0.1}  # fmt: skip
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def _sized_images(*crops: int) -> Callable[[int], dict[str, Tensor]]:
    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        values = torch.randn(rows, *crops, 3, 16, 16, generator=random)
        return {"pixel_values": values, "image_sizes": torch.tensor([[16, 16]] * rows)}

    return pixels


def _with_video(pixels: Callable[[int], dict[str, Tensor]], frames: int) -> Callable[[int], dict[str, Tensor]]:
    def both(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(6)
        return pixels(rows) | {"pixel_values_videos": torch.randn(rows, frames, 3, 16, 16, generator=random)}

    return both


class _PatchesConfig(tf.PreTrainedConfig):
    model_type = "zoo_patches"
    hidden_size: int = 16
    initializer_range: float = 0.1
    as_sequence: bool = False

    @property
    def model_args(self) -> dict[str, int]:
        return {"embed_dim": self.hidden_size}


class _Patches(tf.PreTrainedModel):
    """Stands in for the towers that only timm has: FastViT gives a map, the Perception Encoder a sequence."""

    config_class = _PatchesConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 8, 8)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        features = self.patches(pixel_values)
        if self.config.as_sequence:
            features = features.flatten(2).transpose(1, 2)
            features = torch.cat([features.mean(1, keepdim=True), features], dim=1)  # a class token
        return BaseModelOutputWithPooling(last_hidden_state=features)


tf.AutoModel.register(_PatchesConfig, _Patches)


def _fast_vlm() -> Any:
    return tf.FastVlmConfig(
        vision_config=_PatchesConfig(), text_config=tf.Qwen2Config(**_TEXT), image_token_index=IMAGE
    )


def _perception_lm() -> Any:
    return tf.PerceptionLMConfig(
        vision_config=_PatchesConfig(as_sequence=True), text_config=tf.LlamaConfig(**_TEXT), image_token_id=IMAGE,
        video_token_id=VIDEO, projector_pooling_ratio=2,
    )  # fmt: skip


def _cohere() -> Any:
    return tf.Cohere2Config(**_TEXT, **_WINDOWS)


def _aya_vision() -> Any:
    return tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**_FINE), text_config=_cohere(), image_token_index=IMAGE
    )


def _cohere2_vision() -> Any:
    return tf.Cohere2VisionConfig(
        vision_config=tf.SiglipVisionConfig(**_FINE), text_config=_cohere(), image_token_id=IMAGE,
        alignment_intermediate_size=48,
    )  # fmt: skip


def _got_ocr2(config: type[Any]) -> Callable[[], Any]:
    def make() -> Any:
        return config(vision_config=_SAM, text_config=tf.Qwen2Config(**_TEXT), image_token_index=IMAGE)

    return make


def _hyperclovax_vision_v2() -> Any:
    text = {**_TEXT, "embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.5,
            "attention_multiplier": 0.25}  # fmt: skip
    vision = {"model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 16, "intermediate_size": 24,
              "out_hidden_size": 24, "num_heads": 2, "patch_size": 4, "window_size": 16,
              "fullatt_block_indexes": [1], "initializer_range": 0.1}  # fmt: skip
    return tf.HyperCLOVAXVisionV2Config(
        text_config={"model_type": "hyperclovax", **text}, vision_config=vision, image_token_id=IMAGE,
        video_token_id=VIDEO,
    )  # fmt: skip


def _lighton_ocr() -> Any:
    return tf.LightOnOcrConfig(
        vision_config=tf.PixtralVisionConfig(**_FINE), text_config=tf.Qwen3Config(**_TEXT), image_token_id=IMAGE,
        spatial_merge_size=2,
    )  # fmt: skip


def _llava_next(config: type[Any], **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        return config(
            vision_config=tf.CLIPVisionConfig(**_COARSE), text_config=tf.LlamaConfig(**_TEXT), image_token_index=IMAGE,
            image_grid_pinpoints=[[16, 16]], **more,
        )  # fmt: skip

    return make


def _llava_onevision() -> Any:
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_COARSE, vision_use_head=False), text_config=tf.Qwen2Config(**_TEXT),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[16, 16]],
    )  # fmt: skip


def _video_llava() -> Any:
    return tf.VideoLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_COARSE), text_config=tf.LlamaConfig(**_TEXT), image_token_index=IMAGE,
        video_token_index=VIDEO,
    )  # fmt: skip


def _qianfan_ocr() -> Any:
    return tf.QianfanOCRConfig(
        vision_config={**_FINE, "drop_path_rate": 0.0}, text_config=tf.Qwen3Config(**_TEXT), image_token_id=IMAGE
    )


def _video_llama_3() -> Any:
    return tf.VideoLlama3Config(
        vision_config=_FINE, text_config=tf.Qwen2Config(**_TEXT), image_token_id=IMAGE, video_token_id=VIDEO
    )


def _merged_patches(rows: int) -> dict[str, Tensor]:
    return patches(3 * 16)(rows) | {"image_merge_sizes": torch.tensor([2] * rows)}


def _ovis2() -> Any:
    return tf.Ovis2Config(
        vision_config={**_FINE, "vocab_size": 24, "hidden_stride": 2}, text_config=tf.Qwen2Config(**_TEXT),
        image_token_id=IMAGE, vocab_size=100, hidden_size=32, visual_indicator_token_ids=[START, END, EXTRA, 96, 97],
    )  # fmt: skip


def _janus() -> Any:
    vision = {"hidden_size": 16, "mlp_ratio": 2.0, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
              "patch_size": 8, "projection_dim": 32, "num_image_tokens": 4, "initializer_range": 0.1}  # fmt: skip
    generator = {"num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
                 "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32}  # fmt: skip
    return tf.JanusConfig(
        vision_config=vision, vq_config=generator, text_config=tf.LlamaConfig(**_TEXT), image_token_id=IMAGE
    )


def _idefics2() -> Any:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                 "resampler_head_dim": 8, "num_key_value_heads": 1, "initializer_range": 0.1}  # fmt: skip
    return tf.Idefics2Config(
        vision_config=_COARSE, perceiver_config=perceiver, image_token_id=IMAGE,
        text_config=tf.MistralConfig(**_TEXT, sliding_window=8),
    )  # fmt: skip


def _emu3() -> Any:
    # residual blocks would bring batch norm, by which a row's image ids depend on the other rows
    vq = {"codebook_size": 32, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1],
          "num_res_blocks": 0, "attn_resolutions": [1], "hidden_size": 32}  # fmt: skip
    codes = {f"<|visual token {code:06d}|>": 100 + code for code in range(32)}
    return tf.Emu3Config(
        text_config={**_TEXT, "vocab_size": 132}, vq_config=vq,
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": EXTRA, **codes},
    )  # fmt: skip


def _small_images(rows: int) -> dict[str, Tensor]:
    return images(3, 4)(rows) | {"image_sizes": torch.tensor([[4, 4]] * rows)}


def _vipllava() -> Any:
    return tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_COARSE), text_config=tf.LlamaConfig(**_TEXT), image_token_index=IMAGE,
        vision_feature_layer=[-1, -2, 0],
    )  # fmt: skip


def _deepseek_vl() -> Any:
    return tf.DeepseekVLConfig(
        vision_config=tf.SiglipVisionConfig(**_COARSE), text_config=tf.LlamaConfig(**_TEXT), image_token_id=IMAGE
    )


def _deepseek_vl_hybrid() -> Any:
    return tf.DeepseekVLHybridConfig(
        vision_config=tf.SiglipVisionConfig(**_COARSE), high_res_vision_config=tf.SamVisionConfig(**_SAM),
        text_config=tf.LlamaConfig(**_TEXT), image_token_id=IMAGE,
    )  # fmt: skip


def _two_resolutions(rows: int) -> dict[str, Tensor]:
    return images(3, 16)(rows) | {"high_res_pixel_values": images(3, 32)(rows)["pixel_values"]}


def _paligemma() -> Any:
    return tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**_COARSE, vision_use_head=False), text_config=tf.GemmaConfig(**_TEXT),
        image_token_index=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip


def _shieldgemma2() -> Any:
    return tf.ShieldGemma2Config(
        text_config={"model_type": "gemma3_text", **_TEXT, **_WINDOWS, "query_pre_attn_scalar": 8},
        vision_config=tf.SiglipVisionConfig(**_COARSE), mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip


def _suffix_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image and the prompt see each other in both directions, the answer is causal."""
    return {"token_type_ids": (batch["labels"] != -100).long()}


def _image_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"token_type_ids": (batch["input_ids"] == IMAGE).long()}


_FOUR = (IMAGE,) * 4
_TEN = (IMAGE,) * 10
_FRAMED = (START, *_FOUR, END)

MEMBERS: dict[str, Specimen] = {
    "aya_vision": Specimen(_aya_vision, _FRAMED, images(3, 16)),
    "cohere2_vision": Specimen(_cohere2_vision, _FRAMED, images(3, 16)),
    "fast_vlm": Specimen(_fast_vlm, _FOUR, images(3, 16)),
    "got_ocr2": Specimen(_got_ocr2(tf.GotOcr2Config), _FRAMED, images(3, 32)),
    "hyperclovax_vision_v2": Specimen(_hyperclovax_vision_v2, _FRAMED, patches(3 * 2 * 16)),
    "lighton_ocr": Specimen(_lighton_ocr, _FOUR, _sized_images()),
    # the whole image, then the crop with a newline token after each of its two rows
    "llava_next": Specimen(_llava_next(tf.LlavaNextConfig), _TEN, _sized_images(2)),
    "llava_next_video": Specimen(
        _llava_next(tf.LlavaNextVideoConfig, video_token_index=VIDEO),
        (*_TEN, VIDEO, VIDEO),
        _with_video(_sized_images(2), 2),
    ),
    "llava_onevision": Specimen(_llava_onevision, _TEN, _sized_images(2)),
    "pp_chart2table": Specimen(_got_ocr2(tf.PPChart2TableConfig), _FRAMED, images(3, 32)),
    "qianfan_ocr": Specimen(_qianfan_ocr, _FRAMED, images(3, 16)),
    "video_llama_3": Specimen(_video_llama_3, _FOUR, _merged_patches),
    # a frame of the video keeps its class token
    "video_llava": Specimen(_video_llava, (*_FOUR, *(VIDEO,) * 5), _with_video(images(3, 16), 1)),
    "vipllava": Specimen(_vipllava, _FOUR, images(3, 16)),
    "perception_lm": Specimen(_perception_lm, _FOUR, images(3, 32, extra_axis=True)),
    "ovis2": Specimen(_ovis2, (START, *_FOUR, EXTRA, END), images(3, 16)),
    "janus": Specimen(_janus, _FRAMED, images(3, 16)),
    "idefics2": Specimen(_idefics2, (START, *_FOUR, START), images(3, 16, extra_axis=True)),
    "deepseek_vl": Specimen(_deepseek_vl, _FOUR, images(3, 16)),
    "deepseek_vl_hybrid": Specimen(_deepseek_vl_hybrid, _FOUR, _two_resolutions),
    # an end-of-line id after each of the two rows
    "emu3": Specimen(_emu3, (START, *(IMAGE,) * 6, END), _small_images),
    "paligemma": Specimen(_paligemma, _FOUR, images(3, 16), _suffix_types),
    "shieldgemma2": Specimen(_shieldgemma2, _FRAMED, images(3, 16), _image_types),
}
