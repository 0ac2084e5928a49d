"""Decoders that are not from transformers: what the engine meets when it knows nothing."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Style = Literal[
    "pre_norm", "post_norm", "parallel", "parallel_two_adds", "gated", "softmax", "one_head", "written_gelu", "broken"
]


class WrittenGELU(nn.Module):
    """As GPT-2's: an addition in it joins a value to what is made of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, style: Style) -> None:
        super().__init__()
        self.heads, self.style = heads, style
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        activation = WrittenGELU() if style == "written_gelu" else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), activation, nn.Linear(2 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        if self.style == "one_head":
            return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True))
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.style == "softmax":
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            hidden = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(b, s, d)
        if self.style == "gated":
            y = y * torch.sigmoid(self.gate(x))
        return self.out(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "post_norm":
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp(x))
        if self.style == "parallel":
            n = self.norm1(x)
            return x + (self.attend(n) + self.mlp(n))
        if self.style == "parallel_two_adds":
            n = self.norm1(x)
            return x + self.attend(n) + self.mlp(n)
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Token and position embeddings are the caller's; final norm inside, as in nanoGPT."""

    def __init__(self, style: Style = "pre_norm", *, layers: int = 3, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.style = style
        self.layers = nn.ModuleList(Block(width, heads, style) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            if self.style == "broken":
                torch._dynamo.graph_break()
        return self.norm(hidden_states)
