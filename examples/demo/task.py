"""What the demo trains: a model and its data, the small ones of its own or a user's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.conversations import Conversations, collate, read
from examples.demo import captions, tiny
from examples.demo.start import learn, learn_to_see

_PRETRAINING_BATCH = 64


@dataclass
class Part:
    """Samples; `told` are their captions where the demo made them."""

    samples: Conversations
    told: list[captions.Caption] | None


@dataclass
class Task:
    """Model and data; what is trained on is never validated or tested on."""

    model: Any
    processor: Any
    train: Part
    validation: Part
    test: Part
    device: torch.device


def load_task(args: Any, seed: int) -> Task:
    """As the command line asks for it; the small model's weights follow `seed`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told: list[list[captions.Caption] | None] = [None, None, None]
    if args.data:
        records = read(args.data)
        n = max(1, min(args.eval_samples, len(records) // 10))
        parts = [records[2 * n :], records[:n], records[n : 2 * n]]
    else:
        data = captions.load()
        made = [data["train"], data["validation"][:200], data["test"][: args.eval_samples]]
        parts = [[c.record() for c in some] for some in made]
        told = [None, None, None] if args.model else list(made)  # words are tokens of the small model's vocabulary
    if args.model:
        processor = transformers.AutoProcessor.from_pretrained(args.model)
        model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
    else:
        contents = [m["content"] for record in parts[0] for m in record["messages"]]
        processor = tiny.build_processor(p["text"] for c in contents for p in c if p["type"] == "text")
        model = tiny.build_model(processor, seed=seed)
    found = (Part(Conversations(part, processor), some) for part, some in zip(parts, told, strict=True))
    return Task(model.to(device), processor, *found, device)


def loader(task: Task, dataset: Dataset[Any], batch_size: int, *, seed: int | None = None) -> DataLoader[Any]:
    join = partial(collate, pad_id=task.processor.tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return DataLoader(dataset, batch_size, shuffle=seed is not None, generator=generator, collate_fn=join)


def endless(batches: DataLoader[Any], device: torch.device) -> Iterator[dict[str, Any]]:
    while True:
        for batch in batches:
            yield {name: x.to(device) for name, x in batch.items()}


class _WithFacts(Dataset[dict[str, Tensor]]):
    """Pictures beside what they show."""

    def __init__(self, samples: Conversations, told: list[captions.Caption]) -> None:
        self.samples, self.told = samples, told

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.samples[i] | {"facts": torch.tensor([self.told[i].facts])}


def pretrain(task: Task, args: Any, seed: int) -> None:
    """The small model's parts: its language model on answers alone, its encoder on what pictures show."""
    torch.manual_seed(seed)
    train, told = task.train.samples, task.train.told
    texts = Conversations([without_images(record) for record in train.records], task.processor)
    batches = endless(loader(task, texts, _PRETRAINING_BATCH, seed=seed), task.device)
    learn(task.model, batches, steps=args.text_steps, lr=args.lr)
    if told is None:
        return
    pictures = endless(loader(task, _WithFacts(train, told), _PRETRAINING_BATCH, seed=seed), task.device)
    encoder, steps = tiny.encoder_of(task.model), args.vision_steps
    learn_to_see(encoder, tiny.see, pictures, captions.CLASSES, steps=steps, lr=args.lr)


def without_images(record: dict[str, Any]) -> dict[str, Any]:
    messages = [{**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in record["messages"]]
    return {"messages": messages, "images": []}
