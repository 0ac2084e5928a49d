"""Families that feed the image in otherwise: by cross-attention, by queries, in front of the text, to an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.common import CLIP, END, IMAGE, PAD, START, TEXT, VIDEO, Specimen, images

# wide weights: what the image shows has to reach the loss
_TEXT = {**TEXT, "initializer_range": 0.1}
_VIT = {**CLIP, "initializer_range": 0.1}
_IDS = {"vocab_size": 100, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}


def _flat_patches(shape: tuple[int, ...], name: str) -> Callable[[int], dict[str, Tensor]]:
    def pixels(rows: int) -> dict[str, Tensor]:
        return {name: torch.randn(rows, *shape, generator=torch.Generator().manual_seed(5))}

    return pixels


def _mllama() -> Any:
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"} | {"num_hidden_layers": 3}
    return tf.MllamaConfig(
        text_config={**text, "cross_attention_layers": [1]}, image_token_index=IMAGE,
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1,
                       "attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 2,
                       "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [1],
                       "vision_output_dim": 32, "initializer_range": 0.1},
    )  # fmt: skip


def _tiles(rows: int) -> dict[str, Tensor]:
    """Images of one tile and of two in turn."""
    tiles = 1 + torch.arange(rows) % 2
    mask = torch.arange(2) < tiles[:, None, None]
    values = torch.randn(rows, 1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": values * mask[..., None, None, None], "aspect_ratio_ids": tiles[:, None],
            "aspect_ratio_mask": mask.long()}  # fmt: skip


def _tiles_seen(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text from the image on sees its tiles; the text before it sees nothing."""
    after = (batch["input_ids"] == IMAGE).cumsum(1)
    return {"cross_attention_mask": after[:, :, None, None] * batch["aspect_ratio_mask"][:, None]}


def _idefics() -> Any:
    return tf.IdeficsConfig(
        **_IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.1, cross_layer_interval=2, qk_layer_norms=True, use_resampler=True,
        freeze_text_layers=False, freeze_vision_layers=False,
        vision_config={"embed_dim": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 8, "initializer_range": 0.1},
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 8, "qk_layer_norms_perceiver": True},
    )  # fmt: skip


def _images_seen(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"image_attention_mask": (batch["input_ids"] == IMAGE).cumsum(1)[:, :, None]}


_QFORMER = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 64, "initializer_range": 0.1}  # fmt: skip


def _blip2() -> Any:
    opt = tf.OPTConfig(
        **_IDS, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, layerdrop=0.0, init_std=0.1,
    )  # fmt: skip
    return tf.Blip2Config(
        vision_config=_VIT, qformer_config=_QFORMER, text_config=opt, num_query_tokens=4, image_token_index=IMAGE
    )


def _instructblip(config: type[Any], **token: int) -> Callable[[], Any]:
    return lambda: config(
        vision_config=_VIT, qformer_config=_QFORMER, text_config=tf.LlamaConfig(**_TEXT), num_query_tokens=4, **token
    )


def _instruction(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Q-Former reads the prompt too; of the second row only the first half."""
    ids = torch.randint(3, 90, (len(batch["input_ids"]), 6), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1::2, 3:] = 0
    return {"qformer_input_ids": ids * mask, "qformer_attention_mask": mask}


def _image_places(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"image_embeds_position_mask": (batch["input_ids"] == IMAGE).long()}


_KOSMOS = {**_IDS, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 64,
           "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.1}  # fmt: skip


def _kosmos2() -> Any:
    return tf.Kosmos2Config(text_config=_KOSMOS, vision_config=_VIT, latent_query_num=4)


_FOUR = (IMAGE,) * 4
_FRAMED = (START, *_FOUR, END)

MEMBERS: dict[str, Specimen] = {
    "mllama": Specimen(_mllama, (IMAGE,), _tiles, _tiles_seen),
    "idefics": Specimen(_idefics, (START, IMAGE, START), images(3, 16, extra_axis=True), _images_seen),
    "blip-2": Specimen(_blip2, _FOUR, images(3, 16)),
    "instructblip": Specimen(
        _instructblip(tf.InstructBlipConfig, image_token_index=IMAGE), _FOUR, images(3, 16), _instruction
    ),
    "instructblipvideo": Specimen(
        _instructblip(tf.InstructBlipVideoConfig, video_token_index=VIDEO), (VIDEO,) * 8,
        _flat_patches((2, 3, 16, 16), "pixel_values"), _instruction,
    ),  # fmt: skip
    "kosmos-2": Specimen(_kosmos2, _FRAMED, images(3, 16), _image_places),
}
