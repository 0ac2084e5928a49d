"""What leaving words out does to the losses of the words that are kept.

On a sparse step a kept word's loss is taken without the elided words before it; at inference all words are there. The
difference is the bias of the difficulties that sparse steps learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import regate
from benchmarks.quality.elision import without_full_turns
from benchmarks.quality.tasks import Batch, arguments


def losses_of_kept(model: Any, gate: regate.Gate, batches: Iterable[Batch]) -> dict[str, float] | None:
    """Mean loss of the labels that the gate keeps on its present step, of samples that are not in their full turn.

    Nothing is learnt of it by the model; the gate's difficulties are.

    Args:
        model: in training mode, gated.
        gate: its.
        batches: of samples that are looked at.

    Returns:
        "sparse", as the step computes it, and "full", with all words before each; None where the step elides nothing.
    """
    sparse = full = 0.0
    labels = 0
    for batch in batches:
        with without_full_turns():
            loss = model(**arguments(batch), use_cache=False).loss
        decision = gate.last
        if decision is None or decision.full:
            return None
        kept = decision.kept[:, 1:].to(loss.device)
        with torch.no_grad():
            logits = model(**arguments(batch), use_cache=False).logits[:, :-1][kept].float()
            full += float(torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][kept], reduction="sum"))
        sparse += float(loss.detach()) * int(kept.sum())
        labels += int(kept.sum())
    return {"sparse": sparse / labels, "full": full / labels}
