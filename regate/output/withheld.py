"""`outputs.logits` of a training forward whose logits were never made at every position: an error for whoever reads it.

The head ran where kept labels are predicted, a chunk at a time. A caller that reads logits is told so at once; one that
only passes outputs on (casts, detaches, moves them) is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regate.errors import LogitsError


class WithheldLogits(Tensor):
    """[B, S, V] logits in shape, dtype and device only.

    Raises:
        LogitsError: whenever a value is asked for.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> WithheldLogits:
        made: WithheldLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _FACTS:
            return super().__torch_function__(function, types, args, kwargs or {})
        if function in _PASSED_ON and isinstance(args[0], WithheldLogits):
            like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
            like = function(like, *args[1:], **(kwargs or {}))
            return WithheldLogits(tuple(args[0].shape), like.dtype, like.device)
        raise LogitsError(
            f"outputs.logits of a gated training forward was read (by {getattr(function, '__name__', function)}), and "
            "most of these logits do not exist: the vocabulary projection runs where kept labels are predicted. A loss "
            "of your own that reads them needs regate.Config(logits='all'), and on sparse steps the labels that are "
            "kept: gate.last.labels_left. For metrics, evaluate without gradients: evaluation is not gated"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise LogitsError(f"{function} was called on logits that a gated training forward did not make")

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"WithheldLogits(shape={list(self.shape)}, dtype={self.dtype}); see regate.Config(logits='all')"

    def __deepcopy__(self, memo: dict[int, Any]) -> WithheldLogits:
        return WithheldLogits(tuple(self.shape), self.dtype, self.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return WithheldLogits, (tuple(self.shape), self.dtype, self.device)


def watched(values: Tensor, left_out: Tensor, count: Callable[[Tensor], None]) -> Tensor:
    """The same values, of which the backward pass sees who read them where they mean nothing.

    Args:
        values: [B, S, D].
        left_out: [B, S] bool on their device, where they mean nothing.
        count: called in the backward pass with the number of such positions that a gradient came from, int64 [].
    """
    if not values.requires_grad:
        return values
    outside = values.view_as(values)

    def look(gradient: Tensor | None) -> None:
        if gradient is not None:  # DDP hands outputs through a function of its own: none for those nobody read
            count(((gradient.abs() > 0).any(-1) & left_out).sum())  # what overflowed, and is NaN, tells nothing

    outside.register_hook(look)
    return outside


_FACTS = {getattr(Tensor, name).__get__ for name in (
    "shape", "device", "dtype", "ndim", "is_cuda", "is_meta", "requires_grad", "grad_fn", "is_leaf", "layout", "grad",
    "is_sparse", "is_nested", "is_quantized", "_version",
)} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point, Tensor.__len__,
    Tensor.is_complex, torch.is_complex, Tensor.element_size, Tensor.stride, Tensor.is_contiguous,
}  # fmt: skip
_PASSED_ON = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.cpu, Tensor.cuda,
              Tensor.detach, Tensor.contiguous, Tensor.clone, torch.clone}  # fmt: skip
