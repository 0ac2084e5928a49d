"""What a model's output says of its losses, in each of the forms that trainers ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regate.errors import LabelsError
from regate.loss import label_losses

# TRL's fused head (trl.trainer.utils.FusedCausalLMOutput): sums of these over labels become its loss and its metrics.
_PER_LABEL = ("log_probs", "entropy", "is_top1")


def get(output: Any, name: str) -> Any:
    """An entry of a model's output, None where it has none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def kept_losses(output: Any, labels: Tensor, kept: Tensor, *, hidden_states: Tensor | None, head: nn.Module) -> Tensor:
    """`-log p(label)` of kept labels, [N] float32 in row-major order.

    From what there is: `logits` [B, S, V]; `log_probs` [B, S-1] of TRL's fused head; or, where a fused loss leaves
    neither (Liger), the decoder's `hidden_states` [B, S, D] through `head`.

    Raises:
        LabelsError: none of them fits `labels` [B, S].
    """
    logits, log_probs = get(output, "logits"), get(output, "log_probs")
    rows, length = labels.shape
    if logits is not None and logits.shape[:2] == labels.shape:
        return label_losses(logits.detach(), labels, kept)
    if log_probs is not None and log_probs.shape == (rows, length - 1):
        return -log_probs.detach()[kept[:, 1:]].float()
    if logits is None and hidden_states is not None and hidden_states.shape[:2] == labels.shape:
        return label_losses(hidden_states.detach(), labels, kept, head=head)
    got = {name: list(x.shape) for name, x in (("logits", logits), ("log_probs", log_probs)) if x is not None}
    raise LabelsError(
        f"difficulties need the model's logits [B, S, V] = [{rows}, {length}, V]; its output has {got or 'none'}"
    )


def rescale(output: Any, candidates: Tensor, kept: Tensor) -> Any:
    """TRL sums `log_probs` itself and divides by its own count of all labels: let the sums stand for all labels.

    Per-label values of kept labels [B, S-1] are multiplied by labels/kept, and `label_mask` says again which labels
    the batch had; then every mean that is taken of them is a mean over kept labels. Other outputs stay as they are.
    """
    if get(output, "log_probs") is None or get(output, "label_mask") is None:
        return output
    share = candidates.sum() / kept.sum()
    for name in _PER_LABEL:
        if (values := get(output, name)) is not None:
            setattr(output, name, values * share)
    output.label_mask = candidates[:, 1:].to(torch.bool)
    return output


def without_logits(output: Any) -> Any:
    """Logits at kept labels alone fit nothing that a caller has: better none."""
    if isinstance(output, dict):
        return type(output)(**{**output, "logits": None})
    output.logits = None
    return output
