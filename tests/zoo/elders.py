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


def _pixels(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    def pixels(rows: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(rows, *shape, generator=torch.Generator().manual_seed(5))}

    return pixels


def _flat_patches(rows: int) -> dict[str, Tensor]:
    """Four patches of 12 values an image, each with its row and its column in front."""
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).expand(rows, 4, 2)
    values = torch.randn(rows, 4, 12, generator=torch.Generator().manual_seed(5))
    return {"flattened_patches": torch.cat([places, values], dim=-1)}


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
        **_IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, cross_layer_interval=2, alpha_initializer="ones", qk_layer_norms=True,
        use_resampler=True, freeze_text_layers=False, freeze_vision_layers=False,
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


def _kosmos2_5() -> Any:
    vision = {"hidden_size": 16, "patch_embed_hidden_size": 12, "intermediate_size": 24, "head_dim": 8,
              "num_hidden_layers": 2, "num_attention_heads": 2, "max_num_patches": 8,
              "initializer_range": 0.1}  # fmt: skip
    return tf.Kosmos2_5Config(text_config=_KOSMOS, vision_config=vision, latent_query_num=4, initializer_range=0.5)


def _chameleon() -> Any:
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"} | {"vocab_size": 120}
    codes = {f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 100 + i for i in range(16)}
    return tf.ChameleonConfig(
        **text, vocabulary_map={"<image>": IMAGE, **codes},
        vq_config={"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 8, "base_channels": 32,
                   "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "initializer_range": 0.2},
    )  # fmt: skip


def _fuyu() -> Any:
    text = tf.PersimmonConfig(
        **_IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return tf.FuyuConfig(text_config=text, image_size=8, patch_size=4, image_token_id=IMAGE)


_BERT = {**_IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
         "initializer_range": 0.1}  # fmt: skip


def _git() -> Any:
    return tf.GitConfig(**_BERT, vision_config=_VIT)


def _blip() -> Any:
    return tf.BlipConfig(text_config={**_BERT, "sep_token_id": 2}, vision_config=_VIT, image_text_hidden_size=16)


def _evolla() -> Any:
    # in transformers 5.23 the auto class lists evolla, yet does not find it: an alias of its config stands in the way
    tf.AutoModelForImageTextToText.register(tf.EvollaConfig, tf.EvollaForProteinText2Text, exist_ok=True)
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"}
    protein = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
               "max_position_embeddings": 64, "initializer_range": 0.1}  # fmt: skip
    return tf.EvollaConfig(
        **text, protein_encoder_config=protein, aligner_ffn_mult=2, aligner_attention_probs_dropout_prob=0.0,
        aligner_num_add_layers=1, resampler_depth=1, resampler_dim_head=8, resampler_heads=2, resampler_num_latents=4,
        resampler_ff_mult=2,
    )  # fmt: skip


def _protein(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sequences of 8 residues and of 5 in turn, padded with 1."""
    ids = torch.randint(5, 40, (len(batch["input_ids"]), 8), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1::2, 5:] = 0
    return {"protein_input_ids": torch.where(mask == 1, ids, 1), "protein_attention_mask": mask}


_BART = {**_IDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0,
         "init_std": 0.1, "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip


def _florence2() -> Any:
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
              "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2],
              "window_size": 2, "drop_path_rate": 0.0, "projection_dim": 32, "max_temporal_embeddings": 4,
              "max_position_embeddings": 4, "initializer_range": 0.1}  # fmt: skip
    return tf.Florence2Config(text_config=tf.BartConfig(**_BART), vision_config=vision, image_token_id=IMAGE)


_T5 = {"d_kv": 8, "d_ff": 48, "dropout_rate": 0.0}


def _pix2struct() -> Any:
    text = {**_IDS, **_T5, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    vision = {**_T5, "hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 24, "num_hidden_layers": 1,
              "num_attention_heads": 4, "seq_len": 8}  # fmt: skip
    return tf.Pix2StructConfig(text_config=text, vision_config=vision, initializer_range=0.1)


def _patches_alone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mask is one of patches; the decoder reads the labels."""
    del batch["input_ids"]
    return {"attention_mask": torch.ones(batch["flattened_patches"].shape[:2], dtype=torch.long)}


def _pp_formulanet() -> Any:
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 24,
              "post_conv_in_channels": 8, "post_conv_mid_channels": 8, "post_conv_out_channels": 16,
              "decoder_hidden_size": 32, "initializer_range": 0.1}  # fmt: skip
    return tf.PPFormulaNetConfig(text_config=_BART, vision_config=vision)


def _t5gemma2() -> Any:
    text = {**_TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8}  # fmt: skip
    encoder = {"text_config": text, "vision_config": tf.SiglipVisionConfig(**_VIT), "mm_tokens_per_image": 4,
               "boi_token_index": START, "eoi_token_index": END}  # fmt: skip
    return tf.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=IMAGE)


def _udop() -> Any:
    return tf.UdopConfig(
        **_T5, vocab_size=100, d_model=32, num_layers=2, num_heads=4, max_2d_position_embeddings=64, image_size=16,
        patch_size=8, decoder_start_token_id=PAD,
    )  # fmt: skip


def _boxes(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where each token stands on the page, corners in reading order."""
    corners = torch.rand(*batch["input_ids"].shape, 2, 2, generator=torch.Generator().manual_seed(7))
    return {"bbox": corners.sort(dim=-2).values.flatten(-2)}


def _vision_encoder_decoder() -> Any:
    return tf.VisionEncoderDecoderConfig(
        encoder=tf.ViTConfig(**_VIT), decoder=tf.BertConfig(**_BERT, is_decoder=True, add_cross_attention=True),
        pad_token_id=PAD, decoder_start_token_id=1,
    )  # fmt: skip


def _labels_alone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    del batch["input_ids"], batch["attention_mask"]
    return {}


def _pi0() -> Any:
    vlm = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**_TEXT), vision_config=tf.SiglipVisionConfig(**_VIT, vision_use_head=False),
        image_token_id=IMAGE, projection_dim=32,
    )  # fmt: skip
    return tf.PI0Config(
        vlm_config=vlm, dit_config=tf.GemmaConfig(**{**_TEXT, "hidden_size": 16, "intermediate_size": 24}),
        chunk_size=4, max_state_dim=6, max_action_dim=6,
    )  # fmt: skip


def _actions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Instead of labels the actions; the noise is given, or every forward would draw another."""
    random = torch.Generator().manual_seed(7)
    rows = len(batch.pop("labels"))
    return {"state": torch.randn(rows, 6, generator=random), "actions": torch.randn(rows, 4, 6, generator=random),
            "noise": torch.randn(rows, 4, 6, generator=random), "timestep": torch.rand(rows, generator=random),
            "pixel_attention_mask": torch.ones(rows, 1, dtype=torch.bool)}  # fmt: skip


def _diffusion_gemma() -> Any:
    text = {**_TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision",
            "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}  # fmt: skip
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
              "pooling_kernel_size": 2, "position_embedding_size": 8, "initializer_range": 0.1}  # fmt: skip
    return tf.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, boi_token_id=START, eoi_token_id=END,
        canvas_length=6, initializer_range=0.1,
    )  # fmt: skip


def _canvas(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens to denoise, the positions of the image's patches, the marks of its tokens."""
    rows = len(batch.pop("labels"))
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    random = torch.Generator().manual_seed(7)
    canvas = torch.randint(3, 90, (rows, 6), generator=random)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(canvas)], dim=1)
    return {"decoder_input_ids": canvas, "decoder_attention_mask": mask,
            "self_conditioning_logits": torch.randn(rows, 6, 100, generator=random),
            "image_position_ids": places.repeat(rows, 1, 1),
            "mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}  # fmt: skip


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
        _instructblip(tf.InstructBlipVideoConfig, video_token_index=VIDEO),
        (VIDEO,) * 8,
        _pixels(2, 3, 16, 16),
        _instruction,
    ),
    # makes its causal mask from the least float64 in a float32 tensor
    "kosmos-2": Specimen(_kosmos2, _FRAMED, images(3, 16), _image_places, dtype=torch.float32),
    "kosmos-2.5": Specimen(_kosmos2_5, _FRAMED, _flat_patches, _image_places),
    "chameleon": Specimen(_chameleon, _FRAMED, images(3, 8)),
    "fuyu": Specimen(_fuyu, (IMAGE, IMAGE, END) * 2 + (START,), _pixels(4, 48)),
    "git": Specimen(_git, (), images(3, 16)),  # puts the image in front of input_ids itself
    "blip": Specimen(_blip, (), images(3, 16)),  # cross-attention, no placeholders
    "evolla": Specimen(_evolla, extra=_protein),  # reads proteins, takes no images
    # from here on encoder-decoders and no decoders of language
    "florence2": Specimen(_florence2, (IMAGE,) * 5, images(3, 16)),
    "pix2struct": Specimen(_pix2struct, (), _flat_patches, _patches_alone),
    "pp_formulanet": Specimen(_pp_formulanet, (), images(3, 32)),
    "t5gemma2": Specimen(_t5gemma2, _FRAMED, images(3, 16)),
    "udop": Specimen(_udop, (), images(3, 16), _boxes),
    "vision-encoder-decoder": Specimen(_vision_encoder_decoder, (), images(3, 16), _labels_alone),
    "pi0": Specimen(_pi0, _FOUR, images(3, 16, extra_axis=True), _actions),  # takes no labels: its loss is of actions
    "diffusion_gemma": Specimen(_diffusion_gemma, _FRAMED, _pixels(16, 48), _canvas),  # takes no labels, has no loss
}
