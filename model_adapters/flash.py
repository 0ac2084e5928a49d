"""Flash attention's functions, called by a model's own code: remote code, and training code that patches attention.

What stands around such calls branches on data (is anything padded?) or asks for numbers (how long is the longest
sample?), and inside is a kernel. So while a gated forward runs a decoder, each function that its code calls gives way
to one that computes the same by `scaled_dot_product_attention`, and the decoder is called

    without its padding mask    what is computed then is no padding, and order alone is causal
    with boundaries of one      where samples begin is told beside the call, a place for each position, of which a mask
    sample instead of several   is made that keeps them apart, as transformers makes it of position ids

Boundaries are InternVL's for packed rows, [1, n + 1]: in the place of the attention mask (versions 2 and 3), or set on
each attention by the model's forward, `cu_seqlens` (3.5). Outside the decoder functions are themselves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from model_adapters.flash_functions import NAMES, NOTHING, TOLD, followed_by
from model_adapters.signatures import by_name
from model_adapters.walk import every_part

BOUNDARIES = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens")  # of a call, that say where samples begin
_IN_CALLS = (*BOUNDARIES, "cu_seq_lens_k", "cu_seqlens_k", "cu_seqlens_kv")
_ON_MODULES = "cu_seqlens"


class _OneSample:
    """Boundaries [1, 2], of a row that is one sample, in the place of a mask.

    Decoders hand a mask on to their attention if `0 in attention_mask`; of a tensor that cannot be known beforehand.
    """

    def __init__(self, boundaries: Tensor) -> None:
        self.boundaries = boundaries
        self.shape, self.dtype, self.device = boundaries.shape, boundaries.dtype, boundaries.device

    def __contains__(self, number: Any) -> bool:
        return bool(number == 0)

    def __getitem__(self, key: Any) -> Tensor:
        return self.boundaries[key]

    def squeeze(self, *dim: int) -> Tensor:
        return self.boundaries.squeeze(*dim)

    def flatten(self, *dims: int) -> Tensor:
        return self.boundaries.flatten(*dims)

    def view(self, *sizes: int) -> Tensor:
        return self.boundaries.view(*sizes)

    reshape = view


Place = tuple[dict[str, Any], str]  # a namespace, and the name of a function in it
_CALLS_NONE: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()  # by what was looked through


def boundaries(batch: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[str, Tensor] | None:
    """The entry of a call that says where samples begin among all positions, by name, or None.

    Args:
        batch: the call's arguments.
        shape: (B, S).
    """
    for name in BOUNDARIES:
        if isinstance(batch.get(name), Tensor):
            return name, batch[name]
    mask = batch.get("attention_mask")
    return ("attention_mask", mask) if isinstance(mask, Tensor) and is_boundaries(mask, shape) else None


def is_boundaries(mask: Any, shape: tuple[int, ...]) -> bool:
    """Do boundaries of samples [n + 1] or [1, n + 1] stand in the place of the mask?"""
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.int32, torch.int64) or mask.dim() > 2:
        return False
    if mask.dim() == 2 and (mask.dtype != torch.int32 or (len(mask), *shape[:1]) != (1, 1)):
        return False
    if tuple(mask.shape) == tuple(shape):  # as many as positions: a mask, or samples of one token each but one
        return mask[0, [0, -1]].tolist() == [0, shape[1]]
    return True


def called_by(decoder: nn.Module) -> list[Place]:
    """Where the code of `decoder` finds the functions that it calls.

    That it calls none is remembered until a module of it is of another class or has another forward.
    """
    parts = every_part(decoder)
    kinds = {type(part) for part in parts}
    own = [vars(part).get("forward") for part in parts]
    code = frozenset(map(id, (*kinds, *(kind.forward for kind in kinds), *own)))
    if _CALLS_NONE.get(decoder) == code:
        return []
    if not (found := _look(decoder)):
        _CALLS_NONE[decoder] = code
    return found


def _look(decoder: nn.Module) -> list[Place]:
    found: dict[tuple[int, str], Place] = {}
    seen: set[CodeType] = set()
    for function in _functions(decoder):
        for namespace, name in _called(function, seen):
            found[id(namespace), name] = (namespace, name)
    for module in decoder.modules():
        for name, value in vars(module).items():
            if _is_ours(value):
                found[id(vars(module)), name] = (vars(module), name)
    return list(found.values())


def takes_one_row(decoder: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Is the decoder one that a call with input_ids [B, S] tells boundaries, and so takes samples in a single row?"""
    ids = batch.get("input_ids")
    return isinstance(ids, Tensor) and boundaries(batch, ids.shape) is not None and bool(called_by(decoder))


@contextlib.contextmanager
def followable_calls(decoder: nn.Module) -> Iterator[None]:
    """Inside, whenever it runs, the functions that the decoder calls can be followed."""
    places = called_by(decoder)
    if not places:
        yield
        return
    running = contextlib.ExitStack()

    @torch.compiler.disable
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running.close()
        call = by_name(module, args, kwargs)
        return (), running.enter_context(_told(module, call, places))

    @torch.compiler.disable
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.close()

    hooks = [
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        running.close()
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _told(decoder: nn.Module, call: dict[str, Any], places: list[Place]) -> Iterator[dict[str, Any]]:
    """Gives the call as it is to be; inside, what goes beside it is in place."""
    x = next(call[name] for name in ("inputs_embeds", "input_ids", "hidden_states") if call.get(name) is not None)
    rows, length = x.shape[:2]
    readers = [m for m in decoder.modules() if _mentions(m, _ON_MODULES)]
    set_before = {m: getattr(m, _ON_MODULES) for m in readers if hasattr(m, _ON_MODULES)}
    of_modules = next((told for told in set_before.values() if told is not None), None)
    named = boundaries(call, (rows, length)) or boundaries({_ON_MODULES: of_modules}, (rows, length))
    along = torch.arange(rows * length, device=x.device)
    one, places_of = None, along.remainder(length)
    if named is not None:
        first = named[1].flatten().to(along)
        places_of = along - first[torch.searchsorted(first, along, right=True) - 1]
        one = torch.arange(2, device=x.device, dtype=torch.int32) * (rows * length)
    for name in _IN_CALLS:
        if one is not None and isinstance(call.get(name), Tensor):
            call[name] = one.expand(*call[name].shape[:-1], 2)
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() <= 2:
        handed_on = is_boundaries(mask, (rows, length)) and not readers
        call["attention_mask"] = _OneSample(one[None]) if one is not None and handed_on else None
    TOLD.x, TOLD.places, TOLD.packed = x, places_of.view(rows, length), named is not None
    before = [namespace[name] for namespace, name in places]
    try:
        for module in readers:
            setattr(module, _ON_MODULES, None if one is None else one[None])
        for (namespace, name), function in zip(places, before, strict=True):
            namespace[name] = followed_by(function)
        yield call
    finally:
        for (namespace, name), function in zip(places, before, strict=True):
            namespace[name] = function
        for module in readers:
            delattr(module, _ON_MODULES)
            if module in set_before:
                setattr(module, _ON_MODULES, set_before[module])
        TOLD.x = TOLD.places = NOTHING


# -- what a decoder's code calls ------------------------------------------------------------------------


def _is_ours(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__name__ in NAMES


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """Methods of all modules in it, those of instances, too."""
    classes = {cls for part in module.modules() for cls in type(part).__mro__}
    for cls in classes - set(nn.Module.__mro__):
        yield from (f for value in vars(cls).values() if isinstance(f := _plain(value), FunctionType))
    for part in module.modules():
        if isinstance(own := _plain(part.__dict__.get("forward")), FunctionType):
            yield own


def _plain(value: Any) -> Any:
    """A function without what is wrapped around it."""
    value = value.__func__ if isinstance(value, (MethodType, staticmethod, classmethod)) else value
    return inspect.unwrap(value) if isinstance(value, FunctionType) else value


def _called(function: FunctionType, seen: set[CodeType]) -> Iterator[Place]:
    """Where a function, and those of the same file that it calls, find flash attention's."""
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    namespace, names = function.__globals__, _names(function.__code__)
    for name in names:
        value = namespace.get(name)
        if _is_ours(value):
            yield namespace, name
        elif isinstance(value, FunctionType) and value.__globals__ is namespace:
            yield from _called(value, seen)
    wanted = [name for name in names if name in NAMES]
    if not wanted:
        return
    modules = [namespace.get(name) for name in names]  # `flash_attn.flash_attn_func`, or imported where it is called
    modules += [module for name, module in sys.modules.items() if name.startswith("flash_attn")]
    for module in modules:
        if isinstance(module, ModuleType):
            yield from ((vars(module), name) for name in wanted if _is_ours(vars(module).get(name)))


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """What a function's code names beside its own variables; functions inside it included."""
    inside = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inside)


def _mentions(module: nn.Module, name: str) -> bool:
    """Does the code of this module, by itself, name it?"""
    forward = _plain(module.__dict__.get("forward") or type(module).forward)
    return isinstance(forward, FunctionType) and name in _names(forward.__code__)
