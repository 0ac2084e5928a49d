"""Stand-ins for the three systems of the paper: class names and call structure of their authors' code, tiny, ours.

Vision is one linear layer over given features; the language models are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.zoo.common import TEXT

FRAMES, FEATURES = 6, 5
IMAGE_ID, VIDEO_ID = -200, -201


class _Videollama2:
    """Ids -200 and -201 become FRAMES visual positions each. A row without them brings an image that is not shown."""

    config_of: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__(type(self).config_of())  # type: ignore[call-arg]
        self.mm_projector = nn.Linear(FEATURES, 32)

    model: Any

    def get_model(self) -> nn.Module:
        return self.model

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any, labels: Tensor, images: Any
    ) -> tuple[None, Tensor, Any, Tensor, Tensor]:
        seen = [image[0] if isinstance(image, tuple) else image for image in images]  # pairs of pixels and modality
        features, rows = iter([self.mm_projector(image) for image in seen]), []
        for ids, mask, row_labels in zip(input_ids, attention_mask.bool(), labels, strict=True):
            embeds, targets = [], []
            for token, label in zip(ids[mask], row_labels[mask], strict=True):
                visual = bool(token < 0)
                embeds.append(next(features) if visual else self.model.embed_tokens(token)[None])
                targets += [-100] * FRAMES if visual else [int(label)]
            if not bool((ids[mask] < 0).any()):
                embeds.append(next(features)[:0])
            rows.append((torch.cat(embeds), torch.tensor(targets)))
        length = max(len(e) for e, _ in rows)
        embeds = torch.stack([F.pad(e, (0, 0, 0, length - len(e))) for e, _ in rows])
        expanded = torch.stack([F.pad(t, (0, length - len(t)), value=-100) for _, t in rows])
        mask = torch.stack([torch.arange(length) < len(e) for e, _ in rows])
        return None, mask, past_key_values, embeds, expanded

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            input_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(input_ids, attention_mask, past_key_values, labels, images)
            )
        outputs = super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
        )  # fmt: skip
        outputs.labels = labels
        return outputs


class Videollama2Qwen2ForCausalLM(_Videollama2, Qwen2ForCausalLM):
    config_of = lambda: Qwen2Config(**TEXT)  # noqa: E731


class Videollama2MixtralForCausalLM(_Videollama2, MixtralForCausalLM):
    config_of = lambda: MixtralConfig(  # noqa: E731
        **TEXT, num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm"
    )


class Videollama2Gemma2ForCausalLM(_Videollama2, Gemma2ForCausalLM):
    """Soft caps on attention and logits, a window in every other layer."""

    config_of = lambda: Gemma2Config(  # noqa: E731
        **TEXT, sliding_window=4, attn_logit_softcapping=1.0, final_logit_softcapping=3.0, query_pre_attn_scalar=8
    )


class Videollama2LlamaForCausalLM(_Videollama2, LlamaForCausalLM):
    config_of = lambda: LlamaConfig(**TEXT)  # noqa: E731


class Videollama2Phi3ForCausalLM(_Videollama2, Phi3ForCausalLM):
    config_of = lambda: Phi3Config(**TEXT)  # noqa: E731


class _VideoChat2(nn.Module):
    """Strings in; FRAMES Q-Former positions between the instruction and the text; a constant at position 0.

    A text of several turns has its questions after "?" and its answers after "!"; questions are no labels.
    """

    prefix: str
    make: Callable[[], Any]

    def __init__(self, *, lora: bool = False) -> None:
        super().__init__()
        model = type(self).make()
        if lora:
            from peft import LoraConfig, get_peft_model

            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
            model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        setattr(self, f"{self.prefix}_model", model)
        setattr(self, f"{self.prefix}_proj", nn.Linear(FEATURES, 32))

    @property
    def language_model(self) -> Any:
        return getattr(self, f"{self.prefix}_model")

    def embed(self, ids: list[int]) -> Tensor:
        return self.language_model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))

    def start(self, dtype: torch.dtype) -> Tensor:
        return torch.ones(1, 32, dtype=dtype)

    def encode(self, image: Any) -> list[Tensor]:
        """What stands in each row."""
        return list(getattr(self, f"{self.prefix}_proj")(image))

    def forward(self, image: Any, text_input: list[str], instruction: list[str]) -> dict[str, Tensor]:
        rows, targets = [], []
        for visual, text, before in zip(self.encode(image), text_input, instruction, strict=True):
            ids, labels, asked = [], [], False
            for word in text.split():
                if word in "?!":
                    asked = word == "?"
                    continue
                ids.append(int(word))
                labels.append(-100 if asked else int(word))
            start = self.start(visual.dtype)
            rows.append(torch.cat([start, self.embed([int(w) for w in before.split()]), visual, self.embed(ids)]))
            targets.append(torch.tensor([-100] * (len(rows[-1]) - len(ids)) + labels))
        length = max(map(len, rows))
        outputs = self.language_model(
            inputs_embeds=torch.stack([F.pad(e, (0, 0, 0, length - len(e))) for e in rows]),
            attention_mask=torch.stack([(torch.arange(length) < len(e)).long() for e in rows]),
            return_dict=True,
            labels=torch.stack([F.pad(t, (0, length - len(t)), value=-100) for t in targets]),
            use_cache=False,
        )
        return {"loss": outputs.loss}


class VideoChat2_it_mistral(_VideoChat2):
    prefix, make = "mistral", lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=None))


class VideoChat2_it_phi(_VideoChat2):
    prefix, make = "phi", lambda: Phi3ForCausalLM(Phi3Config(**TEXT))


class VideoChat2_it_vicuna(_VideoChat2):
    prefix, make = "llama", lambda: LlamaForCausalLM(LlamaConfig(**TEXT))


class VideoChat2_it_hd_mistral(VideoChat2_it_mistral):
    """A list of images, FRAMES positions a tile; or of one number each, and then the batch is text alone."""

    def start(self, dtype: torch.dtype) -> Tensor:
        return self.embed([1])

    def encode(self, image: Any) -> list[Tensor]:
        if image[0].dim() == 1:
            return [self.embed([]) for _ in image]
        return [self.mistral_proj(tiles).flatten(0, 1) for tiles in image]


class InternVLChatModel(nn.Module):
    """Ids expanded already; the loss outside, weighted; no `get_decoder` of its own.

    Boundaries of packed rows come as `cu_seqlens`, for each attention, or in the place of the attention mask.
    """

    def __init__(self, language_model: Any = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="internvl_chat")
        self.language_model: Any = language_model or Qwen2ForCausalLM(Qwen2Config(**TEXT))
        self.mlp1 = nn.Linear(FEATURES, 32)
        self.img_context_token_id: int | None = None

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        statistics: Any = None,
        cu_seqlens: Tensor | None = None,
        loss_weight: list[list[float]] | None = None,
        loss_reduction_all_gather: bool = False,
    ) -> Any:
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        features = self.mlp1(pixel_values)
        if image_flags is not None:
            features = features[image_flags.squeeze(-1) == 1]
        embeds[input_ids == self.img_context_token_id] = features.flatten(0, 1)
        for layer in self.language_model.model.layers:
            next(iter(layer.children())).cu_seqlens = cu_seqlens
        outputs = self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )
        if labels is not None:
            each = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            weights = torch.ones_like(each)
            if loss_weight is not None:
                weights = torch.tensor(loss_weight, dtype=each.dtype)[:, 1:].flatten()
            outputs.loss = (each * weights).sum() / weights.sum()
        return outputs
