"""Capture a decoder with Dynamo, rewrite what it captured, and stand in for `decoder.forward`.

Outside `active(...)` the decoder's own forward runs, untouched. Inside, `torch.compile` calls it with a private
backend: each captured graph is rewritten (`regate_patch.passes.rewrite`) and run through the inner backend with the
active positions of the moment. Sizes are symbols throughout, so one artefact serves every B, S and K.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import torch
import torch._dynamo
import torch.fx.experimental._config as shape_config
from torch import fx, nn
from torch.utils import _pytree as pytree

from regate_patch.captured import Captured, Options, Run
from regate_patch.compiling import Backend, known, with_own_code
from regate_patch.context import Active, active, current
from regate_patch.errors import (
    ActiveIndexError,
    NoBlocksError,
    NotElidedError,
    PatchError,
    UnsupportedGraphError,
)
from regate_patch.passes.rewrite import Observer, Rewrite, switched_off
from regate_patch.sharding import is_sharded, uncaptured, usual_linear
from regate_patch.statistics import Statistics
from regate_patch.unseen import SwitchedOffError, active_mode, forbidden_by, switched_off_by

log = logging.getLogger("regate_patch")
OnUnsupported = Literal["raise", "warn"]

_DYNAMO: dict[str, Any] = {
    "specialize_float": True,  # eps and scales are numbers, not inputs
    "specialize_int": True,  # and so are counts such as logits_to_keep; sizes of tensors stay symbols
    "capture_dynamic_output_shape_ops": True,  # x[mask]
    "capture_scalar_outputs": True,
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
    "fail_on_recompile_limit_hit": True,  # never fall back to eager, where nothing would be elided
    # Decoders that Dynamo cuts at their layers share these layers' code: two entries a gate, of gone ones, too.
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 1024,
    "optimize_ddp": False,  # cuts graphs at gradient buckets: blocks would no longer be whole
}

_OFFLOADED = (
    "its checkpoints keep what they save on the host, which no graph can hold: checkpoint without that (in "
    "transformers' settings, without offload=True). "
)


@contextlib.contextmanager
def tracing(decoder: nn.Module, *, guard_hooks: bool = False) -> Iterator[None]:
    """Settings under which a token axis stays a symbol of its own (equal sizes must not share one); typed errors.

    With `guard_hooks`, Dynamo looks at each call whether hooks were put on: layers that are captured each on its own
    share what was compiled of them, which outlives `GatedForward.compiled`.
    """
    guarded: dict[str, Any] = {"skip_nnmodule_hook_guards": False} if guard_hooks else {}
    with torch._dynamo.config.patch(**_DYNAMO, **guarded), shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        try:
            yield
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, PatchError):
                raise error.inner_exception from error.inner_exception.__cause__
            raise
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            advice = _OFFLOADED if "save_on_cpu" in str(error) else forbidden_by(error)
            raise UnsupportedGraphError(
                f"{type(decoder).__name__} cannot be captured as one graph, so not all of it would run on active "
                f"positions: {advice}{error}"
            ) from None
        except torch._dynamo.exc.InternalTorchDynamoError as error:
            raise UnsupportedGraphError(
                f"torch {torch.__version__} failed within itself while it captured {type(decoder).__name__}; another "
                f"release may not: {error}"
            ) from error
        except RuntimeError as error:
            if "no compiled frames" not in str(error) or (cause := switched_off_by()) is None:
                raise
            raise SwitchedOffError(f"no attention block was found in {type(decoder).__name__}: {cause}") from None


class GatedForward:
    """The callable that replaces `decoder.forward`. Copying or pickling it gives the original forward."""

    def __init__(
        self,
        decoder: nn.Module,
        backend: Backend,
        on_unsupported: OnUnsupported,
        allow_graph_breaks: bool | None,
        padding_elided: bool,
        visible: bool,
        disable: Collection[str],
        observe: Observer | None,
    ) -> None:
        self.decoder, self.backend, self.observe = decoder, backend, observe
        self.disable = switched_off(disable)
        self.padding_elided, self.visible = padding_elided, visible
        self.on_unsupported, self.allow_graph_breaks = on_unsupported, allow_graph_breaks
        self.forward, self._own = decoder.forward, decoder.__dict__.get("forward")
        self.statistics = Statistics()
        self.whole: set[Rewrite] = set()  # graphs that were seen to be all of the decoder: only its caller reads them
        self.compiled: Run | None = None
        self.unhooked: list[dict[int, Any]] = []  # the decoder's dicts of hooks that were empty when it was captured
        self.linear: Callable[..., Any] = torch.nn.functional.linear  # by which linear operations run, not captured
        functools.update_wrapper(self, self.forward, updated=())
        self.__signature__ = inspect.signature(self.forward)

    @torch.compiler.disable(recursive=False)  # a user's outer torch.compile must call this, not see through it
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = current()
        if chosen is None or self.statistics.failed is not None:
            return self.forward(*args, **kwargs)
        if not isinstance(chosen, Active):
            found = chosen(*args, **kwargs)
            if found is None:
                return self.forward(*args, **kwargs)
            with active(found):
                return self(*args, **kwargs)
        _check_length(chosen, args, kwargs)
        chosen.streams.clear()
        if any(self.unhooked):  # Dynamo guards hooks only where some hung: what it captured lacks the new ones
            self._forget()
        self.statistics.skipped = False
        ran_before, graphs_before = len(chosen.ran), len(self.statistics.graphs) + self.statistics.other_graphs
        try:
            output = self._run(*args, **kwargs)
            self._check_ran(chosen.ran[ran_before:], graphs_before, output)
        except (UnsupportedGraphError, NoBlocksError) as error:
            self._give_up(error)
            return self.forward(*args, **kwargs)
        return output

    def captures(self) -> bool:
        """See `Handle.captures`."""
        self.statistics.skipped, cause = False, switched_off_by()
        if cause is not None and self.statistics.failed is None:
            self._give_up(self._unseen(cause))
        return cause is None and self.statistics.failed is None

    def _unseen(self, cause: str) -> SwitchedOffError:
        return SwitchedOffError(f"no attention block can be found in {type(self.decoder).__name__}: {cause}")

    def _give_up(self, error: PatchError) -> None:
        """Run every position, in this call or from now on, if `on_unsupported` allows it."""
        if self.on_unsupported == "raise":
            raise error
        self.statistics.skipped = isinstance(error, SwitchedOffError)
        if not self.statistics.skipped:
            self.statistics.failed = str(error)
        if str(error) not in self.statistics.causes:
            self.statistics.causes.append(str(error))
            since = "where that is so" if self.statistics.skipped else "from now on"
            log.warning("%s runs dense %s: %s", type(self.decoder).__name__, since, error)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        looks = self.compiled is None or active_mode() is not None  # code that Dynamo skips once it skips ever after
        if looks and (cause := switched_off_by()) is not None:
            raise self._unseen(cause)
        if self.compiled is None:  # only now: the decoder may have been sharded since `patch`
            if self.allow_graph_breaks is None:
                self.allow_graph_breaks = is_sharded(self.decoder)
            uncaptured(self.decoder)
            capture = weakref.WeakMethod(self._capture)  # Dynamo keeps every backend that it was ever given
            self.compiled = torch.compile(
                with_own_code(self.forward),
                backend=lambda gm, inputs: capture()(gm, inputs),  # type: ignore[misc]
                dynamic=True,
                fullgraph=not self.allow_graph_breaks,
            )
        with tracing(self.decoder, guard_hooks=bool(self.allow_graph_breaks)), usual_linear() as self.linear:
            return self.compiled(*args, **kwargs)

    def _capture(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Run:
        """The private backend."""
        several = bool(self.allow_graph_breaks)
        self.unhooked = [] if several else without_hooks(self.decoder)
        options = Options(
            decoder=type(self.decoder).__name__,
            backend=self._backend(),
            several=several,
            padding_elided=self.padding_elided,
            visible=self.visible,
            disable=self.disable,
            observe=self.observe,
            linear=self.linear,
        )
        return Captured(gm, options, self.statistics, self.whole).ready_for(example_inputs)

    def _backend(self) -> Backend:
        """What "auto" means where the decoder is by now."""
        if self.backend != "auto":
            return self.backend
        return "inductor" if next(self.decoder.parameters()).is_cuda else "eager"

    def _forget(self) -> None:
        """Capture anew at the next call."""
        self.compiled = None
        self.whole.clear()
        self.statistics.forget()

    def _check_ran(self, ran: list[Rewrite], graphs_before: int, output: Any) -> None:
        statistics, name = self.statistics, type(self.decoder).__name__
        blocks, expected = sum(r.attention + r.mlp for r in ran), statistics.attention + statistics.mlp
        if blocks == 0 and (cause := switched_off_by()) is not None:
            raise SwitchedOffError(f"{name} ran, but no attention block was found: {cause}")
        if blocks == 0:
            raise NoBlocksError(
                f"{name} ran, but no attention block was found in the {statistics.other_graphs} graph(s) captured "
                "from it (searched: scaled dot-product attention; softmax between matrix products). "
                "Use attn_implementation='sdpa' or 'eager', and check that this module holds the decoder layers."
            )
        statistics.put_elsewhere = 0
        if len(ran) == 1:
            self.whole.add(ran[0])
            returned = sum(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(output))
            statistics.put_elsewhere = max(ran[0].handed_out - max(returned, 1), 0)
        elif self.whole.intersection(ran):
            raise NotElidedError(f"{name} ran in several graphs one that was all of it before")
        if self.allow_graph_breaks and blocks < expected:  # else it is one graph, and all of it ran
            raise NotElidedError(
                f"{name} ran {blocks} rewritten blocks where it has {expected}: part of it fell back to "
                "running every position. Run with TORCH_LOGS=graph_breaks,recompiles to see why."
            )
        if statistics.calls:
            statistics.recompiles += len(statistics.graphs) + statistics.other_graphs - graphs_before
        statistics.calls += 1
        statistics.last = tuple(ran)

    def give_back(self) -> None:
        """Let the decoder's forward be what it was."""
        if self._own is None:
            del self.decoder.forward
        else:
            self.decoder.forward = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return class_forward(memo.get(id(self.decoder), self.decoder))

    def __reduce__(self) -> Any:
        return class_forward, (self.decoder,)


def without_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """The dicts in which hooks of its parts would stand, where none does. One that is put on later shows in them.

    To ask `any` of them is the cheapest way to see it: guards of Dynamo's cost a few times as much, at each call.
    """
    hooks = (
        of
        for part in module.modules()
        if part is not module  # its own run around the forward that is captured
        for of in (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
    )
    return [of for of in hooks if not of]


def class_forward(module: nn.Module) -> types.MethodType:
    """The forward that a module has by its class, whatever stands in for it."""
    return types.MethodType(type(module).forward, module)


@torch.compiler.disable
def _check_length(chosen: Active, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The batch must have the index's rows and reach as far as its positions."""
    for name in ("inputs_embeds", "input_ids", "hidden_states"):
        x = kwargs.get(name)
        if x is None and name == "hidden_states" and args and isinstance(args[0], torch.Tensor):
            x = args[0]
        if not isinstance(x, torch.Tensor) or x.dim() < 2:
            continue
        rows, length = x.shape[:2]
        if rows != chosen.index.shape[0] or chosen.index.shape[1] > length:
            raise ActiveIndexError(
                f"active positions are {list(chosen.index.shape)} ([B, K]), but `{name}` is {list(x.shape)}"
            )
        if chosen.length > length:
            raise ActiveIndexError(
                f"active positions are of a sequence of {chosen.length}, but `{name}` has {length} positions"
            )
        return


class Handle:
    """A patched decoder. `remove()` gives it back exactly as it was."""

    def __init__(self, decoder: nn.Module, gated: GatedForward) -> None:
        self._decoder = decoder
        self._gated = gated
        decoder.forward = gated

    @property
    def statistics(self) -> Statistics:
        return self._gated.statistics

    def captures(self) -> bool:
        """Can the decoder be captured, as things are around it? If not, it runs dense.

        Raises:
            NoBlocksError: it cannot, and `on_unsupported` is "raise".
        """
        return self._gated.captures()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, what is captured is for the moment: it runs eagerly, is not counted, and is forgotten."""
        moment: dict[str, Any] = {
            "compiled": None, "unhooked": [], "whole": set(), "statistics": Statistics(), "backend": "eager",
            "visible": False,
        }  # fmt: skip
        standing = {name: getattr(self._gated, name) for name in moment}
        vars(self._gated).update(moment)
        try:
            yield
        finally:
            vars(self._gated).update(standing)

    def remove(self) -> None:
        """Undo `patch`. A second call does nothing."""
        if self._decoder.__dict__.get("forward") is self._gated:
            self._gated.give_back()


def patch(
    decoder: nn.Module,
    *,
    backend: Backend | None = "inductor",
    on_unsupported: OnUnsupported = "raise",
    allow_graph_breaks: bool | None = None,
    padding_elided: bool = False,
    visible: bool = False,
    disable: Collection[str] = (),
    observe: Observer | None = None,
) -> Handle:
    """Let `decoder` compute only the active positions inside `with regate_patch.active(...)`.

    Parameters, buffers, state dict and hooks stay as they are; outside `active` nothing changes. Patching a
    decoder again replaces the first patch.

    Args:
        decoder: the module that owns the decoder layers, called with hidden states or embeddings [B, S, D].
        backend: how the rewritten graph is run: "inductor", "eager" (no compiler needed), "auto" or None (inductor if
            decoder is on CUDA when it first runs, else eager), or anything that `torch.compile(backend=...)` takes.
        on_unsupported: "raise" the errors below, or "warn" once and run every position from then on.
        allow_graph_breaks: let Dynamo cut the decoder into several graphs, for hooks that cut it between layers. What
            runs between the graphs is not looked at: it must not mix tokens. None allows it where the cuts are
            FSDP2's.
        padding_elided: a promise that no active or visible position is one that the attention mask hides. Then masks
            that say no more than "causal, without padding" give way to causal kernels.
        visible: some calls will let active positions see those that are not computed. If they cannot, the first call
            says so, whatever its own positions see.
        disable: names of passes that only save work (`regate_patch.passes.rewrite.OPTIONAL`), to be left out; the
            environment variable REGATE_DISABLE does the same.
        observe: called with (pass name, graph) after each pass, to look into the rewriter.

    Raises:
        UnknownPassError: no pass of that name can be switched off.
        UnknownBackendError: torch knows no backend of that name.

    Raises (when the decoder is first called inside `active`):
        NoBlocksError: no attention found.
        UnsupportedGraphError: a value whose token axis cannot be followed; names the node and source line.
    """
    backend = known("auto" if backend is None else backend)
    existing = decoder.__dict__.get("forward")
    if isinstance(existing, GatedForward):
        existing.give_back()
    gated = GatedForward(
        decoder, backend, on_unsupported, allow_graph_breaks, padding_elided, visible, disable, observe
    )
    return Handle(decoder, gated)
