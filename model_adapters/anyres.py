"""LLaVA-NeXT and its kin: how many tokens an image takes depends on its proportions, by the model's own packing.

The whole image comes first, then its tiles, with padding cut off and a newline after each row of patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import conventional, visual
from model_adapters.base import Batch, Layout, ModelAdapter


def _visual_rows(model: nn.Module, batch: Batch, layout: Layout) -> Mapping[str, Tensor | None]:
    sizes, seen = batch.get("image_sizes"), batch.get("pixel_values")
    if isinstance(sizes, Tensor) and isinstance(seen, visual.Seen) and seen.digests.dim() == 2:
        tiles = (seen.digests != 0).sum(1).tolist()
        try:
            tokens = [_tokens(model, batch, size, n) for size, n in zip(sizes, tiles, strict=True)]
        except (RuntimeError, ValueError):  # the model will refuse these images itself
            return visual.visual_rows(model, batch, layout)
        batch = {**batch, "image_sizes": torch.tensor(tokens)[:, None]}
    return visual.visual_rows(model, batch, layout)


def _tokens(model: nn.Module, batch: Batch, size: Tensor, tiles: int) -> int:
    """How many placeholders an image [height, width] of so many tiles, the whole one included, takes."""
    inner = conventional.unwrap(model).model
    config, pack = inner.config, inner.pack_image_features
    vision = config.vision_config
    side = int(vision.image_size // vision.patch_size * Fraction(getattr(config, "downsample_rate", None) or 1))
    options = {"vision_feature_select_strategy": "default", "vision_aspect_ratio": _aspect_ratio(config, batch)}
    known = {name: value for name, value in options.items() if name in inspect.signature(pack).parameters}
    features = [torch.zeros(tiles, side * side, 1)]
    packed: Any = pack(features, size[None], image_newline=torch.zeros(1), **known)
    return len(packed[0][0] if isinstance(packed, tuple) else packed[0])


def _aspect_ratio(config: Any, batch: Batch) -> str:
    return str(batch.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", "anyres_max_9"))


ANYRES = ModelAdapter(
    serves=("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), visual_rows=_visual_rows
)
