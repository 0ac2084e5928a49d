"""The language models that are timed: random weights, real shapes. Vision encoders are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.workloads import VISUAL_ID

_KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@dataclass(frozen=True)
class Size:
    """Of a decoder: its kind, and its configuration's numbers."""

    kind: str
    layers: int
    width: int
    inner: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = _KINDS[self.kind][0](
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
        )
        config.image_token_id = VISUAL_ID  # type: ignore[attr-defined]
        return config


SIZES = {
    "tiny": Size("qwen3", 2, 64, 128, 4, 2, 16, 256),  # to try the benchmark itself
    "narrow": Size("llama", 6, 64, 192, 4, 4, 16, 512),  # for memory: of the next one's proportions, an eighth as wide
    "deep": Size("llama", 28, 64, 192, 4, 4, 16, 512),  # for compilation
    "small": Size("llama", 6, 512, 1536, 8, 8, 64, 4096),
    "grouped": Size("llama", 6, 512, 1536, 8, 2, 64, 4096),  # the same with keys shared by four heads, as in real ones
    "qwen2.5-3b": Size("qwen2", 36, 2048, 11008, 16, 2, 128, 151936, tied=True),
    "qwen2.5-vl-7b": Size("qwen2", 28, 3584, 18944, 28, 4, 128, 152064),
    "internvl3.5-8b": Size("qwen3", 36, 4096, 12288, 32, 8, 128, 151936),
}


def build(size: Size, *, device: str, dtype: torch.dtype, lora: bool = False, checkpointing: bool = False) -> nn.Module:
    """A model in training mode, always with the same weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = _given_embeddings(_KINDS[size.kind][1])(size.config())
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=128, lora_alpha=256, target_modules="all-linear"))
    return model.train()


def causal_lm(model: nn.Module) -> Any:
    """The model without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _given_embeddings(base: Any) -> Any:
    """A model whose decoder is given embeddings, as multimodal models give them."""

    class MultimodalForCausalLM(base):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
            return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids), labels=labels, **others)

    return MultimodalForCausalLM
