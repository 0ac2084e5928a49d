"""Layers written as autograd functions, as Liger Kernel's are: followed, token by token, as what they replace is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama import modeling_llama

import regate_patch
from tests import oracle
from tests.zoo import CORE


class _RMSNorm(torch.autograd.Function):
    """Over rows of a matrix, like the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(rows, weight, scale)
        return (rows * scale * weight).view(*x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight, scale = ctx.saved_tensors
        g, normal = grad.reshape(-1, grad.shape[-1]), rows * scale
        by_normal = g * weight
        by_rows = scale * (by_normal - normal * (by_normal * normal).mean(-1, keepdim=True))
        return by_rows.view(*grad.shape), (g * normal).sum(0), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        shape = gate.shape
        gate, up = gate.view(-1, shape[-1]), up.view(-1, shape[-1])
        ctx.save_for_backward(gate, up)
        return (F.silu(gate) * up).view(*shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        g, s = grad.reshape(-1, grad.shape[-1]), torch.sigmoid(gate)
        by_gate = g * up * (s + gate * s * (1 - s))
        return by_gate.view(*grad.shape), (g * gate * s).view(*grad.shape)


class _Rope(torch.autograd.Function):
    """On q and k [B, H, S, D], which the kernel sees as [B, S, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, by_q: Tensor, by_k: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(by_q, cos, -sin), _turned(by_k, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.transpose(1, 2).contiguous()
    half = x.shape[-1] // 2
    other = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * cos.unsqueeze(2) + other * sin.unsqueeze(2)).transpose(1, 2)


def _replace_layers(model: Any) -> None:
    for module in model.model.language_model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: _RMSNorm.apply(x, m.weight, m.variance_epsilon)
        elif type(module).__name__ == "LlamaMLP":
            module.forward = lambda x, m=module: m.down_proj(_SwiGLU.apply(m.gate_proj(x), m.up_proj(x)))


def test_layers_as_autograd_functions(monkeypatch: Any) -> None:
    """Against the same layers in eager mode, one at a time."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **_: _Rope.apply(q, k, cos, sin))
    torch._dynamo.reset()
    batch = oracle.double(CORE["llava"].batch("left"))
    active = oracle.random_active(batch)
    model = CORE["llava"].double()
    _replace_layers(model)
    expected = oracle.masked(model, batch, active)
    handle = regate_patch.patch(model.model.language_model, backend="eager")
    oracle.assert_same(oracle.run(model, batch, regate_patch.active(active), active), expected)
    assert (handle.statistics.attention, handle.statistics.mlp) == (2, 2)
