"""VideoLLaMA2 (its authors' code, not in transformers): one negative id stands for a whole image or video.

`prepare_inputs_labels_for_multimodal` turns each such id into a run of visual positions (676 to 1521 of them), and
returns embeddings, mask and labels of the expanded sequence. The layout calls it, once, and the model's forward is
then called with what it returned, so that labels and decoder positions are the same thing. `images` is a list of pairs
of pixels and modality, one for each such id, and a dummy for each row that has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import conventional
from model_adapters.base import Batch, Layout, ModelAdapter
from model_adapters.errors import AdapterError


def _layout(model: nn.Module, batch: Batch) -> Layout:
    inner, ids = conventional.unwrap(model), batch.get("input_ids")
    if batch.get("inputs_embeds") is not None or ids is None or batch.get("images") is None:
        fields: dict[str, Any] = dict(conventional.layout(model, batch))
        return Layout(**fields)
    mask = batch.get("attention_mask")
    given = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    _, expanded_mask, cache, embeds, labels = inner.prepare_inputs_labels_for_multimodal(
        ids, given, batch.get("past_key_values"), batch.get("labels"), batch.get("images")
    )
    valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=ids.device)
    if expanded_mask is not None:
        valid = expanded_mask.bool()
    rows = [_expand(row[keep], present) for row, keep, present in zip(ids, given, valid, strict=True)]
    input_ids, visual = (torch.stack(part) for part in zip(*rows, strict=True))
    call = dict(batch) | {
        "input_ids": None, "images": None, "inputs_embeds": embeds, "attention_mask": valid, "labels": labels,
        "past_key_values": cache,
    }  # fmt: skip
    items = tuple(((ids < 0) & given).sum(1).tolist())
    return Layout(input_ids=input_ids, labels=labels, valid=valid, visual=visual, call=call, items=items)


def _expand(ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """One row: (ids [S], visual [S]) of the expanded sequence whose valid positions are `valid` [S].

    Args:
        ids: the row's own ids, padding left out; negative where an image or a video stands.
    """
    places = ids < 0
    runs, length = int(places.sum()), int(valid.sum())
    positions = length - int((~places).sum())
    if positions < runs or (runs and positions % runs):
        raise AdapterError(
            f"a row with {len(ids) - runs} text tokens and {runs} visual placeholders became {length} positions, so "
            f"{positions} of them would have to be visual, which is no whole number for each placeholder; rows that "
            "were cut at the model's maximum length, or that mix images and videos of different lengths, cannot be "
            "followed: shorten the text, or train on one kind of visual input in a row"
        )
    repeats = torch.where(places, positions // runs if runs else 1, 1)
    expanded = torch.zeros(len(valid), dtype=ids.dtype, device=ids.device)
    visual = torch.zeros_like(valid)
    expanded[valid] = ids.clamp(min=0).repeat_interleave(repeats)
    visual[valid] = places.repeat_interleave(repeats)
    return expanded, visual


VIDEOLLAMA2 = ModelAdapter(
    serves=tuple(
        f"Videollama2{name}ForCausalLM" for name in ("Qwen2", "Mistral", "Mixtral", "Gemma2", "Llama", "Phi3")
    ),
    decoder=lambda model: conventional.unwrap(model).get_model(),
    embeddings=lambda model: conventional.unwrap(model).get_model().embed_tokens,
    layout=_layout,
    visual_inputs=("images",),
)
