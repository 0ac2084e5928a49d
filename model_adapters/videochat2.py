"""VideoChat2 on Mistral (its authors' code, not in transformers): the model gets strings and embeds them itself.

Its forward ends in `self.mistral_model(inputs_embeds=..., attention_mask=..., labels=...)`: that call is what is
gated. It brings no ids, so they are read back off the embeddings: a text position holds a row of the embedding
table, bit for bit; 96 positions between the video tags hold what the Q-Former made and match no row. Position 0 holds
a constant that is no row either; it is text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import conventional
from model_adapters.base import Batch, Layout, ModelAdapter
from model_adapters.errors import AdapterError


def _causal_lm(model: nn.Module) -> Any:
    return conventional.unwrap(conventional.unwrap(model).mistral_model)


@torch.no_grad()
def ids_of(embeds: Tensor, table: Tensor) -> Tensor:
    """The ids whose rows of `table` [V, D] stand in `embeds` [B, S, D]; -1 where none does. [B, S] int64.

    Rows are found by one random projection, O((V + B*S) (D + log V)), and then compared in full. Rows of the table
    that are equal give the lowest of their ids.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
        >>> ids_of(torch.tensor([[[3.0, 4.0], [1.0, 2.0], [9.0, 9.0]]]), table).tolist()
        [[1, 0, -1]]
    """
    direction = torch.rand(table.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(table.device)

    def projected(rows: Tensor) -> Tensor:  # summed alone, row by row, so that equal rows give equal numbers
        return torch.cat([(part.double() * direction).sum(-1) for part in rows.split(4096)])

    keys, order = projected(table).sort(stable=True)
    flat = embeds.reshape(-1, embeds.shape[-1])
    place = torch.searchsorted(keys, projected(flat)).clamp(max=len(keys) - 1)
    ids = order[place]
    return torch.where((table[ids] == flat).all(-1), ids, -1).reshape(embeds.shape[:2])


def _layout(model: nn.Module, batch: Batch) -> Layout:
    embeds, labels = batch.get("inputs_embeds"), batch.get("labels")
    if embeds is None or labels is None:
        raise AdapterError("VideoChat2's language model was called without inputs_embeds or labels")
    mask = batch.get("attention_mask")
    valid = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    inner = _causal_lm(model)
    ids = ids_of(embeds, inner.get_input_embeddings().weight.to(embeds.dtype))
    ids = torch.where(labels >= 0, labels, ids)
    config: Any = inner.config
    first = valid & (valid.cumsum(1) == 1) & (ids < 0)
    ids = torch.where(first, config.bos_token_id or 0, ids)
    return Layout(input_ids=ids.clamp(min=0), labels=labels, valid=valid, visual=(ids < 0) & valid)


VIDEOCHAT2 = ModelAdapter(
    serves=("VideoChat2_it_mistral",),
    causal_lm=_causal_lm,
    decoder=lambda model: conventional.decoder(_causal_lm(model)),
    embeddings=lambda model: _causal_lm(model).get_input_embeddings(),
    head=lambda model: conventional.head(_causal_lm(model)),
    layout=_layout,
    position_ids=lambda model, batch: batch.get("position_ids"),
)
