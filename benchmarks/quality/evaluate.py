"""What a model knows of held-out samples, word by word and running free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.tasks import Batch, Samples, arguments

Change = Callable[[Batch], Batch]


@torch.no_grad()
def evaluate(model: Any, samples: Samples, *, change: Change | None = None) -> dict[str, float]:
    """Teacher-forced: the loss, and the accuracy on grounded words and on the others."""
    training = model.training
    model.eval()
    loss, counts, hits = 0.0, [0, 0], [0, 0]
    for batch in samples.batches(100):
        batch = change(batch) if change else batch
        logits = model(**arguments(batch)).logits[:, :-1].float()
        labels, grounded = batch["labels"][:, 1:], batch["grounded"][:, 1:]
        supervised = labels != -100
        loss += float(torch.nn.functional.cross_entropy(logits[supervised], labels[supervised], reduction="sum"))
        right = logits.argmax(-1) == labels
        for kind, chosen in enumerate((supervised & ~grounded, supervised & grounded)):
            counts[kind] += int(chosen.sum())
            hits[kind] += int((right & chosen).sum())
    model.train(training)
    return {"loss": loss / sum(counts), "grounded": hits[1] / counts[1], "other": hits[0] / counts[0]}


@torch.no_grad()
def free_running(model: Any, samples: Samples) -> float:
    """The share of greedily generated answers that equal the sample's, word for word.

    Prompts are as long as each other. After its end an answer is padding, in what is generated, too.
    """
    training = model.training
    model.eval()
    right = 0
    for batch in samples.batches(50):
        call = arguments(batch)
        labels = call.pop("labels")
        first = int((labels[0] != -100).nonzero()[0])
        target = torch.where(labels == -100, samples.processor.tokenizer.pad_token_id, labels)[:, first:]
        call = {name: x[:, :first] if x.shape == labels.shape else x for name, x in call.items()}
        told = model.generate(**call, max_new_tokens=target.shape[1], do_sample=False)[:, first:]
        same = target[:, : told.shape[1]] == told  # it stops early only where every row has ended
        right += int(same.all(1).sum())
    model.train(training)
    return right / len(samples)


def with_blank(pixels: str) -> Change:
    """Every sample sees the mean of the batch's visual inputs: nothing of its own."""

    def change(batch: Batch) -> Batch:
        seen = _per_sample(batch, pixels)
        return batch | {pixels: seen.mean(0, keepdim=True).expand_as(seen).reshape(batch[pixels].shape).contiguous()}

    return change


def with_shuffled(pixels: str) -> Change:
    """Every sample sees its neighbour's visual input."""

    def change(batch: Batch) -> Batch:
        return batch | {pixels: _per_sample(batch, pixels).roll(1, 0).reshape(batch[pixels].shape)}

    return change


def _per_sample(batch: Batch, pixels: str) -> Tensor:
    """[B, ...]; a sample's visual input may be several rows."""
    return batch[pixels].reshape(len(batch["labels"]), -1, *batch[pixels].shape[1:])
