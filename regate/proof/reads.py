"""Who reads what of the decoder's output, and which savings that allows.

A label's loss reads the position that predicts it, and nothing else; what no one reads need not be computed. But other
things may read more: a loss of the model's own over all logits, an auxiliary head on hidden states, a hook. The least
that makes them right is then computed, too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from model_adapters.walk import every_part


class Read(IntEnum):
    """What a full step computes; each level adds what the one before leaves out."""

    KEPT = 0
    """The last layer's tail, as the head, at predictors of kept labels alone; nothing after the last of them."""
    LIVE = 1
    """Every position up to a row's last kept label, through the whole decoder."""
    VALID = 2
    """What follows the last label, too."""
    ALL = 3
    """Padding, too: full steps run the decoder as it is."""


def least(*, balanced: bool) -> Read:
    """What is computed in any case, `balanced` by a router's loss, which reads every position that is no padding."""
    return Read.VALID if balanced else Read.KEPT


LEFT_OUT = (
    "on sparse steps positions that are left out have the value with which the residual stream enters the first layer"
)
GIVEN_UP = {
    Read.KEPT: "nothing",
    Read.LIVE: "the last layer runs at every position before the last label",
    Read.VALID: "positions after the last label are computed",
    Read.ALL: f"full steps run the decoder as it is, padding and all; {LEFT_OUT}",
}

PUT_ELSEWHERE = (
    "{n} value(s) that the decoder computes leave it otherwise than by being returned: a wrapped layer or a hook on "
    "all modules keeps them"
)
HANDED_OUT = "the model returns its decoder's output to the caller"
KEPT_ASIDE = "{module}.{name} keeps its decoder's output"
_FAR = 400  # operations of a loss that are looked at
_MANY = 64  # entries of a list that a module keeps, or numbers in a factor: more are not looked at
_ASKED = ("output_hidden_states", "output_attentions")
_PLUMBING = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "regate", "regate_patch")


def asked_for(call: Mapping[str, Any], model: nn.Module) -> str | None:
    """Is the caller handed the decoder's values, some of which modules around the decoder may make of its output?"""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _ASKED:
        asked = call.get(name)
        if asked or (asked is None and (getattr(config, name, False) or getattr(text, name, False))):
            return f"{name}=True hands the decoder's values to the caller"
    return None


def inner_reader(decoder: nn.Module) -> str | None:
    """Who reads by a hook values inside the decoder, or its output; None if nobody does."""
    return _hooked(decoder, inside=True)


def output_reader(parts: Iterable[nn.Module], decoder: nn.Module) -> str | None:
    """Who sees, by a hook or a wrapped forward, what these modules hand on of the decoder's output; None if nobody.

    Or, by a hook, what the decoder hands out: such a hook may run after ours.
    """
    for part in parts:
        hooks = (*part._forward_hooks.values(), *_of_gradients(part), *filter(None, [vars(part).get("forward")]))
        for hook in hooks:
            if _origin(hook).partition(".")[0] not in _PLUMBING:
                return f"{_origin(hook)} hangs on {type(part).__name__}, which hands on the decoder's output"
    for hook in (*decoder._forward_hooks.values(), *_of_gradients(decoder)):
        if _origin(hook).partition(".")[0] not in _PLUMBING:
            return f"a hook ({_origin(hook)}) hangs on {type(decoder).__name__}"
    return None


def changes_call(module: nn.Module, own: int) -> str | None:
    """Who may change, by a hook behind the one with this id, what the module is called with; None if nobody does."""
    ids = list(module._forward_pre_hooks)
    for i in ids[ids.index(own) + 1 :]:
        if _origin(hook := module._forward_pre_hooks[i]).partition(".")[0] not in _PLUMBING:
            return f"a forward pre-hook ({_origin(hook)}) hangs on {type(module).__name__}"
    return None


def logits_reader(head: nn.Module) -> str | None:
    """Who reads by a hook what the head is given or gives; None if nobody does."""
    return _hooked(head, inside=False)


def kept_aside(parts: Iterable[nn.Module], values: Iterable[Tensor]) -> str | None:
    """Which part keeps one of these values, or a view of it, for whoever reads it later; None if none does."""
    own = {x.untyped_storage().data_ptr() for x in values if type(x) is Tensor}
    for part in parts:
        for name, kept in vars(part).items():
            entries = (
                list(kept.values()) if isinstance(kept, dict) else kept if isinstance(kept, list | tuple) else [kept]
            )
            if len(entries) <= _MANY and any(
                type(x) is Tensor and x.untyped_storage().data_ptr() in own for x in entries
            ):
                return KEPT_ASIDE.format(module=type(part).__name__, name=name)
    return None


def operations(loss: Tensor, decoded: Any) -> frozenset[tuple[str, int]]:
    """The operations by which a loss comes from what its decoder returned, and how many there are of each.

    Factors with a 0 are told from others: what it multiplies is read, but has no gradient yet.
    """
    seen = {None, *(x.grad_fn for x in pytree.tree_leaves(decoded) if isinstance(x, Tensor))}
    found: Counter[str] = Counter()
    waiting = deque([loss.grad_fn])
    while waiting and len(seen) < _FAR:
        if (made_by := waiting.popleft()) in seen:
            continue
        assert made_by is not None
        seen.add(made_by)
        found[made_by.name() + " by 0" * _by_zero(made_by)] += 1
        waiting.extend(earlier for earlier, _ in made_by.next_functions)
    return frozenset(found.items())


def _by_zero(made_by: Any) -> bool:
    if getattr(made_by, "_saved_alpha", 1) == 0:
        return True
    if not made_by.name().startswith(("MulBackward", "LerpBackward")):
        return False
    try:
        factors = [getattr(made_by, name, None) for name in ("_saved_self", "_saved_other", "_saved_weight")]
    except RuntimeError:  # changed in place since
        return False
    return any(_has_zero(x) for x in factors)


def _has_zero(x: Any) -> bool:
    """Of a few numbers that are read without waiting for a device."""
    if isinstance(x, Tensor):
        return x.device.type == "cpu" and x.numel() <= _MANY and bool((x == 0).any())
    return x is not None and not x


def _hooked(module: nn.Module, *, inside: bool) -> str | None:
    """A hook of the user's on the module or its parts; `inside`: what the module itself is given does not count."""
    for part in every_part(module):
        if not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks):
            continue
        if isinstance(part, nn.Embedding):
            continue  # sees nothing of the output
        before = {} if inside and part is module else part._forward_pre_hooks
        for hook in (*part._forward_hooks.values(), *before.values(), *_of_gradients(part)):
            if _origin(hook).partition(".")[0] not in _PLUMBING:
                name = next(name for name, other in module.named_modules() if other is part)
                where = f"{type(module).__name__}.{name}" if name else type(module).__name__
                return f"a hook ({_origin(hook)}) hangs on {where}"
    return None


def _of_gradients(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """The hooks that see a module's gradients in the backward pass."""
    return (*module._backward_hooks.values(), *module._backward_pre_hooks.values())


def _origin(hook: Callable[..., Any]) -> str:
    """The module that a hook's code is from."""
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return getattr(hook, "__module__", None) or type(hook).__module__
