"""GIT (transformers: `models/git`): the model puts image tokens in front of the text itself, without placeholders.

Its decoder sees V + S positions where ids, mask and labels have S, and it takes the logits of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_adapters import conventional
from model_adapters.base import Batch, Layout, ModelAdapter


def _in_front(model: nn.Module, batch: Batch) -> int:
    """V: the number of image positions in front of the text."""
    return _decoder(model).layer[0].attention.self.image_patch_tokens if batch.get("pixel_values") is not None else 0


def _decoder(model: nn.Module) -> Any:
    return conventional.unwrap(model).git.encoder


def _layout(model: nn.Module, batch: Batch) -> Layout:
    text, front = conventional.layout(model, batch), (_in_front(model, batch), 0)
    return Layout(
        input_ids=F.pad(text["input_ids"], front),
        labels=F.pad(text["labels"], front, value=-100),
        valid=F.pad(text["valid"], front, value=True),
        visual=F.pad(text["visual"], front, value=True),
    )


def _with_labels(model: nn.Module, call: Batch, labels: Tensor) -> dict[str, Any]:
    return {"labels": labels[:, _in_front(model, call) :]}


def _run_decoder(
    decoder: Any, embeddings: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None
) -> Tensor:
    front = decoder.layer[0].attention.self.image_patch_tokens
    embeds = F.pad(embeddings(input_ids[:, front:]), (0, 0, front, 0))  # text positions count from the first text token
    length = embeds.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
    hidden = ~(causal & attention_mask[:, None, None, :].bool())
    mask = torch.zeros(hidden.shape, dtype=embeds.dtype, device=embeds.device)
    return decoder(embeds, attention_mask=mask.masked_fill(hidden, torch.finfo(embeds.dtype).min), use_cache=False)[0]


GIT = ModelAdapter(
    serves=("git",),
    decoder=_decoder,
    embeddings=lambda model: conventional.unwrap(model).git.embeddings,
    layout=_layout,
    with_labels=_with_labels,
    position_ids=lambda model, batch: None,
    run_decoder=_run_decoder,
)
