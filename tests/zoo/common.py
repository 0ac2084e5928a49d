"""What the zoo's members are made of: a `Specimen` is one tiny random model and the batches that it trains on.

Two text layers where the architecture allows, dropout 0, grouped-query attention. A row is: prompt, image tokens,
prompt, answer; only the answer is labelled. Text ids stay below `TEXT_IDS`, so that they never meet a special id.
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
class Specimen:
    """One architecture.

    Attributes:
        config: makes the small config.
        image_ids: the ids that stand for one image in `input_ids`, markers included; () for text alone.
        pixels: the image tensors of a batch of this many rows, one image a row.
        extra: what else the model wants, from the batch so far; its entries are added or replace.
        split: the batch as batches of one row each (for models that number the images of a whole batch).
        dtype: the widest type that the architecture computes in throughout (some hard-code float32 somewhere).
    """

    config: Callable[[], Any]
    image_ids: tuple[int, ...] = ()
    pixels: Callable[[int], dict[str, Tensor]] = lambda rows: {}
    extra: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: {}
    split: Callable[[dict[str, Tensor], int], list[dict[str, Tensor]]] = lambda batch, rows: split_evenly(batch, rows)
    dtype: torch.dtype = torch.float64

    def build(self, **overrides: Any) -> tf.PreTrainedModel:
        """Equal weights at every call; float32, train mode."""
        torch.manual_seed(0)
        config = self.config()
        for name, value in overrides.items():
            setattr(config, name, value)
        model = tf.AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():  # norms and gates start at one or zero: random ones catch more
            if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        return model.train()

    def double(self, **overrides: Any) -> tf.PreTrainedModel:
        """The same in `dtype`, with an expert kernel that has float64."""
        model = self.build(**overrides).to(self.dtype)
        if hasattr(model, "set_experts_implementation") and self.dtype == torch.float64:
            model.set_experts_implementation("batched_mm")
        return model

    def batch(
        self, padding: Padding = "right", *, rows: int = 2, seed: int = 0, answer: int | None = None
    ) -> dict[str, Tensor]:
        """Keyword arguments of a training forward. Rows differ in length unless `padding` is "none"."""
        random = torch.Generator().manual_seed(seed)
        ids, labels = [], []
        for row in range(rows):
            n_answer = answer or 9 + seed % 4 + (0 if padding == "none" else 2 * row)
            text = torch.randint(3, TEXT_IDS, (7 + n_answer,), generator=random)
            ids.append(torch.cat([text[:4], torch.tensor(self.image_ids, dtype=torch.long), text[4:]]))
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
        batch |= self.pixels(rows)
        return batch | self.extra(batch)


def split_evenly(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Every tensor has one equal share per row along its first axis."""
    return [{k: v.chunk(rows)[row] for k, v in batch.items()} for row in range(rows)]


def images(channels: int, size: int, extra_axis: bool = False) -> Callable[[int], dict[str, Tensor]]:
    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        shape = (rows, 1, channels, size, size) if extra_axis else (rows, channels, size, size)
        return {"pixel_values": torch.randn(shape, generator=random)}

    return pixels


def patches(dim: int) -> Callable[[int], dict[str, Tensor]]:
    """Qwen-VL: the patches of all images in one list; a 4 x 4 grid merges to 4 tokens."""

    def pixels(rows: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        grid = torch.tensor([[1, 4, 4]] * rows)
        return {"pixel_values": torch.randn(16 * rows, dim, generator=random), "image_grid_thw": grid}

    return pixels


CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 8}  # fmt: skip
