"""Stand-ins for flash attention's packages: the same calls, as autograd functions around custom operators on the CPU.

transformers' own code calls them, with its own unpadding, boundaries and windows. What they compute is written out in
plain products, so that a mistake in what stands in for them in the library cannot hide in the reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor, library, nn
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

OF_THE_HUB = "kernels-community/flash-attn2"
calls: list[str] = []


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float) -> Tensor:
    """[S, H, D] of one sample; k and v may have fewer heads."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) & causal
    if window >= 0:
        hidden |= distance > window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@library.custom_op("stand_in::_flash_attn_varlen_forward", mutates_args=())
def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> Tensor:
    calls.append("varlen" if len(starts) > 2 else "plain")
    ends = starts.tolist()
    parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return torch.cat([_attend(q[p], k[p], v[p], scale, causal, window, softcap) for p in parts])


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, starts)
        ctx.settings = settings
        return _varlen_forward(q, k, v, starts, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *qkv, starts = ctx.saved_tensors
        with torch.enable_grad():
            again = [x.detach().requires_grad_() for x in qkv]
            ends = starts.tolist()
            parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
            output = torch.cat([_attend(*(x[p] for x in again), *ctx.settings) for p in parts])
            grads = torch.autograd.grad(output, again, grad)
        return (*grads, None, None, None, None, None)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    scale = softmax_scale or q.shape[-1] ** -0.5
    return _Varlen.apply(q, k, v, cu_seqlens_q, scale, causal, window_size[0], softcap)  # type: ignore[no-any-return]


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    rows, length = q.shape[:2]
    starts = torch.arange(rows + 1, dtype=torch.int32) * length
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    settings = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    return flash_attn_varlen_func(q, k, v, starts, starts, length, length, **settings).unflatten(0, (rows, length))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    starts = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(*qkv.unbind(1), *starts, softmax_scale=softmax_scale, causal=causal)


@contextlib.contextmanager
def installed() -> Iterator[list[str]]:
    """Inside, transformers finds these where it would import the packages; gives the calls that reach them."""
    AttentionInterface.register(OF_THE_HUB, flash_attention_forward)  # as loading from the hub does
    AttentionMaskInterface.register(OF_THE_HUB, flash_attention_mask)
    functions = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    calls.clear()
    with (
        mock.patch.object(flash, "_lazy_imports", return_value=functions),
        mock.patch.object(flash, "_loaded_implementation", None),
        mock.patch.object(flash, "fa_peft_integration_check", lambda q, k, v, *args: (q, k, v)),  # float64 stays
        mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", return_value=True),
    ):
        yield calls


def flex(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float, **_: Any) -> Tensor:
    """`flex_attention` as transformers calls it, which has no backward pass on the CPU, written out."""
    rows, heads, length = query.shape[:3]
    visible = create_mask(block_mask.mask_mod, rows, 1, length, length, device="cpu")
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ value  # padding sees nothing


def use(model: nn.Module, implementation: str = "flash_attention_2") -> Any:
    """`model` with that attention in its language model and encoders."""
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    return model
