"""Samples of V visual, P prompt and A answer tokens, as published systems train on them, and batches of such."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import described, earlier, write
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


def measured(
    module: str, args: argparse.Namespace, measure: Callable[[str, Sample], dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured of each workload, as it is done and stands in the file.

    Args:
        module: whose command it is.
        args: `out`, the file, which a second run with the same settings goes on with; `only`, V/P/A of the workloads
            that are asked for, or None; all others are settings.
        measure: gives the figures of a title and a sample.

    Yields:
        (V/P/A, figures).
    """
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "only")}
    result: dict[str, Any] = described(module, "torch", "transformers") | {"settings": settings, "workloads": {}}
    done = result["workloads"] = (earlier(args.out, result) or result)["workloads"]
    for title, sample in WORKLOADS.items():
        name = label(sample)
        if name not in done and (args.only is None or name in args.only):
            done[name] = measure(title, sample)
            write(result, args.out)
            yield name, done[name]


def kept_labels(labels: Tensor, keep: float) -> Tensor:
    """Labels that a sparse step keeps in every arm alike, at random: bool [B, S]."""
    scores = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    return keep_highest(scores.to(labels.device), predicted(labels), keep)
