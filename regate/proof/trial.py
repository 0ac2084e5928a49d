"""A model once, forward and backward, untouched or as a full step of some level; do two such runs agree?"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate.errors import ConfigError
from regate.output.head import Reading, embeddings, hidden_states, is_aside, with_hidden_states
from regate.output.logits import LazyHead
from regate.output.outputs import loss_of
from regate.proof.reads import Read
from regate.training.hooks import standing_in
from regate.undisturbed import undisturbed
from regate_patch import PatchError, to_device

_PARAMETERS = 3  # of the decoder, whose gradients are compared
_SCALE = 2.0**10  # of a loss in float16, as trainers scale it: its gradients would fall below what float16 can tell
_EPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}  # of what products of float32 may be made with
_BY_CHANCE = 3  # times what one rounding of the embeddings changes


@dataclass(frozen=True)
class Subject:
    """A model, and how to run it.

    Attributes:
        model, decoder: the causal language model, and the module inside it.
        call: the arguments of its call, with few labels.
        labels, few: [B, S] on the CPU: the labels as the batch brought them, and those few, bool.
        live, valid: [B, S] bool on the CPU: positions up to the last of few labels; positions that are no padding.
        elide: `(read, tail)`: a context in which the decoder computes what this level asks for, with `tail` its last
            layer's tail only where few labels are predicted.
        beside: parameters around the decoder, its embeddings and its head, that are trained.
        lazy: of the model's head; None if its logits must be computed at once anyway.
        short: may the head be asked to run at kept labels alone?
        at_least: computed in any case.
        backward: may gradients be taken through the decoder and of parameters? Not where they are sharded.
        in_step: must ranks run the model equally often?
        highest: of the numbers that ranks in step say, the highest: what each finds in its own batch decides for all.
    """

    model: nn.Module
    decoder: nn.Module
    call: dict[str, Any]
    labels: Tensor
    few: Tensor
    live: Tensor
    valid: Tensor
    elide: Callable[[Read, bool], contextlib.AbstractContextManager[Any]]
    beside: list[nn.Parameter]
    lazy: LazyHead | None
    short: bool
    at_least: Read
    backward: bool
    in_step: bool
    highest: Callable[[int], int]

    def all(self, this: bool) -> bool:
        """Is it so on every rank?"""
        return not self.highest(int(not this))


@dataclass
class Run:
    """What one run gave.

    Attributes:
        loss: of few labels; not always reduced to one number.
        by_hidden: [B, S, D], its gradient by the decoder's output.
        by_head: by the head's parameters, where they are compared.
        beside: by the subject's `beside`: of an auxiliary head that begins at zero nothing else tells.
        behind: by the decoder's input and some of its parameters, where the decoder ran.
        output: of the decoder, detached.
        eps: of the narrowest numbers that the decoder computed in.
    """

    loss: Tensor
    by_hidden: Tensor
    by_head: list[Tensor | None]
    beside: list[Tensor | None]
    behind: list[Tensor | None]
    output: Any
    eps: float


def untouched(s: Subject, **options: Any) -> Run | None:
    """The model as it is, see `run`; where memory on the device is scarce, with no more than a gated step takes."""
    try:
        return run(s, None, **options)
    except torch.OutOfMemoryError:
        if s.in_step:
            raise
    _make_room()
    return run(s, None, offloaded=True, **options)


def run(
    s: Subject,
    level: Read | None,
    *,
    reading: Reading | None = None,
    output: Any = None,
    lazily: bool = False,
    shaken: float = 0.0,
    offloaded: bool = False,
) -> Run | None:
    """The model once, forward and backward; None if it has no loss.

    Args:
        level: as a full step of this level; None leaves the model untouched.
        reading: the head runs on the shortened sequence.
        output: of the decoder, from which on the model runs.
        lazily: with logits in chunks.
        shaken: by how much embeddings are off, each by chance.
        offloaded: what is saved for the backward pass waits on the host.
    """
    call, rows = s.call, None
    if reading is not None:
        call = {**call, "labels": to_device(reading.labels, call["labels"].device)}
        rows = reading.index.numel() // 3 + 1  # so that there are several chunks
    seen: dict[str, Any] = {"inside": False}
    shape = tuple(s.labels.shape)

    def enter(decoder: nn.Module, args: Any, kwargs: Any) -> None:
        if not is_aside(args, kwargs, shape):
            seen.update(input=embeddings(args, kwargs), inside=True)

    def leave(decoder: nn.Module, args: Any, kwargs: Any, made: Any) -> Any:
        if is_aside(args, kwargs, shape):
            return made
        seen["inside"] = False
        hidden = hidden_states(made)
        leaf = hidden.detach().requires_grad_()
        seen.update(hidden=hidden, leaf=leaf, output=with_hidden_states(made, hidden.detach()))
        seen.update(zip(("dtype", "eps"), _computed_in(hidden), strict=True))
        made = with_hidden_states(made, leaf)
        return made if reading is None else reading.shorten(made)

    with contextlib.ExitStack() as scope:
        scope.enter_context(torch.enable_grad())
        scope.enter_context(undisturbed(s.model))
        scope.enter_context(_hooked(s.decoder, enter, leave))
        if not s.backward:
            scope.enter_context(_unless(lambda: seen["inside"]))
        if offloaded:
            scope.enter_context(_on_host(s.model))
        if shaken:
            call = scope.enter_context(_shaken(s.model, call, shaken))
        with contextlib.ExitStack() as forward:
            if level is not None:
                forward.enter_context(s.elide(level, reading is not None and level == Read.KEPT))
            if output is not None:
                forward.enter_context(standing_in(s.decoder, lambda *args, **kwargs: output))
            if lazily and s.lazy is not None:
                forward.enter_context(s.lazy.standing_in(rows=rows))
            loss = loss_of(s.model.forward(**call))
        if loss is None or "leaf" not in seen:
            return None
        head = [*s.lazy.trained().values()] if s.lazy is not None and s.backward and reading is not None else []
        scaled = loss.sum() * (_SCALE if seen["dtype"] == torch.float16 else 1)
        wanted = [seen["leaf"], *head, *(s.beside if s.backward else [])]
        by_hidden, *by_others = torch.autograd.grad(scaled, wanted, allow_unused=True, retain_graph=True)
        if by_hidden is None:
            by_hidden = torch.zeros_like(seen["leaf"])
        behind = [] if output is not None else _behind(s, scaled, seen["hidden"], by_hidden, seen["input"])
    rest: list[Tensor | None] = list(by_others)
    return Run(loss.detach(), by_hidden, rest[: len(head)], rest[len(head) :], behind, seen["output"], seen["eps"])


def _behind(s: Subject, loss: Tensor, hidden: Tensor, by_hidden: Tensor, entered: Tensor | None) -> list[Tensor | None]:
    """Gradients by the decoder's input and some of its parameters; none where they cannot be taken on their own."""
    layers = [m for m in s.decoder.modules() if not isinstance(m, nn.Embedding)]  # ids are embedded before it, too
    learning = [p for m in layers for p in m.parameters(recurse=False) if p.requires_grad] if s.backward else []
    some = [learning[i * (len(learning) - 1) // (_PARAMETERS - 1)] for i in range(_PARAMETERS)] if learning else []
    wanted = [x for x in [entered, *some] if x is not None and x.requires_grad]
    if not s.backward or not hidden.requires_grad or not wanted:
        return []
    try:
        given = [torch.ones_like(loss), by_hidden.clone()]  # kernels may write theirs into it, as Liger's norm does
        found = torch.autograd.grad([loss, hidden], wanted, given, allow_unused=True)
        return [_off_padding(s, x) if wanted[0] is entered and i == 0 else x for i, x in enumerate(found)]
    except RuntimeError as error:
        if "use_reentrant" in str(error):  # such checkpoints only serve a backward pass that fills every `.grad`
            return []
        raise


def _off_padding(s: Subject, gradient: Tensor | None) -> Tensor | None:
    """By the decoder's input [B, S, D]: padding learns nothing, and may have no number there (a root's, of zeros)."""
    if gradient is None or gradient.shape[:2] != s.valid.shape:
        return gradient
    return gradient.masked_fill(~to_device(s.valid, gradient.device)[..., None], 0.0)


def tried(run: Callable[[], Run | None]) -> tuple[Run | None, str | None]:
    """What it gives, or why it gives nothing: what a model makes of an unusual call is no reason to stop."""
    try:
        found = run()
        return found, None if found is not None else "there is no loss with a gradient"
    except (ConfigError, PatchError, torch.OutOfMemoryError):
        raise  # the decoder cannot be gated at all, or not so, or not trained here, and the user must know
    except Exception as error:
        return None, f"the model cannot: {type(error).__name__}: {error}"


def agree(a: Run, b: Run) -> bool:
    """Equal up to half of the digits that the decoder computes with."""
    return agree_on_output(a, b) and all(close(x, y, tolerance(b)) for x, y in _paired(a.behind, b.behind))


def agree_on_output(a: Run, b: Run) -> bool:
    """As `agree`, of the loss and its gradients by the decoder's output, the head and what else is around it."""
    pairs = [(a.loss, b.loss), (a.by_hidden, b.by_hidden), *_paired(a.by_head, b.by_head), *_paired(a.beside, b.beside)]
    return all(close(x, y, tolerance(b)) for x, y in pairs)


def agree_by_chance(a: Run, b: Run, shaken: Run) -> bool:
    """Are gradients behind the decoder's output as near to each other as those of the same model, `shaken`, to b's?

    In a deep decoder of few digits gradients of queries and keys are noise for a tenth.
    """
    if not _paired(shaken.behind, b.behind):
        return False
    triples = zip(_paired(a.behind, b.behind), shaken.behind, strict=True)
    return all(
        close(x, y, tolerance(b))
        or (x is not None and y is not None and off is not None and _norm(x - y) <= _BY_CHANCE * _norm(off - y))
        for (x, y), off in triples
    )


def _paired(some: list[Tensor | None], others: list[Tensor | None]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Where both runs have them."""
    return list(zip(some, others, strict=True)) if some and others else []


def tolerance(run: Run) -> float:
    return max(run.eps**0.5, 1e-6)


def is_finite(run: Run) -> bool:
    found = [run.loss, run.by_hidden, *run.by_head, *run.beside, *run.behind]
    return all(bool(x.isfinite().all()) for x in found if x is not None)


def close(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and _norm(a - b) <= tolerance * _norm(b) + 1e-6 * tolerance


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _computed_in(x: Tensor) -> tuple[torch.dtype, float]:
    """The narrowest dtype that takes part, and the eps of the narrowest numbers that do.

    That of the decoder's output, or autocast's, which may begin inside the model's own forward (accelerate); products
    of float32 may be made of less (`torch.set_float32_matmul_precision`).
    """
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    dtype = max(x.dtype, autocast, key=lambda dtype: torch.finfo(dtype).eps)
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32:
        backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
        eps = max(eps, _EPS.get(backend.matmul.fp32_precision, 0.0))
    return dtype, eps


def _unless(unread: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is saved for a backward pass while it is known that there will be none."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: None if unread() else x, lambda x: x)


def _on_host(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, what is saved for a backward pass waits on the host; parameters, which are there anyway, stay."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> tuple[torch.device, Tensor]:
        return x.device, x if x.untyped_storage().data_ptr() in own else x.cpu()

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0]))


def _make_room() -> None:
    """On a device that ran out of memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _shaken(model: nn.Module, call: dict[str, Any], by: float) -> Iterator[dict[str, Any]]:
    """The call, inside of which embeddings are off by about `by` of themselves, as if they were rounded."""

    def shake(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        draw = torch.Generator(x.device).manual_seed(0)
        off = torch.randn(x.shape, generator=draw, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return x * (1 + by * off).to(x.dtype)

    given = {name: shake(call[name]) for name in ("inputs_embeds",) if name in call}
    tables = [] if given else [m for m in model.modules() if isinstance(m, nn.Embedding)]
    handles = [table.register_forward_hook(lambda module, args, made: shake(made)) for table in tables]
    try:
        yield call | given
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hooked(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
