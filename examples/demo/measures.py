"""What is measured of a trained model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import regate
from examples.conversations import collate
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
    """Share of free-running captions that equal the reference word for word: of each sample its first answer."""
    model.eval()
    together = defaultdict(list)  # by where the answer begins, so that no prompt is padded
    for i in range(min(samples, len(task.test.samples))):
        first, answer = _first_answer(task.test.samples[i]["labels"][0])
        together[first].append((task.test.samples[i], answer))
    right = 0
    for first, members in together.items():
        for some in (members[i : i + 25] for i in range(0, len(members), 25)):
            whole = collate([row for row, _ in some], task.processor.tokenizer.pad_token_id)
            shape = whole.pop("labels").shape
            prompts = {k: (v[:, :first] if v.shape == shape else v).to(task.device) for k, v in whole.items()}
            longest = max(len(answer) for _, answer in some)
            told = model.generate(**prompts, max_new_tokens=longest, do_sample=False)[:, first:].cpu()
            right += sum(told[i, : len(a)].tolist() == a for i, (_, a) in enumerate(some))
    model.train()
    return right / min(samples, len(task.test.samples))


def _first_answer(labels: Tensor) -> tuple[int, list[int]]:
    """Of a row's labels [S]: where the first run of them begins, and what it says."""
    supervised = (labels != -100).tolist()
    first = supervised.index(True)
    end = supervised.index(False, first) if False in supervised[first:] else len(supervised)
    return first, labels[first:end].tolist()


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
