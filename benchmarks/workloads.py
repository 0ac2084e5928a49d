"""Samples of V visual, P prompt and A answer tokens, as published systems train on them, and batches of such."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """Tokens per sample."""

    name: str
    visual: int
    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.visual + self.prompt + self.answer

    def __str__(self) -> str:
        return f"{self.visual}/{self.prompt}/{self.answer}"


WORKLOADS = [
    Workload("video question answering (VideoLLaMA2)", 1352, 60, 110),
    Workload("video captions (VideoLLaMA2)", 1352, 30, 300),
    Workload("video question answering (VideoChat2)", 96, 60, 100),
    Workload("video captions (VideoChat2)", 96, 60, 400),
    Workload("image captions (LLaVA)", 576, 60, 300),
    Workload("video (InternVL)", 2048, 60, 100),
    Workload("long answers, no image", 0, 100, 900),
]


def batch(workload: Workload, rows: int, vocabulary: int, *, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Rows of random ids, right-padded; answers are between half as long and as long as the workload's.

    The vision encoder is left out: its tokens stand as unlabelled ids, and what is timed is the language model.
    """
    random = torch.Generator().manual_seed(seed)
    shares = 0.5 + 0.5 * torch.rand(rows, generator=random)
    shares[0] = 1.0
    lengths = workload.total - workload.answer + (workload.answer * shares).long()
    ids = torch.randint(3, vocabulary, (rows, workload.total), generator=random)
    position = torch.arange(workload.total)
    valid = position < lengths[:, None]
    answer = valid & (position >= workload.total - workload.answer)
    found = {"input_ids": ids, "attention_mask": valid.long(), "labels": torch.where(answer, ids, -100)}
    return {name: x.to(device) for name, x in found.items()}
