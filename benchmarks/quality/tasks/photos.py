"""Photographs: grids of four from Fashion-MNIST with a small SmolVLM. 256 visual positions, answers of 28 words."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from benchmarks.quality.tasks import Batch, Sample, Samples, Settings, Task
from benchmarks.quality.tasks.plain import PlainProcessor, conversation, encode

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))  # where Debian's package puts it
CLASSES = {1: "trousers", 3: "dress", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot"}  # that look alike: left out
NAMES = tuple(CLASSES.values())
PROMPTS = (
    "what is in the picture , from the top",
    "what is in the picture , from the end",
)  # each asks for its template
_TEMPLATES = (
    "at the top left a {0} , at the top right a {1} , at the bottom left a {2} and at the bottom right a {3} .",
    "a {3} at the bottom right , a {2} at the bottom left , a {1} at the top right and a {0} at the top left .",
)
SETTINGS = Settings(
    steps=300, batch_size=16, lr_warmup=20, vision_steps=250, vision_batch_size=32, link_steps=1200, starts=3,
    few=100, free=50,
)  # fmt: skip
EARLY = Settings(
    steps=300, batch_size=16, vision_steps=250, vision_batch_size=32, link_steps=400, few=100, free=50
)  # fmt: skip
_SIZE, _PATCH, _WIDTH = 64, 4, 96


def early(*, settings: Settings | None = None, limit: int | None = None) -> Task:
    """The same from models that hardly see yet: how far a run gets before its parts understand each other."""
    return replace(task(settings=settings or EARLY, limit=limit), name="photos-early")


def task(*, settings: Settings | None = None, limit: int | None = None) -> Task:
    """With at most `limit` samples in each part. Needs the Debian package dataset-fashion-mnist."""
    photos = {"train": _read("train"), "test": _read("t10k")}
    made = {
        "train": _grids(*photos["train"], rows=range(4000), seed=1),
        "link": _grids(*photos["train"], rows=range(4000, 8000), seed=4),
        "validation": _grids(*photos["train"], rows=range(8000, 8400), seed=2),
        "test": _grids(*photos["test"], rows=range(800), seed=3),
    }
    texts = [t.format(*NAMES[:4]) for t in _TEMPLATES] + [" ".join(NAMES), *PROMPTS]
    count = (_SIZE // _PATCH) ** 2
    processor = PlainProcessor.of(texts, placeholders=count, pixels="pixel_values")
    return Task(
        name="photos",
        source="photographs of Fashion-MNIST, four to a picture; the captions are ours, from its classes by templates",
        **{name: Samples(some[:limit], processor, encode) for name, some in made.items()},
        classes=(len(NAMES), 4),
        build=lambda seed: build(processor, seed),
        see=_see,
        encoder=_encoder,
        pixels="pixel_values",
        settings=settings or SETTINGS,
    )


def _read(part: str) -> tuple[np.ndarray, np.ndarray]:
    images = np.frombuffer(gzip.decompress((FOLDER / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    known = np.isin(labels, list(CLASSES))
    return images.reshape(-1, 28, 28)[known], labels[known]


def _grids(images: np.ndarray, labels: np.ndarray, *, rows: range, seed: int) -> list[Sample]:
    """Sample i is made of photographs 4i to 4i + 3: none is in two samples."""
    random = np.random.default_rng(seed)
    samples = []
    for i in rows:
        canvas = np.zeros((2, _SIZE // 2, 2, _SIZE // 2), np.float32)
        canvas[:, 2:30, :, 2:30] = images[4 * i : 4 * i + 4].reshape(2, 2, 28, 28).transpose(0, 2, 1, 3) / 127.5 - 1
        shown = [NAMES.index(CLASSES[int(label)]) for label in labels[4 * i : 4 * i + 4]]
        asked = int(random.integers(len(PROMPTS)))
        template = _TEMPLATES[asked].split()
        words = [word.format(*(NAMES[name] for name in shown)) for word in template]
        pixels = torch.from_numpy(canvas.reshape(1, 1, _SIZE, _SIZE)).expand(1, 3, -1, -1)
        grounded = tuple(word.startswith("{") for word in template)
        facts = tuple(fact for place, name in enumerate(shown) for fact in (name, place))
        samples.append(Sample(conversation(PROMPTS[asked], words, pixels), grounded, facts))
    return samples


def build(processor: PlainProcessor, seed: int) -> Any:
    """Some 0.7 million weights."""
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
        **shape, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2, "image_size": _SIZE, "patch_size": _PATCH,
    }  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=1, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


def _encoder(model: Any) -> nn.Module:
    encoder: nn.Module = model.model.vision_model
    return encoder


def _see(encoder: Any, batch: Batch) -> Tensor:
    """Each quarter's patches, averaged: [4 * B, D]. A head tells what it is, another which quarter."""
    states: Tensor = encoder(batch["pixel_values"][:, 0]).last_hidden_state
    side = _SIZE // _PATCH // 2
    return states.reshape(len(states), 2, side, 2, side, -1).mean((2, 4)).flatten(0, 2)
