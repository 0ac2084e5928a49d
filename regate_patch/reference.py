"""The oracle: the same elision in plain eager torch, layer by layer. Slow and obvious; the engine is held to it.

Every layer runs on all positions; inactive ones are hidden from attention as keys, and the layer's output is
put back to its input where a position is inactive. No graph, no gather: nothing here is shared with the
rewriter.

    with regate_patch.reference.masked(layers, active_BS):
        decoder(...)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _HideInactiveKeys(TorchFunctionMode):
    """Scaled dot-product attention and softmax that cannot see inactive keys of length S; and a sparse attention that
    chooses among the others."""

    def __init__(self, active: Tensor) -> None:
        super().__init__()
        self.active = active

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func in (torch.topk, Tensor.topk) and args[0].dim() >= 3:
            scores, *rest = args
            if scores.shape[0] == len(self.active) and scores.shape[-2:] == 2 * self.active.shape[1:]:
                keys = self.active.reshape(len(self.active), *(1,) * (scores.dim() - 2), -1)
                args = (scores.masked_fill(~keys, float("-inf")), *rest)
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            scores, *rest = args
            if scores.dim() == 4 and scores.shape[0] == len(self.active):
                if scores.shape[-1] == self.active.shape[1]:
                    hidden = ~self.active[:, None, None, :]
                    args = (scores.masked_fill(hidden, torch.finfo(scores.dtype).min), *rest)
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        queries, keys = query.shape[-2], key.shape[-2]
        if keys != self.active.shape[1]:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        middle = (1,) * (query.dim() - 3)
        allowed = self.active.reshape(-1, *middle, 1, keys).expand(-1, *middle, queries, keys)
        if is_causal:
            allowed = allowed & torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = allowed & attn_mask
        # A query that may see nothing is never read; let it see itself, so that no NaN spreads.
        alone = ~allowed.any(-1, keepdim=True) & torch.eye(queries, keys, dtype=torch.bool, device=query.device)
        bias = torch.zeros_like(allowed | alone, dtype=query.dtype)
        bias = bias.masked_fill(~(allowed | alone), float("-inf"))
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            bias = bias + attn_mask
        return F.scaled_dot_product_attention(query, key, value, bias, dropout_p, False, **kwargs)


@contextlib.contextmanager
def masked(layers: Iterable[nn.Module], active: Tensor, visible: Tensor | None = None) -> Iterator[None]:
    """Run decoder layers so that inactive positions take no part in them.

    Args:
        layers: the decoder layers, each mapping hidden states [B, S, D] (its first argument) to new ones.
        active: [B, S] bool.
        visible: [B, S] bool, positions that can be seen as keys; where they are inactive, every layer sees them as the
            first does. None: the active ones.
    """
    first: list[Tensor] = []

    def stand_still(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not first:
            first.append(hidden)
        still = torch.where(active[..., None], hidden, first[0])
        return ((still, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": still})

    def put_back(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        kept = torch.where(active[..., None], after, before)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    layers = list(layers)
    hooks = [layer.register_forward_hook(put_back, with_kwargs=True) for layer in layers]
    if visible is not None:
        hooks += [layer.register_forward_pre_hook(stand_still, with_kwargs=True) for layer in layers]
    try:
        with _HideInactiveKeys(active if visible is None else visible):
            yield
    finally:
        for hook in hooks:
            hook.remove()
