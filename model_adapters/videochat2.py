"""VideoChat2 on Mistral, Phi and Vicuna (its authors' code, not in transformers): it gets strings and embeds them.

Its forward ends in `self.mistral_model(inputs_embeds=..., attention_mask=..., labels=...)` (`phi_model`,
`llama_model`): that call is what is gated. It brings no ids, so they are read back off the embeddings; 96 positions
between the video tags, in high definition as many for each tile, hold what the Q-Former made and match no row of the
table. Position 0 holds a constant that is no row either, in high definition the first token itself; it is text. The
video is an argument of the outer call, in high definition a list, of tensors of their own sizes or, for a batch of text
alone, of one number each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model_adapters import conventional, visual
from model_adapters.base import Batch, Layout, ModelAdapter
from model_adapters.errors import AdapterError

_LANGUAGE_MODELS = ("mistral_model", "phi_model", "llama_model")


def _causal_lm(model: nn.Module) -> Any:
    outer = conventional.unwrap(model)
    found = next((module for name in _LANGUAGE_MODELS if (module := getattr(outer, name, None)) is not None), None)
    if found is None:
        raise AdapterError(f"{type(outer).__name__} has none of {', '.join(_LANGUAGE_MODELS)}")
    return conventional.unwrap(found)


def _layout(model: nn.Module, batch: Batch) -> Layout:
    embeds, labels = batch.get("inputs_embeds"), batch.get("labels")
    if embeds is None or labels is None:
        raise AdapterError("VideoChat2's language model was called without inputs_embeds or labels")
    inner = _causal_lm(model)
    fields: dict[str, Any] = conventional.layout(inner, batch)
    valid, visual = fields["valid"], fields["visual"]
    first = visual & (valid.cumsum(1) == 1)
    config: Any = inner.config
    fields["input_ids"] = torch.where(first, config.bos_token_id or 0, fields["input_ids"])
    return Layout(**fields | {"visual": visual & ~first})


VIDEOCHAT2 = ModelAdapter(
    serves=("VideoChat2_it_mistral", "VideoChat2_it_hd_mistral", "VideoChat2_it_phi", "VideoChat2_it_vicuna"),
    causal_lm=_causal_lm,
    decoder=lambda model: conventional.decoder(_causal_lm(model)),
    embeddings=lambda model: _causal_lm(model).get_input_embeddings(),
    head=lambda model: conventional.head(_causal_lm(model)),
    layout=_layout,
    position_ids=lambda model, batch: batch.get("position_ids"),
    visual_inputs=("image",),
    visual_rows=visual.row_by_row,
)
