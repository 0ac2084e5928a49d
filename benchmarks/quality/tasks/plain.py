"""Conversations into tensors without an image processor: placeholders, and pixels as the task draws them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.tasks import Batch
from examples.demo import tiny


@dataclass(frozen=True)
class PlainProcessor:
    """A tokenizer of words, and how many placeholders stand for the visual input, which is a tensor.

    Attributes:
        tokenizer: words separated by blanks; `<image>` is the placeholder.
        placeholders: of a visual input.
        pixels: the name under which the model takes it.
    """

    tokenizer: Any
    placeholders: int
    pixels: str

    @classmethod
    def of(cls, texts: Iterable[str], *, placeholders: int, pixels: str) -> PlainProcessor:
        return cls(tiny.build_processor(texts).tokenizer, placeholders, pixels)


def encode(record: dict[str, Any], processor: PlainProcessor) -> Batch:
    """A question and its answer; labels on the answer and its end."""
    question, answer = (
        " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in record["messages"]
    )
    visual = "<image> " * (processor.placeholders * len(record["images"]))
    prompt = processor.tokenizer(f"user : {visual}{question} assistant :")["input_ids"]
    answer = processor.tokenizer(f"{answer} </s>")["input_ids"]
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return batch | ({processor.pixels: record["images"][0][None]} if record["images"] else {})


def conversation(question: str, answer: list[str], visual: torch.Tensor) -> dict[str, Any]:
    """A record for `encode`."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": " ".join(answer)}]},
    ]
    return {"messages": messages, "images": [visual]}
