"""Language models whose own code calls flash attention's functions, as remote code and training code do. Tiny, ours.

    Unpadding     InternLM2's: one function where nothing is padded, another between unpadding and padding where it is
    Packed        the same, patched for packed rows: boundaries stand in the place of the padding mask
    Flattened     rows laid end to end by hand, queries, keys and values in one tensor, as patches of Llama did it
    Windowed      a window and a soft cap
    patch_qwen    transformers' Qwen, patched for packed rows whose boundaries are set on each attention

`Plain` computes what they compute, by `scaled_dot_product_attention`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from tests import flash
from tests.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func

HEADS, KEYS, DIM, WIDTH, VOCABULARY = 4, 2, 8, 32, 128


class Attention(nn.Module, ABC):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, (HEADS + 2 * KEYS) * DIM, bias=False)
        self.wo = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        rows, length, _ = hidden_states.shape
        heads = self.wqkv(hidden_states).view(rows, length, HEADS + 2 * KEYS, DIM)
        q, k, v = heads.split([HEADS, KEYS, KEYS], dim=2)
        steps = torch.arange(0, DIM, 2, dtype=q.dtype, device=q.device)
        angles = position_ids[..., None] * 100.0 ** (-steps / DIM)
        angles = torch.cat([angles, angles], -1)[:, :, None]
        q, k = (
            x * angles.cos() + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * angles.sin() for x in (q, k)
        )
        output = self.attend(q, k, v, attention_mask, length)
        return self.wo(output.reshape(rows, length, HEADS * DIM).contiguous())

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        """From queries [B, S, HEADS, DIM], keys and values [B, S, KEYS, DIM] to [B, S, HEADS, DIM], or [B * S, ...]."""


class Unpadding(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        if mask is None:
            return flash_attn_func(q, k, v, 0.0, softmax_scale=None, causal=True)
        lengths = mask.sum(-1, dtype=torch.int32)
        places = torch.nonzero(mask.flatten()).flatten()
        first = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        q, k, v = (x.flatten(0, 1)[places] for x in (q, k, v))
        longest = lengths.max().item()
        output = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=first, cu_seqlens_k=first, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
        return output.new_zeros(mask.numel(), *output.shape[1:]).index_copy(0, places, output)


class Packed(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        assert mask is not None
        return _packed(q, k, v, mask)


def _packed(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> Tensor:
    assert len(q) == len(k) == len(v) == 1
    first = boundaries.squeeze(0)
    with torch.no_grad():
        longest = max([first[i + 1] - first[i] for i in range(len(first) - 1)]).item()
    return flash_attn_varlen_func(
        q=q.squeeze(0), k=k.squeeze(0), v=v.squeeze(0), cu_seqlens_q=first, cu_seqlens_k=first, max_seqlen_q=longest,
        max_seqlen_k=longest, dropout_p=0.0, causal=True,
    )  # fmt: skip


class Flattened(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        assert mask is None or bool(mask.all())
        rows = q.shape[0]
        k, v = (x.repeat_interleave(HEADS // KEYS, 2) for x in (k, v))
        qkv = torch.stack([q, k, v], 2).flatten(0, 1)
        first = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=q.device)
        return flash_attn_varlen_qkvpacked_func(qkv, first, length, 0.0, causal=True)


class Windowed(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        return flash.flash_attn_func(q, k, v, causal=True, window_size=(3, 3), softcap=1.5)


class Plain(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // KEYS, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class PlainWindowed(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // KEYS, 1) for x in (k, v))
        scores = 1.5 * torch.tanh(q @ k.transpose(2, 3) * DIM**-0.5 / 1.5)
        along = torch.arange(length, device=q.device)
        distance = along[:, None] - along[None, :]
        scores = scores.masked_fill((distance < 0) | (distance > 3), -1e30)
        return (scores.softmax(-1) @ v).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.attention = attention()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        normal = F.layer_norm(hidden_states, (WIDTH,))
        hidden_states = hidden_states + self.attention(normal, attention_mask, position_ids)
        return hidden_states + self.down(F.gelu(self.up(F.layer_norm(hidden_states, (WIDTH,)))))


class Decoder(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(attention) for _ in range(2))
        self.gradient_checkpointing, self.flash = False, attention not in (Plain, PlainWindowed)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> tuple[Tensor]:
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        if self.flash:
            attention_mask = attention_mask if (attention_mask is not None and 0 in attention_mask) else None
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, attention_mask, position_ids, use_reentrant=False)
            else:
                x = layer(x, attention_mask, position_ids)
        return (x,)


class CausalLM(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.model = Decoder(attention)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.config = SimpleNamespace(vocab_size=VOCABULARY, pad_token_id=0)

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **others: Any) -> Any:
        hidden = self.model(input_ids, **others)[0]
        logits, loss = self.output(hidden), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def patch_qwen(model: Any) -> None:
    """Packed rows for a Qwen 3, as InternVL 3.5 trains it."""
    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(_qwen_forward, layer.self_attn)


def _qwen_forward(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    if self.cu_seqlens is not None:
        attention_mask = self.cu_seqlens
    shape = hidden_states.shape[:-1]
    by_head = (*shape, -1, self.head_dim)
    q = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
    k = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
    v = self.v_proj(hidden_states).view(by_head)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    output = _packed(q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.contiguous(), attention_mask)
    return self.o_proj(output.reshape(*shape, -1).contiguous()), None
