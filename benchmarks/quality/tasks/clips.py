"""Clips: two drawings cross the picture one after the other, with a small LLaVA-OneVision. Words of time and place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from benchmarks.quality.tasks import Batch, Sample, Samples, Settings, Task
from benchmarks.quality.tasks.plain import PlainProcessor, conversation, encode

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.3, 1.0), "yellow": (0.9, 0.9, 0.1)}
SHAPES = ("square", "disc", "cross", "ring")
SIDES = ("left", "right", "top", "bottom")
PROMPTS = ("what happens , the first mover first", "what happens , the last mover first")  # each asks for its template
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_STEP = {"left": (0, 1), "right": (0, -1), "top": (1, 0), "bottom": (-1, 0)}
_TEMPLATES = (
    "the {c0} {s0} moved from the {f0} to the {t0} of the picture before the {c1} {s1} moved , and then the {c1_} "
    "{s1_} went from its place at the {f1} to the {t1} .",
    "the {c1} {s1} moved from the {f1} to the {t1} of the picture after the {c0} {s0} had moved , and this {c0_} "
    "{s0_} had gone from its place at the {f0} to the {t0} .",
)
SETTINGS = Settings(steps=500, batch_size=16, vision_steps=100, vision_batch_size=32, few=100, free=50)
_FRAMES, _SIZE, _PATCH, _WIDTH = 6, 32, 4, 96


def task(*, settings: Settings | None = None, limit: int | None = None) -> Task:
    """With at most `limit` samples in each part."""
    texts = [template.replace("{", "").replace("}", "") for template in _TEMPLATES]
    texts += [" ".join(COLOURS), " ".join(SHAPES), " ".join(SIDES), *PROMPTS]
    per_frame = (_SIZE // _PATCH // 2) ** 2  # the model pools 2 x 2 patches, and adds an end to the clip
    processor = PlainProcessor.of(texts, placeholders=_FRAMES * per_frame + 1, pixels="pixel_values_videos")
    sizes = {"train": 4000, "validation": 400, "test": 800}
    made = {name: _clips(min(n, limit or n), seed=seed) for seed, (name, n) in enumerate(sizes.items(), 1)}
    return Task(
        name="clips",
        source="drawings that move; clips and captions are ours",
        **{name: Samples(some, processor, encode) for name, some in made.items()},
        classes=(4,) * 6,
        build=lambda seed: build(processor, seed),
        see=_see,
        encoder=_encoder,
        pixels="pixel_values_videos",
        settings=settings or SETTINGS,
        per_frame=per_frame,
    )


def _clips(n: int, *, seed: int) -> list[Sample]:
    random = np.random.default_rng(seed)
    return [_clip(random) for _ in range(n)]


def _clip(random: np.random.Generator) -> Sample:
    """Two things of different colour and shape; in each half of the clip one of them crosses the picture."""
    colours, shapes = random.permutation(4)[:2], random.permutation(4)[:2]
    sides = random.integers(4, size=2)
    frames = np.zeros((_FRAMES, 3, _SIZE, _SIZE), np.float32) - 0.5
    half = _FRAMES // 2
    values: dict[str, str] = {}
    for i in range(2):
        side = SIDES[sides[i]]
        colour, shape = list(COLOURS)[colours[i]], SHAPES[shapes[i]]
        values |= {f"c{i}": colour, f"s{i}": shape, f"f{i}": side, f"t{i}": _OPPOSITE[side]}
        for frame in range(half):
            _draw(frames[i * half + frame], shape, COLOURS[colour], side, frame / (half - 1))
    asked = int(random.integers(len(PROMPTS)))
    template = _TEMPLATES[asked].split()
    names = [word.strip("{}") if word.startswith("{") else "" for word in template]
    words = [values[name.rstrip("_")] if name else word for name, word in zip(names, template, strict=True)]
    # Where it went follows from where it came from.
    grounded = tuple(bool(name) and not name.endswith("_") and name[0] != "t" for name in names)
    facts = tuple(int(x) for i in range(2) for x in (colours[i], shapes[i], sides[i]))
    return Sample(conversation(PROMPTS[asked], words, torch.from_numpy(frames)), grounded, facts)


def _draw(frame: np.ndarray, shape: str, colour: tuple[float, ...], side: str, moved: float) -> None:
    half, travel = 4, _SIZE - 10
    down, right = _STEP[side]
    along = 5 + (travel * moved if down + right > 0 else travel * (1 - moved))
    across = _SIZE / 2
    y, x = (along, across) if down else (across, along)
    rows, columns = np.ogrid[:_SIZE, :_SIZE]
    dy, dx = abs(rows - y), abs(columns - x)
    distance = np.sqrt(dy**2 + dx**2)
    inside = {
        "square": np.maximum(dy, dx) <= half - 0.5,
        "disc": distance <= half,
        "cross": (np.minimum(dy, dx) <= 1) & (np.maximum(dy, dx) <= half),
        "ring": (distance <= half + 0.5) & (distance >= half - 1.5),
    }[shape]
    frame[:, inside] = np.array(colour)[:, None]


def build(processor: PlainProcessor, seed: int) -> Any:
    """Some 0.8 million weights."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    shape = {"hidden_size": _WIDTH, "num_attention_heads": 4}
    text = {
        "model_type": "llama", **shape, "intermediate_size": 3 * _WIDTH, "num_hidden_layers": 4,
        "num_key_value_heads": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 512,
        "tie_word_embeddings": False, **ids,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", **shape, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2,
        "image_size": _SIZE, "patch_size": _PATCH, "vision_use_head": False,
    }  # fmt: skip
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, video_token_index=placeholder, video_token_id=placeholder,
        image_token_id=tokenizer.unk_token_id, image_token_index=tokenizer.unk_token_id, vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def _encoder(model: Any) -> nn.Module:
    encoder: nn.Module = model.model.vision_tower
    return encoder


def _see(encoder: Any, batch: Batch) -> Tensor:
    """Each frame's patches, averaged: [B, frames * D]."""
    clips = batch["pixel_values_videos"]
    states: Tensor = encoder(clips.flatten(0, 1)).last_hidden_state
    return states.mean(1).reshape(len(clips), -1)
