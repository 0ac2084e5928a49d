"""Drawings: easy-VQA captions with the demo's LLaVA. 17 visual positions, answers of some thirty words."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.quality.tasks import Sample, Samples, Settings, Task
from examples.demo import captions, tiny

_LARGE = Settings(lr=3e-4, lr_warmup=20)


def large(*, settings: Settings | None = None, limit: int | None = None) -> Task:
    """The same with a language model of SmolLM2-135M's depth and width, for a GPU."""
    small = task(settings=settings or _LARGE, limit=limit)
    processor = small.train.processor
    return replace(
        small, name="captions-large", build=lambda seed: tiny.build_model(processor, width=576, layers=30, seed=seed)
    )


def task(*, settings: Settings | None = None, limit: int | None = None) -> Task:
    """With at most `limit` samples in each part."""
    parts = {
        name: [Sample(c.record(), c.grounded, c.facts) for c in some[:limit]] for name, some in captions.load().items()
    }
    texts = [p["text"] for s in parts["train"] for m in s.record["messages"] for p in m["content"] if "text" in p]
    processor = tiny.build_processor(texts)
    return Task(
        name="captions",
        source="easy-VQA drawings; the captions are ours, from its questions and pixels by templates",
        **{name: Samples(some, processor) for name, some in parts.items()},
        classes=captions.CLASSES,
        build=lambda seed: tiny.build_model(processor, seed=seed),
        see=tiny.see,
        encoder=tiny.encoder_of,
        pixels="pixel_values",
        settings=settings or Settings(),
    )
