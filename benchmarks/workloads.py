"""Samples of V visual, P prompt and A answer tokens, as published systems train on them, and batches of such."""

from __future__ import annotations

import torch
from torch import Tensor

from regate.insight.estimate import Sample
from regate.labels import predicted
from regate.scoring.selection import keep_highest

VISUAL_ID = 0  # stands for a visual token

WORKLOADS = {
    "video question answering (VideoLLaMA2)": Sample(1352, 60, 110),
    "video captions (VideoLLaMA2)": Sample(1352, 30, 300),
    "video question answering (VideoChat2)": Sample(96, 60, 100),
    "video captions (VideoChat2)": Sample(96, 60, 400),
    "image captions (LLaVA)": Sample(576, 60, 300),
    "video (InternVL)": Sample(2048, 60, 100),
    "long answers, no image": Sample(0, 100, 900),
}


def label(sample: Sample) -> str:
    """V/P/A."""
    return "/".join(map(str, sample))


def batch(sample: Sample, rows: int, vocabulary: int, *, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Rows of random ids, right-padded; answers are between half as long and as long as the workload's.

    The vision encoder is left out: `VISUAL_ID` stands where its tokens do, and what is timed is the language model.
    """
    random = torch.Generator().manual_seed(seed)
    shares = 0.5 + 0.5 * torch.rand(rows, generator=random)
    shares[0] = 1.0
    lengths = sample.total - sample.answer + (sample.answer * shares).long()
    ids = torch.randint(3, vocabulary, (rows, sample.total), generator=random)
    ids[:, : sample.visual] = VISUAL_ID
    position = torch.arange(sample.total)
    valid = position < lengths[:, None]
    answer = valid & (position >= sample.total - sample.answer)
    found = {"input_ids": ids, "attention_mask": valid.long(), "labels": torch.where(answer, ids, -100)}
    return {name: x.to(device) for name, x in found.items()}


def kept_labels(labels: Tensor, keep: float) -> Tensor:
    """Labels that a sparse step keeps in every arm alike, at random: bool [B, S]."""
    scores = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    return keep_highest(scores.to(labels.device), predicted(labels), keep)
