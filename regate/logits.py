"""Logits that are not computed until somebody needs them, and by cross-entropy only a chunk at a time.

A model's own code runs on `LazyLogits` as on any tensor. What it does to logits before the loss is remembered: taking
positions, flattening, a cast, a scale, a soft cap. Cross-entropy then computes them for some rows at once, drops them,
and computes them again for the backward pass, so that [N, V] never exists. Anything else computes them there and then.

    logits = head(hidden)                      LazyLogits(hidden, [])
    logits = cap * torch.tanh(logits / cap)    LazyLogits(hidden, [/ cap, tanh, * cap])
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ...)      chunks of rows of hidden[:, :-1]

`torch.nn.functional.linear_cross_entropy` does this for a bare linear head, but returns the loss in bfloat16 where the
model is, and no loss per label, which difficulties are made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 2**26  # logits that exist at once: 256 MB in float32
Transform = Callable[[Tensor], Tensor]


class LazyHead:
    """What stands in for a head's `forward`: it gives `LazyLogits`.

    Attributes:
        chunk: logits that exist at once.
        losses: [N] float32, `-log p` of the labels that the last forward's cross-entropy was taken of, in its order,
            0.0 where ignored; None if it was taken of none, or several times.
    """

    def __init__(self, head: nn.Module, *, chunk: int = CHUNK) -> None:
        self.head, self.chunk = head, chunk
        self.forward = head.forward
        self.losses: Tensor | None = None
        self._taken = 0

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, the head's logits are lazy."""
        own = self.head.__dict__.get("forward")
        self.forward = self.head.forward
        self.losses, self._taken = None, 0
        self.head.forward = self
        try:
            yield
        finally:
            if own is None:
                del self.head.forward
            else:
                self.head.forward = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lazily = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() >= 2
        if torch.compiler.is_compiling() or not lazily:  # a user's own torch.compile sees the head as it is
            return self.forward(*args, **kwargs)
        none = self.forward(args[0].detach().reshape(-1, args[0].shape[-1])[:0])
        return LazyLogits(args[0], self, none)

    def took(self, losses: Tensor | None) -> None:
        """Note the losses of one cross-entropy."""
        self._taken += 1
        self.losses = losses if self._taken == 1 else None


class LazyLogits(Tensor):
    """[..., V] logits of `hidden` [..., D], see the module's description."""

    _hidden: Tensor
    _head: LazyHead
    _transforms: tuple[Transform, ...]
    _none: Tensor  # logits of no row, which say what V and the dtype are
    _computed: Tensor | None

    @staticmethod
    def __new__(
        cls, hidden: Tensor, head: LazyHead, none: Tensor, transforms: tuple[Transform, ...] = ()
    ) -> LazyLogits:
        shape = (*hidden.shape[:-1], none.shape[-1])
        made: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=none.dtype, device=none.device)  # type: ignore
        made._hidden, made._head, made._none, made._transforms, made._computed = hidden, head, none, transforms, None
        return made

    def _at(self, hidden: Tensor) -> LazyLogits:
        """The logits of these rows."""
        return LazyLogits(hidden, self._head, self._none, self._transforms)

    def _then(self, transform: Transform) -> LazyLogits:
        """The logits, each of them changed."""
        return LazyLogits(self._hidden, self._head, transform(self._none), (*self._transforms, transform))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if args and isinstance(args[0], LazyLogits) and args[0]._computed is None:
                if function in _FACTS:
                    return function(*args, **kwargs)
                deferred = args[0]._deferred(function, args[1:], kwargs)
                if deferred is not None:
                    return deferred
            args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.compute, (args, kwargs))
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:  # asked for by autograd, out of reach of what is above
            return args[0]
        raise TypeError(f"{function} was called on logits that are not computed yet, in a way that passes Python by")

    def compute(self) -> Tensor:
        """The logits, from now on a plain tensor."""
        if self._computed is None:
            self._computed = _logits(self._hidden, self._head, self._transforms)
        return self._computed

    def _deferred(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation on logits that stay lazy, or None if it needs them."""
        if function is Tensor.contiguous and not args and not kwargs:
            return self
        if function in _ELEMENTWISE:
            if any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
                return None
            return self._then(lambda logits: function(logits, *args, **kwargs))
        if function is Tensor.__getitem__ and (index := _rows_only(args[0], self._hidden.dim())) is not None:
            return self._at(self._hidden[index])
        if function in (Tensor.view, Tensor.reshape, torch.reshape) and not kwargs:
            sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
            if len(sizes) > 1 and all(isinstance(n, int) for n in sizes) and sizes[-1] == self.shape[-1]:
                return self._at(self._hidden.reshape(*sizes[:-1], self._hidden.shape[-1]))
        if function is F.cross_entropy:
            return self._cross_entropy(*args, **kwargs)
        return None

    def _cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """`F.cross_entropy(self, target, ...)` of [N, V] logits and [N] labels; None if it is asked otherwise."""
        whole = self.dim() == 2 and target.dim() == 1 and not target.is_floating_point()
        usual = weight is None and size_average is None and reduce is None and reduction in ("none", "sum", "mean")
        if not whole or not usual:
            return None

        def some(hidden: Tensor, labels: Tensor) -> Tensor:
            return entropy(_logits(hidden, self._head, self._transforms), labels, reduction="none")

        entropy = partial(F.cross_entropy, ignore_index=ignore_index, label_smoothing=label_smoothing)
        n = max(self._head.chunk // self.shape[-1], 1)
        if len(target) <= n:  # to the bit what the model would have made of logits
            logits = self.compute()
            with torch.no_grad():
                losses = entropy(logits, target, reduction="none")
            found = entropy(logits, target, reduction=reduction)
        else:
            chunks = zip(self._hidden.split(n), target.split(n), strict=True)
            losses = torch.cat([checkpoint(some, *chunk, use_reentrant=False) for chunk in chunks])
            total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
            mean = total / (target != ignore_index).sum()
            found = {"none": losses, "sum": total.to(losses.dtype), "mean": mean.to(losses.dtype)}[reduction]
        self._head.took(losses.detach().float() if label_smoothing == 0 else None)
        return found


def _logits(hidden: Tensor, head: LazyHead, transforms: tuple[Transform, ...]) -> Tensor:
    logits = head.forward(hidden)
    for transform in transforms:
        logits = transform(logits)
    return logits


def _rows_only(index: Any, rank: int) -> Any:
    """An index of slices that leaves the last of `rank` axes alone, as one that does not mention it; else None."""
    index = index if isinstance(index, tuple) else (index,)
    if sum(i is Ellipsis for i in index) > 1 or not all(i is Ellipsis or isinstance(i, slice) for i in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        missing = rank - (len(index) - 1)
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    if len(index) == rank and index[-1] != slice(None):
        return None
    return index[: rank - 1]


_FACTS = {getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim", "is_cuda")} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point, Tensor.__len__,
}  # fmt: skip
_ELEMENTWISE = {
    Tensor.float, Tensor.to, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div, Tensor.__truediv__,
    Tensor.true_divide, torch.div, Tensor.tanh, torch.tanh,
}  # fmt: skip
