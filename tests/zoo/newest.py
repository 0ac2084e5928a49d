"""Types that came with transformers 5.24."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.common import END, EXTRA, IMAGE, MROPE, START, TEXT, VIDEO, Specimen, patches
from tests.zoo.mixtures import _DEEPSEEK_MOE, _FOUR, _INKLING, _MLA, _blocks, _image_types, _without


def _apertus1p5() -> Any:
    """Codes of an image are tokens of the vocabulary; here they share rows with text."""
    vision = {"codebook_size": 80, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "resolution": 4,
              "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}  # fmt: skip
    audio = {"model_type": "wavtokenizer_encoder", "num_filters": 4, "hidden_size": 16, "codebook_size": 4,
             "codebook_dim": 16, "num_lstm_layers": 1, "upsampling_ratios": [2, 2]}  # fmt: skip
    text = _without("head_dim") | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return tf.Apertus1p5Config(
        text_config=text, vision_config=vision, audio_config=audio, image_token_id=IMAGE, audio_token_id=EXTRA,
        image_token_offset=3, audio_token_offset=83,
    )  # fmt: skip


def _apertus_images(rows: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.rand(rows, 3, 4, 4, generator=random), "image_sizes": torch.tensor([[4, 4]] * rows)}


def _hy_v4_vl() -> Any:
    text = {
        **TEXT, **_DEEPSEEK_MOE, **_MLA, "qk_rope_head_dim": 8, "mlp_layer_types": ["dense", "sparse"],
        "index_topk": 6, "index_head_dim": 16, "index_n_heads": 2, "hc_mult": 2, "rope_parameters": MROPE,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "patch_size": 4, "out_hidden_size": 32, "max_image_size": 16}  # fmt: skip
    return tf.HYV4VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO)


def _inkling2_loop() -> Any:
    text = {name: value for name, value in _INKLING.items() if name != "intermediate_size"}
    text |= {"n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 4,
             "loop_num_passes": 2, "loop_gate_rank": 4}  # fmt: skip
    vision = {"model_type": "inkling2_vision", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "patch_size": 4, "posemb_grid_size": 4, "projection_hidden_dim": 32,
              "text_hidden_size": 32}  # fmt: skip
    return tf.Inkling2LoopConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)


MEMBERS: dict[str, Specimen] = {
    "apertus1p5": Specimen(_apertus1p5, (START, *_FOUR, END), _apertus_images),
    # a row of the image's 2 x 2 tokens ends with a newline token
    "hy_v4_vl": Specimen(_hy_v4_vl, (START, *(IMAGE,) * 6, END), patches(3 * 16), _image_types),
    # its gates are float32
    "inkling2_loop": Specimen(
        _inkling2_loop, _FOUR, _blocks(4, 8, 8, 3, image_grid_thw=(1, 2, 2)), dtype=torch.float32
    ),
}
