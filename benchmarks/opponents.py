"""Dense training as a careful user has it today: the arms that are to be beaten.

Rows are laid end to end (trainers call it padding-free) and kept apart by a kernel, so that no padding is computed; and
logits are made where there are labels alone, a chunk at a time, as TRL's SFTTrainer does by default. Every position
and every label is computed, and the loss and its gradients are those of the padded model. Nothing here is ReGATE's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.models import causal_lm
from regate.labels import IGNORED

KERNEL = "benchmarks_end_to_end"
_LOGITS = 2**27  # that exist at once: 512 MB in float32
_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11

Batch = dict[str, Any]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    starts: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of rows laid end to end, as transformers calls one.

    In half precision on CUDA one flash kernel for all rows; elsewhere `scaled_dot_product_attention`, row by row.

    Args:
        query: [1, H, T, D].
        key, value: [1, G, T, D].
        starts: [N + 1] int32, where rows begin, and T.
        lengths: of the N rows, for the host.

    Returns:
        [1, T, H, D], and no weights.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        parts = [
            F.scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=grouped)
            for row in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None
    options: dict[str, Any] = {"enable_gqa": True} if grouped and _TAKES_GROUPS else {}
    if grouped and not _TAKES_GROUPS:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = max(lengths)
    output = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), **options)
    assert isinstance(output, Tensor)
    return output[None], None


AttentionInterface.register(KERNEL, attend)


def laid(batch: Batch) -> Batch:
    """A right-padded batch in one row without padding; no row's last position predicts the next one's first token."""
    valid = batch["attention_mask"].bool()
    lengths = valid.sum(1)
    position = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    labels = torch.where(position == 0, IGNORED, batch["labels"])
    return {
        "input_ids": batch["input_ids"][valid][None],
        "position_ids": position[valid][None],
        "labels": labels[valid][None],
        "starts": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "lengths": tuple(lengths.tolist()),
    }


def labelled(batch: Batch) -> Batch:
    """With the places of labels instead of labels: `at` [N], what predicts them in the rows' order, and `targets`."""
    others = {name: x for name, x in batch.items() if name != "labels"}
    labels = batch["labels"]
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return others | {"at": row * labels.shape[1] + column, "targets": labels[row, column + 1]}


class AtLabels(nn.Module):
    """A causal language model whose logits are made at labels alone; takes `labelled` batches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = causal_lm(model)

    def forward(self, input_ids: Tensor, at: Tensor, targets: Tensor, **others: Any) -> CausalLMOutputWithPast:
        embeddings = self.inner.get_input_embeddings()(input_ids)
        hidden = self.inner.model(inputs_embeds=embeddings, **others).last_hidden_state
        weight = self.inner.lm_head.weight
        total = _Losses.apply(hidden.flatten(0, 1)[at], weight, targets, max(_LOGITS // len(weight), 1))
        return CausalLMOutputWithPast(loss=total / len(targets))


class _Losses(torch.autograd.Function):
    """The sum of cross-entropies; gradients are made with the losses, so that each logit is computed once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """Of `hidden` [N, D], `weight` [V, D] and `targets` [N], so many rows of logits at a time."""
        losses, by_rows = [], []
        # Over several chunks the sum is kept in float32: bfloat16 would lose what they add.
        wide = torch.float32 if len(targets) > chunk and weight.element_size() < 4 else weight.dtype
        by_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows, of_rows in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logs = F.log_softmax((rows @ weight.T).float(), -1)
            losses.append(-logs.gather(1, of_rows[:, None]).sum())
            by_logits = logs.exp_()
            by_logits.scatter_add_(1, of_rows[:, None], -torch.ones_like(by_logits[:, :1]))
            by_logits = by_logits.to(rows.dtype)
            by_rows.append(by_logits @ weight)
            if by_weight is not None:
                by_weight += by_logits.T @ rows
        ctx.save_for_backward(torch.cat(by_rows), None if by_weight is None else by_weight.to(weight.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        by_hidden, by_weight = ctx.saved_tensors
        scale = gradient.to(by_hidden.dtype)
        return by_hidden * scale, None if by_weight is None else by_weight * scale, None, None


class Once:
    """What a data loader's workers do, whose time is no step's: each batch is collated once."""

    def __init__(self, *collate: Callable[[Batch], Batch]) -> None:
        self.collate = collate
        self.done: dict[int, tuple[Batch, Batch]] = {}

    def __call__(self, batch: Batch) -> Batch:
        if id(batch) not in self.done:
            made = batch
            for function in self.collate:
                made = function(made)
            self.done[id(batch)] = batch, made  # the batch is held, so that its id stays its own
        return self.done[id(batch)][1]
