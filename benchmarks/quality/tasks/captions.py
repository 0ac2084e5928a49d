"""Drawings: easy-VQA captions with the demo's LLaVA. 17 visual positions, answers of some thirty words."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.quality.tasks import Batch, Sample, Samples, Settings, Task
from examples.demo import captions, tiny

SIDES = ("upper", "lower", "left", "right")


def task(*, settings: Settings | None = None, limit: int | None = None) -> Task:
    """With at most `limit` samples in each part."""
    parts = {name: [_sample(c) for c in some[:limit]] for name, some in captions.load().items()}
    texts = [p["text"] for s in parts["train"] for m in s.record["messages"] for p in m["content"] if "text" in p]
    processor = tiny.build_processor(texts)
    return Task(
        name="captions",
        source="easy-VQA drawings; the captions are ours, from its questions and pixels by templates",
        **{name: Samples(some, processor) for name, some in parts.items()},
        classes=(len(captions.COLOURS), len(captions.SHAPES), 2, 2),
        build=lambda seed: tiny.build_model(processor, seed=seed),
        see=_see,
        encoder=_encoder,
        pixels="pixel_values",
        settings=settings or Settings(),
    )


def _sample(caption: captions.Caption) -> Sample:
    """Its facts are the grounded words, each once."""
    told = [word for word, is_grounded in zip(caption.words, caption.grounded, strict=True) if is_grounded]
    kinds = (captions.COLOURS, captions.SHAPES, SIDES[:2], SIDES[2:])
    facts = tuple(next(kind.index(word) for word in told if word in kind) for kind in kinds)
    return Sample(caption.record(), caption.grounded, facts)


def _encoder(model: Any) -> nn.Module:
    encoder: nn.Module = model.model.vision_tower
    return encoder


def _see(encoder: Any, batch: Batch) -> Tensor:
    """Patches, averaged; the class token, which the model leaves out, stays out."""
    states: Tensor = encoder(batch["pixel_values"]).last_hidden_state
    return states[:, 1:].mean(1)
