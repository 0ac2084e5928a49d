"""What is measured of a trained model."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

import regate
from examples.conversations import encode
from examples.demo.task import Part, Task, loader


@torch.no_grad()
def evaluate(model: Any, task: Task, part: Part) -> dict[str, float]:
    """Teacher-forced: loss, accuracy on grounded and on template words."""
    model.eval()
    hits: dict[bool, list[bool]] = {True: [], False: []}
    loss, count = 0.0, 0
    told = iter(part.told or ())
    for batch in loader(task, part.samples, 100):
        batch = {name: x.to(task.device) for name, x in batch.items()}
        logits = model(**batch).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        supervised = labels != -100
        losses = torch.nn.functional.cross_entropy(logits[supervised], labels[supervised], reduction="none")
        loss += float(losses.sum())
        count += int(supervised.sum())
        right = (logits.argmax(-1) == labels).cpu()
        for row, mask in zip(right, supervised.cpu(), strict=True):
            answer = row[mask].tolist()
            caption = next(told, None)
            grounded = [*caption.grounded, False] if caption else [False] * len(answer)  # False: the end token
            for hit, kind in zip(answer, grounded, strict=True):
                hits[kind].append(hit)
    model.train()
    mean = {kind: sum(values) / len(values) if values else float("nan") for kind, values in hits.items()}
    return {"loss": loss / count, "grounded_accuracy": mean[True], "template_accuracy": mean[False]}


@torch.no_grad()
def exact_match(model: Any, task: Task, samples: int) -> float:
    """Share of free-running captions that equal the reference word for word."""
    model.eval()
    right = 0
    records = task.test.samples.records[:samples]
    for record in records:
        full = encode(record, task.processor)
        length = full["input_ids"].shape
        first = int((full["labels"][0] != -100).nonzero()[0])
        inputs = {k: v.to(task.device) for k, v in full.items() if k != "labels"}
        inputs = {k: v[:, :first] if v.shape == length else v for k, v in inputs.items()}
        target = full["labels"][0, first:].to(task.device)
        output = model.generate(**inputs, max_new_tokens=len(target), do_sample=False)[0, first:]
        right += bool(len(output) == len(target) and torch.equal(output, target))
    model.train()
    return right / len(records)


def coloured(gate: regate.Gate, task: Task, rows: int = 4) -> list[dict[str, Any]]:
    """The first training samples: image, words of the answer, and which a sparse step would keep now."""
    samples = []
    for i in range(min(rows, len(task.train.samples))):
        batch = {name: x.to(task.device) for name, x in task.train.samples[i].items()}
        at = (batch["labels"][0] != -100).nonzero()[:, 0]
        words = [task.processor.tokenizer.decode([token]).strip() for token in batch["labels"][0, at].tolist()]
        images = task.train.samples.records[i]["images"]
        image = images[0] if images else Image.new("RGB", (1, 1), "white")
        kept = gate.choose(batch, full=False)[0, at].tolist()
        samples.append({"image": image, "words": words, "kept": kept})
    return samples
