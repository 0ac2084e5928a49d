"""InternVL's own `InternVLChatModel` (not in transformers): the loss is computed outside the language model, weighted.

Ids are expanded already, 256 `<IMG_CONTEXT>` a tile. `loss_weight` (one over the square root of the answer's length)
weighs every label, and the sum is divided by the weights' sum: elided labels must weigh nothing.

Packed rows (`use_packed_ds`) are told by boundaries, `cu_seqlens` [1, n + 1] or the same in the place of the attention
mask, to attention that was patched to call flash attention's functions by itself: see `flash.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import conventional
from model_adapters.base import Batch, Layout, ModelAdapter
from model_adapters.errors import AdapterError


def _language_model(model: nn.Module) -> Any:
    return conventional.unwrap(conventional.unwrap(model).language_model)


def _layout(model: nn.Module, batch: Batch) -> Layout:
    context = getattr(conventional.unwrap(model), "img_context_token_id", None)
    if context is None:
        raise AdapterError(
            "InternVLChatModel.img_context_token_id is not set, so visual positions cannot be told from text; set it "
            "to the tokenizer's id of <IMG_CONTEXT> before training"
        )
    fields: dict[str, Any] = dict(conventional.layout(model, batch))
    fields["visual"] = (batch["input_ids"] == context) & fields["valid"]
    return Layout(**fields)


def _with_labels(model: nn.Module, call: Batch, labels: Tensor) -> dict[str, Any]:
    weights = call.get("loss_weight")
    if weights is None:
        return {"labels": labels}
    if isinstance(weights, Tensor):
        return {"labels": labels, "loss_weight": weights.to(labels.device).masked_fill(labels == -100, 0.0)}
    told = torch.tensor(weights, dtype=torch.float64, device="cpu")  # as Python's numbers are
    kept = told.masked_fill(labels.cpu() == -100, 0.0)
    return {"labels": labels, "loss_weight": kept.tolist()}


INTERNVL_CHAT = ModelAdapter(
    serves=("InternVLChatModel",),
    causal_lm=conventional.unwrap,
    decoder=lambda model: conventional.decoder(_language_model(model)),
    embeddings=lambda model: _language_model(model).get_input_embeddings(),
    head=lambda model: conventional.head(_language_model(model)),
    layout=_layout,
    with_labels=_with_labels,
    position_ids=lambda model, batch: batch.get("position_ids"),
    in_step=True,  # the weights' sum is averaged over ranks
)
