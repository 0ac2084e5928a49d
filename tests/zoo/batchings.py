"""Random batches of any zoo member: rows with none, one or two images, in any order, with any padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from model_adapters import Layout, find_adapter
from regate.memory import keys
from tests.zoo import members
from tests.zoo.common import IMAGE, PAD, Specimen

# One image for each row, without placeholders in the ids: cross-attention, an encoder, or put in front by the model.
ONE_EACH = {
    "blip", "evolla", "git", "pix2struct", "pp_formulanet", "udop", "vision-encoder-decoder",
}  # fmt: skip
# [B, images, ...]: rows with fewer images than others are filled with zeros.
BY_ROW = {"granite_docling", "idefics", "idefics2", "idefics3", "mllama", "pi0", "smolvlm"}
NO_IMAGES = {"mistral4"}
POOL = 4  # different images


@dataclass(frozen=True)
class Sample:
    """A text by number, and the images in it, by number; equal samples are one sample."""

    text: int
    images: tuple[int, ...]


@cache
def skeleton(name: str) -> nn.Module:
    """The model without values: what an adapter asks of it are its classes and its config."""
    with torch.device("meta"):
        return tf.AutoModelForImageTextToText.from_config(members()[name].config())


@cache
def pool(name: str) -> tuple[dict[str, Tensor], ...]:
    """`POOL` images: the second differs from the first in one value, the third has its values elsewhere."""
    specimen = members()[name]
    found = []
    for number in range(POOL):
        random = torch.Generator().manual_seed(number if number == 3 else 0)
        image = dict(specimen.pixels(1))
        if name == "evolla":
            image = {"protein_input_ids": torch.randint(5, 40, (1, 8), generator=random)}
        for entry, value in image.items():
            seen = entry in SEEN
            if not seen:
                continue
            value = torch.randn(value.shape, generator=random) if value.is_floating_point() else value.clone()
            flat = value.view(-1)
            if number == 1:
                flat[flat.numel() // 3] += 1
            image[entry] = flat.roll(1).view(value.shape) if number == 2 else value
        found.append(image)
    return tuple(found)


SEEN = {
    "pixel_values", "pixel_values_videos", "high_res_pixel_values", "flattened_patches", "protein_input_ids",
}  # fmt: skip


def batch(name: str, samples: Sequence[Sample], *, left: bool = False, wider: int = 0) -> dict[str, Any]:
    """The arguments of a forward, as a processor would give them: `wider` positions more of padding than needed."""
    specimen = members()[name]
    rows, labels = zip(*(_row(name, specimen, sample) for sample in samples), strict=True)
    length = max(map(len, rows)) + wider

    def pad(row: Tensor, value: int) -> Tensor:
        missing = length - len(row)
        return F.pad(row, (missing, 0) if left else (0, missing), value=value)

    ids = torch.stack([pad(row, PAD) for row in rows])
    made = {
        "input_ids": ids,
        "labels": torch.stack([pad(row, -100) for row in labels]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), 0) for row in rows]),
    }
    if name.startswith("kosmos"):
        made["image_embeds_position_mask"] = (ids == IMAGE).long()
    return made | _together(name, [[pool(name)[i] for i in sample.images] for sample in samples])


def _row(name: str, specimen: Specimen, sample: Sample) -> tuple[Tensor, Tensor]:
    """Images stand between words, or right beside one another: every second text has them so."""
    words = torch.arange(3, 3 + 6 + 2 * sample.text)
    image = torch.tensor(specimen.image_ids, dtype=torch.int64)
    between = words[:1] if sample.text % 2 else words[:0]
    parts = [words[:2]]
    for _ in sample.images:
        parts += [image, between]
    ids = torch.cat([*parts, words[2:]])
    return ids, torch.where(torch.arange(len(ids)) < len(ids) - 3, -100, ids)


def _together(name: str, images: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    every = [image for row in images for image in row]
    if not every:
        return {}
    if name in BY_ROW:
        most = max(map(len, images))
        rows = [_filled(row, every[0], most) for row in images]
        return {entry: torch.cat([row[entry] for row in rows]) for entry in every[0]}
    axis = -1 if name.startswith("minicpm") else 0
    return {
        entry: torch.cat([image[entry] for image in every], dim=axis if entry == "pixel_values" else 0)
        for entry in every[0]
    }


def _filled(row: list[dict[str, Tensor]], like: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """[1, most, ...], of images [1, 1, ...] each."""
    found = {}
    for entry, value in like.items():
        if value.dim() < 2:  # a number for the row
            found[entry] = value
            continue
        parts = [image[entry] for image in row] + [torch.zeros_like(value)] * (most - len(row))
        found[entry] = torch.cat(parts, dim=1)
    return found


def sample_keys(name: str, made: dict[str, Any]) -> list[bytes]:
    """The keys that the gate would use, or an AssertionError where it would leave a note."""
    model = skeleton(name)
    adapter = find_adapter(model)
    layout: Layout = adapter.layout(model, made)
    visual = keys.visual_keys(model, adapter, made, layout)
    assert visual is not None, f"{name}: whose visual input is it?"
    return keys.sample_keys(keys.text_keys(layout), visual)
