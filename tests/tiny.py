"""Tiny random instances of real transformers MLLMs, and batches for them: what the numerical tests run on.

Two text layers, dropout 0, grouped-query attention. A row is: prompt, image tokens, prompt, answer; only the answer
is labelled. Text ids stay below `TEXT_IDS`, so that they never meet a special id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor

TEXT_IDS = 90
PAD, START, END, IMAGE, VIDEO, EXTRA = 0, 91, 92, 93, 94, 95
Padding = Literal["none", "left", "right"]

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "max_position_embeddings": 256, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Tiny:
    """One architecture: its config, the ids that stand for one image, and the image's tensors."""

    config: Callable[[], Any]
    image_ids: tuple[int, ...]
    pixels: Callable[[int], dict[str, Tensor]]
    extra: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}

    def build(self, **overrides: Any) -> tf.PreTrainedModel:
        """Equal weights at every call; float32, train mode."""
        torch.manual_seed(0)
        config = self.config()
        for name, value in overrides.items():
            setattr(config, name, value)
        model = tf.AutoModelForImageTextToText.from_config(config)
        for module in model.modules():  # norms start at one or zero: random ones catch more
            if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
                module.weight.data.add_(torch.randn_like(module.weight), alpha=0.1)
        return model.train()

    def batch(
        self, padding: Padding = "right", *, rows: int = 2, seed: int = 0, answer: int | None = None
    ) -> dict[str, Tensor]:
        """Keyword arguments of a training forward. Rows differ in length unless `padding` is "none"."""
        random = torch.Generator().manual_seed(seed)
        ids, labels = [], []
        for row in range(rows):
            n_answer = answer or 9 + seed % 4 + (0 if padding == "none" else 2 * row)
            text = torch.randint(3, TEXT_IDS, (7 + n_answer,), generator=random)
            ids.append(torch.cat([text[:4], torch.tensor(self.image_ids), text[4:]]))
            labels.append(torch.where(torch.arange(len(ids[-1])) < len(ids[-1]) - n_answer, -100, ids[-1]))
        length = max(map(len, ids))

        def pad(rows: list[Tensor], value: int) -> Tensor:
            filled = [torch.full((length - len(r),), value) for r in rows]
            return torch.stack(
                [torch.cat([f, r] if padding == "left" else [r, f]) for r, f in zip(rows, filled, strict=True)]
            )

        input_ids = pad(ids, PAD)
        mask = pad([torch.ones_like(r) for r in ids], 0)
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": pad(labels, -100)}
        return batch | self.pixels(rows) | self.extra(input_ids)


def _images(channels: int, size: int, extra_axis: bool = False) -> Callable[[int], dict[str, Tensor]]:
    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        shape = (rows, 1, channels, size, size) if extra_axis else (rows, channels, size, size)
        return {"pixel_values": torch.randn(shape, generator=random)}

    return pixels


def _patches(dim: int) -> Callable[[int], dict[str, Tensor]]:
    """Qwen-VL: the patches of all images in one list; a 4 x 4 grid merges to 4 tokens."""

    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        grid = torch.tensor([[1, 4, 4]] * rows)
        return {"pixel_values": torch.randn(16 * rows, dim, generator=random), "image_grid_thw": grid}

    return pixels


def _mistral3_images(rows: int) -> dict[str, Tensor]:
    return _images(3, 16)(rows) | {"image_sizes": torch.tensor([[16, 16]] * rows)}


_CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 8}  # fmt: skip


def _llava() -> Any:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE,
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
        text_config=text, vision_config=tf.SiglipVisionConfig(**_CLIP), mm_tokens_per_image=4,
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


def _image_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int()}


_FOUR = (IMAGE,) * 4
_FRAMED = (START, *_FOUR, END)

TINY: dict[str, Tiny] = {
    "llava": Tiny(_llava, _FOUR, _images(3, 16)),
    "qwen2_vl": Tiny(_qwen2_vl, _FRAMED, _patches(3 * 2 * 16), _image_types),
    "qwen2_5_vl": Tiny(_qwen2_5_vl, _FRAMED, _patches(3 * 2 * 16), _image_types),
    "qwen3_vl": Tiny(_qwen3_vl, _FRAMED, _patches(3 * 2 * 16), _image_types),
    "qwen3_vl_moe": Tiny(_qwen3_vl_moe, _FRAMED, _patches(3 * 2 * 16), _image_types),
    "internvl": Tiny(_internvl, _FOUR, _images(3, 16)),
    "gemma3": Tiny(_gemma3, _FRAMED, _images(3, 16), lambda ids: {"token_type_ids": (ids == IMAGE).long()}),
    "smolvlm": Tiny(_idefics3(tf.SmolVLMConfig), _FOUR, _images(3, 16, extra_axis=True)),
    "idefics3": Tiny(_idefics3(tf.Idefics3Config), _FOUR, _images(3, 16, extra_axis=True)),
    "mistral3": Tiny(_mistral3, _FOUR, _mistral3_images),
}
