"""The defaults of `ModelAdapter`: what Hugging Face multimodal models agree on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model_adapters.embedded import read_off
from model_adapters.errors import AdapterError
from model_adapters.flash import is_boundaries
from model_adapters.signatures import signature

_HIDDEN = -1e3  # a mask that is added to scores is below where it hides a key

_LAYER_LISTS = ("layers", "h", "blocks", "block", "layer")
_VISUAL_IDS = {
    "image": ("image_token_id", "image_token_index", "image_patch_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
_VISUAL_MASKS = ("image_embeds_position_mask",)  # of batches whose model has no such id


def unwrap(model: Any) -> Any:
    """Inside `torch.compile`, DataParallel-like and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model


def missing_conventions(model: nn.Module) -> list[str]:
    """The methods of Hugging Face's language models that it lacks."""
    return [
        name for name in ("get_decoder", "get_input_embeddings", "get_output_embeddings") if not hasattr(model, name)
    ]


def language_model(model: nn.Module) -> Any:
    """The model itself, unwrapped; or, where it is someone's own encoder and projector around one, that one.

    Own is what lacks the conventions, or has no ids for visual tokens and holds one causal language model.
    """
    inner = unwrap(model)
    own = type(inner).__module__.split(".")[0] != "transformers" and not _ids_of_config(inner)
    if not (own or missing_conventions(inner)):
        return inner
    held: list[nn.Module] = []
    for module in inner.modules():
        inside = any(module in list(other.modules()) for other in held)
        if module is not inner and not inside and not missing_conventions(module) and _takes_labels(unwrap(module)):
            held.append(module)
    return unwrap(held[0]) if len(held) == 1 else inner


def _takes_labels(module: nn.Module) -> bool:
    return "labels" in signature(module).parameters


def causal_lm(model: nn.Module) -> nn.Module:
    """`language_model`, if it is trained as one.

    Raises:
        AdapterError: it is no causal language model: an encoder-decoder, or not trained on labels.
    """
    inner = language_model(model)
    name, config = type(inner).__name__, getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(
            f"{name} is an encoder-decoder: its visual tokens go to the encoder and its decoder reads answers alone, "
            "so there is no shared sequence to leave positions out of"
        )
    if not _takes_labels(inner):
        raise AdapterError(
            f"{name} is not trained as a language model: its forward takes no labels, so there are no answer tokens "
            "to choose from; register an adapter whose `causal_lm` returns the module that takes them"
        )
    return inner


def decoder(model: nn.Module) -> nn.Module:
    """`get_decoder()`, then down to the module that owns the list of layers.

    Raises:
        AdapterError: no such module.
    """
    start: Any = causal_lm(model)
    found = start.get_decoder() if hasattr(start, "get_decoder") else start
    queue = [found]
    while queue:
        module = queue.pop(0)
        if any(isinstance(getattr(module, name, None), nn.ModuleList) for name in _LAYER_LISTS):
            return module
        queue.extend(module.children())
    raise AdapterError(
        f"no module with a list of layers (searched {', '.join(_LAYER_LISTS)}) below {type(found).__name__} of "
        f"{type(start).__name__}; register an adapter whose `decoder` returns it"
    )


def way_to(model: nn.Module, inner: nn.Module) -> list[nn.Module]:
    """The modules that hold `inner`, the outermost first, and itself at the end; none where `model` does not."""
    names = next((name.split(".") if name else [] for name, part in model.named_modules() if part is inner), None)
    return [] if names is None else [model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]


def embeddings(model: nn.Module) -> nn.Module:
    """`get_input_embeddings()`."""
    return language_model(model).get_input_embeddings()


class CappedHead(nn.Module):
    """An output projection with the logit scale or soft cap that the model applies outside it."""

    def __init__(self, projection: nn.Module, *, scale: float = 1.0, cap: float | None = None) -> None:
        super().__init__()
        self.projection, self.scale, self.cap = projection, scale, cap

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = self.projection(hidden_states) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def head(model: nn.Module) -> nn.Module:
    """`get_output_embeddings()`, with the soft cap and scale that the text config names."""
    inner = language_model(model)
    parts: Iterator[Any] = (m for m in inner.modules() if hasattr(m, "get_output_embeddings"))
    projection = next((p for m in parts if (p := m.get_output_embeddings()) is not None), None)
    if projection is None:
        raise AdapterError(
            f"{type(inner).__name__} has no output embeddings; register an adapter whose `head` returns the "
            "module that maps hidden states to logits"
        )
    config = text_config(inner)
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    return projection if cap is None and scale == 1.0 else CappedHead(projection, scale=scale, cap=cap)


def text_config(model: nn.Module) -> Any:
    """The config of the text model inside a composite config."""
    config: Any = getattr(model, "config", None) or getattr(language_model(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def pad_id(model: nn.Module) -> int | None:
    """The id with which rows are filled up, as the config says."""
    configs = (text_config(model), getattr(model, "config", None))
    told = (getattr(config, "pad_token_id", None) for config in configs)
    return next((i for i in told if isinstance(i, int)), None)


def visual_ids(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Ids that stand for features in `input_ids`, by kind: image, video, audio. Kinds that have none are left out."""
    return _ids_of_config(unwrap(model)) or _ids_of_config(language_model(model))


def _ids_of_config(inner: nn.Module) -> dict[str, tuple[int, ...]]:
    config = getattr(inner, "config", None)
    found = {kind: {getattr(config, name, None) for name in names} for kind, names in _VISUAL_IDS.items()}
    found["image"].add(getattr(inner, "img_context_token_id", None))  # InternVL's own code
    whole = {kind: tuple(i for i in ids if isinstance(i, int)) for kind, ids in found.items()}
    return {kind: ids for kind, ids in whole.items() if ids}


def layout(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """For calls with one id or one embedding per decoder position.

    Without `input_ids` they are read back off `inputs_embeds`; what matches no row of the embedding table is visual.

    Raises:
        AdapterError: the batch has neither `input_ids` nor `inputs_embeds`, or no `labels`; or a mask of another shape.
    """
    embeds: Any = batch.get("inputs_embeds")
    input_ids, labels = batch.get("input_ids"), batch.get("labels")
    if labels is None or (input_ids is None and embeds is None):
        missing = (["input_ids"] if input_ids is None else []) + (["labels"] if labels is None else [])
        raise AdapterError(
            f"{type(unwrap(model)).__name__} was called without {' and '.join(missing)}; register an adapter "
            "whose `layout` reads this batch"
        )
    if input_ids is None:
        table = embeddings(model)
        input_ids = read_off(embeds, labels, table, rows_of(table))
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not is_boundaries(mask, input_ids.shape):
        valid = _fitting(mask, input_ids.shape).bool()
    elif (square := square_mask(batch, input_ids.shape[1])) is not None:
        valid = sees(square, torch.arange(input_ids.shape[1], device=square.device).expand(input_ids.shape))
    else:
        valid = torch.ones_like(input_ids, dtype=torch.bool)
    visual = input_ids < 0
    for i in {i for of_kind in visual_ids(model).values() for i in of_kind}:
        visual |= input_ids == i
    for name in _VISUAL_MASKS:
        if isinstance(batch.get(name), Tensor) and batch[name].shape == visual.shape:
            visual = visual | batch[name].bool()
    return {"input_ids": input_ids.clamp(min=0), "labels": labels, "valid": valid, "visual": visual & valid}


def _fitting(mask: Tensor, shape: torch.Size) -> Tensor:
    if mask.shape != shape:
        raise AdapterError(
            f"attention_mask is {list(mask.shape)}, but the batch has {list(shape)} positions; give one entry each, or "
            "no mask where nothing is padding"
        )
    return mask


def square_mask(batch: Mapping[str, Any], length: int) -> Tensor | None:
    """The attention mask [B or 1, H or 1, S, S] of a call that brings one, or, by kind of layer, several."""
    given = batch.get("attention_mask")
    masks = given.values() if isinstance(given, Mapping) else (given,)
    square = (length, length)
    return next((m for m in masks if isinstance(m, Tensor) and m.dim() == 4 and m.shape[-2:] == square), None)


def sees(mask: Tensor, places: Tensor) -> Tensor:
    """Whether each position sees the one that `places` [B, S] says for it, bool [B, S].

    Args:
        mask: [B or 1, H or 1, S, S], which says no by False or, added to scores, by a number far below any score.
    """
    told = mask[:, 0].expand(len(places), -1, -1).gather(2, places[..., None])[..., 0]
    return told > _HIDDEN if told.is_floating_point() else told.bool()


def rows_of(table: nn.Module) -> int:
    """V: how many ids an embedding module has."""
    known = getattr(table, "num_embeddings", None) or max(p.shape[0] for p in table.parameters() if p.dim() == 2)
    return int(known)


def position_ids(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The positions the batch brings, or those of multimodal rotary embeddings, or None."""
    if batch.get("position_ids") is not None:
        return batch["position_ids"]
    inner: Any = getattr(language_model(model), "model", None)
    compute = getattr(inner, "compute_3d_position_ids", None)
    if compute is None:
        return None
    parameters = inspect.signature(compute).parameters.values()
    arguments = {p.name: batch.get(p.name) for p in parameters if p.name in batch or p.default is p.empty}
    before = inner.rope_deltas
    try:
        return compute(**arguments)
    finally:
        inner.rope_deltas = before  # generation state of the model, not ours to change


def has_planes(model: nn.Module) -> bool:
    """Are its positions [n, B, S], in time, height and width (multimodal rotary embeddings)?"""
    inner = getattr(language_model(model), "model", None)
    told = getattr(text_config(model), "rope_parameters", None) or {}
    return hasattr(inner, "compute_3d_position_ids") or "mrope_section" in told


def run_decoder(
    decoder: nn.Module,
    embeddings: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
) -> Tensor:
    """Final hidden states [B, S, D] of a decoder that takes the usual keywords."""
    return decoder(
        inputs_embeds=embeddings(input_ids), attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    )[0]


def run_decoder_on_ids(
    decoder: nn.Module,
    embeddings: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
) -> Tensor:
    """The same for a decoder that makes more of the ids than embeddings (per-layer inputs)."""
    return decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)[0]
