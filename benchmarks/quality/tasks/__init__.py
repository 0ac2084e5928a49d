"""What is trained on: samples whose words are known to need the visual input or not, and a small model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.conversations import collate, encode

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """A visual input and its answer.

    Attributes:
        record: as `examples.conversations` takes it.
        grounded: for each word of the answer, whether only the visual input tells it.
        facts: what the visual input shows, a class for each of `Task.classes`, once or several times; the encoder is
            pretrained on it.
    """

    record: dict[str, Any]
    grounded: tuple[bool, ...]
    facts: tuple[int, ...]


class Samples(Dataset[Batch]):
    """Encoded samples; each is encoded once and kept.

    Args:
        samples: words are tokens.
        processor: has a chat template.
        encode: a record into the arguments of a model's call.
        device: where batches are.
    """

    def __init__(
        self, samples: list[Sample], processor: Any, encode: Callable[..., Batch] = encode, *, device: str = "cpu"
    ) -> None:
        self.samples, self.processor, self.encode, self.device = samples, processor, encode, device
        self._encoded: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Batch:
        if i not in self._encoded:
            sample = self.samples[i]
            encoded = self.encode(sample.record, self.processor)
            grounded = torch.zeros_like(encoded["labels"], dtype=torch.bool)
            grounded[encoded["labels"] != -100] = torch.tensor([*sample.grounded, False])  # False: the end token
            self._encoded[i] = encoded | {"grounded": grounded, "facts": torch.tensor([sample.facts])}
        return self._encoded[i]

    def without_images(self) -> Samples:
        """The same conversations in words alone."""
        samples = []
        for sample in self.samples:
            messages = [
                {**m, "content": [part for part in m["content"] if part["type"] == "text"]}
                for m in sample.record["messages"]
            ]
            samples.append(Sample({"messages": messages, "images": []}, sample.grounded, sample.facts))
        return Samples(samples, self.processor, self.encode, device=self.device)

    def on(self, device: str) -> Samples:
        """The same with batches there."""
        return Samples(self.samples, self.processor, self.encode, device=device)

    def first(self, n: int) -> Samples:
        """The first `n`; what was encoded stays so."""
        some = Samples(self.samples[:n], self.processor, self.encode, device=self.device)
        some._encoded = self._encoded
        return some

    def mixed_up(self, share: float, seed: int) -> Samples:
        """The same, but a share of them, drawn by `seed`, with the text of another one of these."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        some = order[: round(share * len(self))].tolist()
        samples = list(self.samples)
        for i, j in zip(some, some[1:] + some[:1], strict=True):
            own, other = self.samples[i], self.samples[j]
            record = {"messages": other.record["messages"], "images": own.record["images"]}
            samples[i] = Sample(record, other.grounded, own.facts)
        return Samples(samples, self.processor, self.encode, device=self.device) if some else self

    def batches(self, size: int, *, seed: int | None = None) -> Batches:
        """In batches; shuffled by `seed` if there is one."""
        join = partial(collate, pad_id=self.processor.tokenizer.pad_token_id)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        loader = DataLoader(self, size, shuffle=seed is not None, generator=generator, collate_fn=join)
        return Batches(loader, self.device)


@dataclass(frozen=True)
class Batches:
    """Of a loader, on a device."""

    loader: DataLoader[Batch]
    device: str

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield {name: x.to(self.device) for name, x in batch.items()}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is trained.

    Attributes:
        steps, batch_size, lr: of a run; the rate falls linearly to 0, after it rose over `lr_warmup` steps.
        schedule: of `regate.Config`.
        vision_steps, vision_batch_size: of the encoder's pretraining.
        text_steps: of the language model's, with batches of `vision_batch_size`.
        link_steps: of the whole model's on `Task.link`.
        starts: pretrained models, which seeds take in turn; 0 is one for each seed.
        evaluations: of the validation samples, evenly spread over a run.
        few: validation samples that are looked at while training.
        free: captions that are generated in the end.
        grounded_share: of the loss that grounded words have in the re-weighted arm.
    """

    steps: int = 400
    batch_size: int = 32
    lr: float = 1e-3
    lr_warmup: int = 0
    schedule: dict[str, int] = field(default_factory=lambda: {"warmup": 40, "cycle": 32, "full_steps": 4})
    vision_steps: int = 500
    vision_batch_size: int = 64
    text_steps: int = 120
    link_steps: int = 0
    starts: int = 0
    evaluations: int = 8
    few: int = 200
    free: int = 100
    grounded_share: float = 0.25

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0), over `lr`."""
        return min(1 - step / self.steps, (step + 1) / (self.lr_warmup + 1))


@dataclass(frozen=True)
class Task:
    """Data, and a model that starts from nothing.

    Attributes:
        name: of its results.
        source: where the data is from, in words.
        link: what a model is taught before that it may use what it sees; None: nothing.
        train, validation, test: choices are made on validation, test is looked at once.
        classes: of each fact that the encoder is pretrained to see.
        build: a model, from a seed.
        see: what the encoder makes of a batch, [B, D], or [n * B, D] where a sample has n sets of facts.
        encoder: the part of a model that is pretrained to see.
        pixels: the name of the visual input in a batch.
        settings: see there.
        per_frame: visual tokens of a frame, of clips.
    """

    name: str
    source: str
    train: Samples
    validation: Samples
    test: Samples
    classes: tuple[int, ...]
    build: Callable[[int], Any]
    see: Callable[[Any, Batch], Tensor]
    encoder: Callable[[Any], torch.nn.Module]
    pixels: str
    settings: Settings
    link: Samples | None = None
    per_frame: int | None = None

    @property
    def device(self) -> str:
        """Where it is trained."""
        return self.train.device

    def on(self, device: str) -> Task:
        """The same there."""
        samples = {name: getattr(self, name) for name in ("train", "validation", "test", "link")}
        moved = {name: some if some is None else some.on(device) for name, some in samples.items()}
        return replace(self, build=lambda seed: self.build(seed).to(device), **moved)


def arguments(batch: Batch) -> Batch:
    """What the model is called with; the rest of a batch is about it."""
    return {name: x for name, x in batch.items() if name not in ("grounded", "facts")}
