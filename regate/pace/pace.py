"""A rank whose batch has no image runs, for nothing, what other ranks run for theirs.

Where parameters are split over ranks, a module runs on all of them or waits for ever. Vision towers and projectors run
only where the batch has images, so ranks walk to the decoder together. At each module on the way they say whose turn it
is, by its number here:

    rank 0   tower, projector, decoder          tower   projector   decoder
    rank 1   decoder                            waits   waits       decoder

Who waits is handed the arguments of the module whose turn it is and runs it too, under the same hooks. What comes out
goes into the decoder's input without changing it, and sends zeros back in the backward pass, which then runs through
the same modules in the same order on every rank. It does so only where rank 0's decoder makes use of what came out: a
tower's last layer that nobody reads has no gradient there, and none here.

All this is for forwards to which ranks bring unlike kinds of input. In others they do no more than find out that they
do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_adapters import ModelAdapter
from model_adapters.conventional import unwrap, way_to
from regate.errors import UnsupportedShardingError
from regate.output.head import embeddings, hidden_states, with_hidden_states
from regate.pace.telling import Call, alike, handed_over, where
from regate.pace.weightless import Edge, behind, edges, instead, leaf_of, tensors, with_weightless
from regate.ranks import all_say, rank, ranks
from regate.training.counters import Counters
from regate.training.hooks import Hook
from regate.undisturbed import undisturbed
from regate_patch import is_sharded


@dataclass
class _Turn:
    """A call that some ranks made for others.

    Attributes:
        led: what came out where this rank made it of its own, for others to follow.
        followed: what came out where this rank ran it for nothing.
    """

    led: list[Edge | None] = field(default_factory=list)
    followed: list[Tensor | None] = field(default_factory=list)


class Pace:
    """Watches the forwards of `model`; idle unless it is split over ranks.

    Args:
        model: as the user gave it.
        decoder: before which ranks must have run the same modules.
        adapter: says where embeddings and head are.
        counters: of the run; `forwards_joined` is counted here.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, adapter: ModelAdapter, counters: Counters) -> None:
        self._model, self._decoder, self._adapter, self._counters = model, decoder, adapter, counters
        self._split: bool | None = None  # known when training begins
        self._unlike = self._joined = self._decoding = False
        self._numbers: dict[nn.Module, int] = {}  # whose turn comes first
        self._turns: list[_Turn] = []
        self._leading: _Turn | None = None
        self._due: list[Tensor] = []  # what zeros must be sent through that came too late for the decoder's input
        self._following = False
        outer = unwrap(model)
        self._hooks = [
            outer.register_forward_pre_hook(Hook(self._set_out), with_kwargs=True),
            outer.register_forward_hook(Hook(self._arrived), always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # -- the model's forward ----------------------------------------------------------------------------

    def _set_out(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arrived()
        if ranks() == 1 or not module.training or not torch.is_grad_enabled():
            return
        if self._split is None:
            self._split = is_sharded(self._model)
        if self._split:
            self._unlike = not alike({**dict(enumerate(args)), **kwargs})
        if self._unlike and not self._numbers:
            self._watch(module)

    def _arrived(self, *args: Any) -> None:
        self._counters.forwards_joined += self._joined
        self._unlike = self._joined = self._decoding = False
        self._turns.clear()

    def _watch(self, model: nn.Module) -> None:
        """Hook onto all that may run before the decoder; before the hooks that gather its parameters."""
        watched = [*outermost(model, self._decoder, self._adapter.head(self._model))]
        watched = [*dict.fromkeys([*watched, self._adapter.embeddings(self._model)])]
        self._numbers = {module: number for number, module in enumerate(watched)}
        for module in watched:
            self._hooks += [
                module.register_forward_pre_hook(Hook(self._before), prepend=True, with_kwargs=True),
                module.register_forward_hook(Hook(self._after)),
            ]
        self._hooks += [
            self._decoder.register_forward_pre_hook(Hook(self._before_decoder), prepend=True, with_kwargs=True),
            self._decoder.register_forward_hook(Hook(self._after_decoder), always_call=True),
        ]

    # -- on the way -------------------------------------------------------------------------------------

    def wait(self, *, embedded: bool | None = None) -> None:
        """Let the others come here, and run until then what they run. Every rank must call it equally often.

        Args:
            embedded: is the language model called with embeddings?

        Raises:
            UnsupportedShardingError: it is on some ranks alone, and embeddings are split over ranks by themselves.
        """
        if self._unlike:
            self._walk(len(self._numbers), None)
            if embedded is not None:
                self._refuse_unlike(embedded)

    def _refuse_unlike(self, embedded: bool) -> None:
        """Where ids are looked up in the decoder, ranks that did so before it have looked them up unlike often."""
        if len(set(all_say(embedded))) > 1 and is_sharded(self._adapter.embeddings(self._model)):
            raise UnsupportedShardingError(
                f"{type(self._decoder).__name__} is called with ids on ranks without images and with embeddings on "
                "others, where embeddings are split over ranks by themselves: look up the ids of text alone outside, "
                "too (`get_input_embeddings()(input_ids)`), or give each rank's batch an image, such as one that "
                "counts for nothing"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_on_the_way(module):
            self._walk(self._numbers[module], Call(args, kwargs, torch.is_grad_enabled()))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._leading is not None and not self._following:
            self._leading.led, self._leading = edges(output), None

    def _is_on_the_way(self, module: nn.Module) -> bool:
        """Embeddings are looked up at other times, too: by the decoder, and without gradients by the gate."""
        if not self._unlike or self._following or self._decoding:
            return False
        return torch.is_grad_enabled() or module is not self._adapter.embeddings(self._model)

    def _walk(self, own: int, call: Call | None) -> None:
        """Until it is the turn of `own`, follow the ranks whose turn comes first."""
        while True:
            standing = where(own, call.size if call is not None else 0)
            turn = min(number for number, _ in standing)
            if all(number == turn for number, _ in standing):
                return
            self._turns.append(_Turn())
            leader = min((size, of_rank) for of_rank, (number, size) in enumerate(standing) if number == turn)[1]
            module = next(module for module, number in self._numbers.items() if number == turn)
            sent = handed_over(call if rank() == leader else None, leader, type(module).__name__)
            if turn == own:
                self._leading = self._turns[-1] if rank() == leader else None
                return
            self._turns[-1].followed = tensors(self._run_aside(module, sent))

    def _run_aside(self, module: nn.Module, call: Call) -> Any:
        """What the module gives, leaving no trace."""
        self._following = self._joined = True
        try:
            with undisturbed(module), torch.set_grad_enabled(call.gradients):
                return module(*call.args, **call.kwargs)
        finally:
            self._following = False

    # -- at the decoder ---------------------------------------------------------------------------------

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._unlike or not torch.is_grad_enabled():
            return None
        self.wait()
        self._decoding = True
        embedded = embeddings(args, kwargs)
        self._refuse_unlike(embedded is not None)
        due = self._made_use_of((args, kwargs))
        if due and embedded is not None:
            changed = with_weightless(embedded, due)
            return instead(args, embedded, changed), instead(kwargs, embedded, changed)
        self._due = due  # it embeds ids by itself
        return None

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._decoding, due, self._due = False, self._due, []
        if not due or output is None:  # None where it raised
            return None
        return with_hidden_states(output, with_weightless(hidden_states(output), due))

    def _made_use_of(self, call: Any) -> list[Tensor]:
        """Of what came out of modules that this rank ran for nothing: that which the others' decoders take."""
        if not self._turns:
            return []
        used, own = behind(call), self._loose()
        mine = {name for name, parameter in own.items() if any(leaf_of(edge) is parameter for edge in used)}
        said = all_say(([[edge in used for edge in turn.led] for turn in self._turns], mine))
        due: list[Tensor] = []
        left: list[_Turn] = []
        for number, turn in enumerate(self._turns):
            flags: list[bool] = next((led[number] for led, _ in said if led[number]), [])  # its leader's
            followed = zip(turn.followed, flags, strict=bool(turn.followed))
            due += [x for x, flag in followed if flag and x is not None and x.requires_grad]
            left += [turn] if any(flags) else []  # others were of a run of the model that is over
        self._turns = left
        names = set[str]().union(*(names for _, names in said)) - mine
        return due + [own[name] for name in sorted(names)]

    def _loose(self) -> dict[str, Tensor]:
        """Parameters that belong to no module on the way, but to those around the decoder: a separator of rows, say."""
        around = way_to(unwrap(self._model), self._decoder)[:-1]
        found = {f"{i}.{name}": p for i, part in enumerate(around) for name, p in part.named_parameters(recurse=False)}
        return {name: parameter for name, parameter in found.items() if parameter.requires_grad}


def outermost(model: nn.Module, decoder: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters that `model` and what lies between it and its decoder call, but for the head."""
    way = way_to(model, decoder)
    waiting = [part for holder in way[:-1] for part in holder.children() if part not in way]
    hidden = set(head.modules())
    while waiting:
        module = waiting.pop(0)
        if type(module).forward is nn.Module.forward:  # a list of modules, which nobody calls
            waiting = [*module.children(), *waiting]
        elif hidden.isdisjoint(module.modules()) and any(True for _ in module.parameters()):
            yield module
