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
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from regate.training.hooks import standing_in
from regate_patch import class_forward

CHUNK = 2**27  # logits that exist at once: 512 MB in float32
Transform = Callable[[Tensor], Tensor]


class LazyHead:
    """What stands in for a head's `forward`: it gives `LazyLogits`. A copied or pickled head has its own forward.

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
        self._rows: int | None = None

    @contextlib.contextmanager
    def standing_in(self, *, rows: int | None = None) -> Iterator[None]:
        """Inside, the head's logits are lazy; `rows` of them are a chunk, if given."""
        self.forward = self.head.forward
        self.losses, self._taken, self._rows = None, 0, rows
        with standing_in(self.head, self):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lazily = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() >= 2
        if torch.compiler.is_compiling() or not lazily:  # a user's own torch.compile sees the head as it is
            return self.forward(*args, **kwargs)
        none = self.forward(args[0].detach().reshape(-1, args[0].shape[-1])[:0])
        return LazyLogits(args[0], self, none)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.head.named_parameters() if p.requires_grad}

    def rows(self, vocabulary: int) -> int:
        """How many rows are a chunk."""
        return self._rows or max(self.chunk // vocabulary, 1)

    def took(self, losses: Tensor | None) -> None:
        """Note the losses of one cross-entropy."""
        self._taken += 1
        self.losses = losses if self._taken == 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return class_forward(memo.get(id(self.head), self.head))

    def __reduce__(self) -> Any:
        return class_forward, (self.head,)


class LazyLogits(Tensor):
    """[..., V] logits of `hidden` [..., D], see the module's description."""

    _hidden: Tensor
    _head: LazyHead
    _transforms: tuple[Transform, ...]
    _none: Tensor  # logits of no row, which say what V and the dtype are
    _context: Callable[[], contextlib.AbstractContextManager[None]]  # in which the head was called
    _computed: Tensor | None

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        head: LazyHead,
        none: Tensor,
        transforms: tuple[Transform, ...] = (),
        context: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    ) -> LazyLogits:
        shape = (*hidden.shape[:-1], none.shape[-1])
        made: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=none.dtype, device=none.device)
        made._hidden, made._head, made._none, made._transforms, made._computed = hidden, head, none, transforms, None
        made._context = context or _current_context(hidden.device.type)
        return made

    def _at(self, hidden: Tensor) -> LazyLogits:
        """The logits of these rows."""
        return LazyLogits(hidden, self._head, self._none, self._transforms, self._context)

    def _then(self, transform: Transform) -> LazyLogits:
        """The logits, each of them changed."""
        return LazyLogits(
            self._hidden, self._head, transform(self._none), (*self._transforms, transform), self._context
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], LazyLogits) and args[0]._computed is None:
            if function in _FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **kwargs)
            deferred = args[0]._deferred(function, args[1:], kwargs)
            if deferred is not None:
                return deferred
        args, kwargs = pytree.tree_map_only(LazyLogits, LazyLogits.compute, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:  # asked for by autograd, out of reach of what is above
            return args[0]
        raise TypeError(f"{function} was called on logits that are not computed yet, in a way that passes Python by")

    def compute(self) -> Tensor:
        """The logits, from now on a plain tensor; as they would be if they had been computed when the head was."""
        if self._computed is None:
            with self._context():
                self._computed = self._logits(self._hidden)
        return self._computed

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head.forward(hidden)
        for transform in self._transforms:
            logits = transform(logits)
        return logits

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
        if function in (Tensor.flatten, torch.flatten) and len(args) == 2 and not kwargs:
            if args[1] % self.dim() < self.dim() - 1:
                return self._at(self._hidden.flatten(*args))
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
        if not whole or not usual or len(target) != len(self):
            return None
        entropy = partial(F.cross_entropy, ignore_index=ignore_index, label_smoothing=label_smoothing)
        n = self._head.rows(self.shape[-1])
        if len(target) <= n:  # to the bit what the model would have made of logits
            logits = self.compute()
            with torch.no_grad():
                losses = entropy(logits, target, reduction="none")
            found = entropy(logits, target, reduction=reduction)
        else:
            trained = self._head.trained()

            def some(hidden: Tensor, labels: Tensor, *parameters: Tensor) -> Tensor:
                with _reparametrize_module(self._head.head, dict(zip(trained, parameters, strict=True))):
                    return entropy(self._logits(hidden), labels, reduction="none")

            losses = _InChunks.apply(some, n, self._hidden, target, *trained.values())
            total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
            mean = total / (target != ignore_index).sum()
            found = {"none": losses, "sum": total.to(losses.dtype), "mean": mean.to(losses.dtype)}[reduction]
        self._head.took(losses.detach().float() if label_smoothing == 0 else None)
        return found


class _InChunks(torch.autograd.Function):
    """`some(hidden, labels, *parameters)` [N] of n rows at a time, computed again for the backward pass: with the
    parameters of then, for others may be in their place by now (`torch.func.functional_call`).

    Gradients of parameters are summed over chunks in float32: bfloat16 would lose what many chunks add. Gradients that
    are to be differentiated themselves (`create_graph=True`) hold all logits, and are taken at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        some: Callable[..., Tensor],
        n: int,
        hidden: Tensor,
        labels: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.some, ctx.n, ctx.context = some, n, _current_context(hidden.device.type)
        ctx.save_for_backward(hidden, labels, *parameters)
        return torch.cat([some(*rows, *parameters) for rows in zip(hidden.split(n), labels.split(n), strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, labels, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _InChunks._twice(ctx, gradient, hidden, labels, *parameters)
        by_hidden = torch.empty_like(hidden)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        chunks = (x.split(ctx.n) for x in (hidden, labels, gradient, by_hidden))
        for rows, of_rows, by_losses, by_rows in zip(*chunks, strict=True):
            leaf = rows.detach().requires_grad_()
            with ctx.context(), torch.enable_grad():
                losses = ctx.some(leaf, of_rows, *parameters)
            by_leaf, *found = torch.autograd.grad(losses, [leaf, *parameters], by_losses)
            by_rows.copy_(by_leaf)
            for total, x in zip(sums, found, strict=True):
                total += x
        return None, None, by_hidden, None, *(x.to(p.dtype) for x, p in zip(sums, parameters, strict=True))

    @staticmethod
    def _twice(ctx: Any, gradient: Tensor, hidden: Tensor, labels: Tensor, *parameters: Tensor) -> Any:
        """The same gradients, with a graph of their own: by views, which no hidden state was made of."""
        views = [x.view_as(x) for x in (hidden, *parameters)]
        with ctx.context(), torch.enable_grad():
            losses = ctx.some(views[0], labels, *views[1:])
        needed = [x for x in views if x.requires_grad]
        found = iter(torch.autograd.grad(losses, needed, gradient, create_graph=True))
        by_hidden, *others = (next(found) if x.requires_grad else None for x in (hidden, *parameters))
        return None, None, by_hidden, None, *others


def _current_context(device: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Autocast and gradient mode as they are here, to be entered elsewhere."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    grad = torch.is_grad_enabled()

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with torch.autocast(device, dtype=dtype, enabled=enabled), torch.set_grad_enabled(grad):
            yield

    return entered


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
