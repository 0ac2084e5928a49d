"""Auxiliary losses of mixture-of-experts routers, over the tokens that were computed.

Models that balance their experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6) average router scores over
the tokens of `attention_mask`, by a function `load_balancing_loss_func` of their own file. Router scores of elided
positions do not exist, so that mask must be the computed positions.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from model_adapters.recording import install_recording
from model_adapters.replaced import replaced
from regate.errors import HiddenStatesError
from regate.output.outputs import get
from regate.output.withheld import watched
from regate_patch import to_device

_NAME = "load_balancing_loss_func"
_FLAG = "output_router_logits"
_MIXTRAL = "transformers.models.mixtral.modeling_mixtral"  # whose function TRL's fused head takes for every model


def is_balanced(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Does this call add a router loss?"""
    if not _files(model):
        return False
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    asked = batch.get(_FLAG)
    return bool(getattr(text, _FLAG, False) or getattr(config, _FLAG, False) if asked is None else asked)


@contextlib.contextmanager
def balanced_over(model: nn.Module, decoder: nn.Module, active: Callable[[], Tensor]) -> Iterator[None]:
    """While the model runs, its router loss counts the positions `active()`, bool [B, S], asked after the decoder."""
    install_recording(model, decoder)
    with contextlib.ExitStack() as scope:
        for file in _files(model, *([import_module(_MIXTRAL)] if "trl" in sys.modules else [])):
            scope.enter_context(_counting(file, active))
        yield


def _files(model: nn.Module, *others: Any) -> list[Any]:
    """Those of the model's classes, of which a wrapper may have made another (FSDP2), that have the function."""
    modules = dict.fromkeys([*(sys.modules.get(kind.__module__) for kind in type(model).__mro__), *others])
    return [module for module in modules if hasattr(module, _NAME)]


@contextlib.contextmanager
def _counting(file: Any, active: Callable[[], Tensor]) -> Iterator[None]:
    original = getattr(file, _NAME)

    @functools.wraps(original)
    def over_active(gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Any = None) -> Any:
        return original(gate_logits, num_experts, top_k, active().long())

    with replaced(file, **{_NAME: over_active}):
        yield


def watch_scores(output: Any, left_out: Tensor) -> Any:
    """The output, in which routers' scores complain of a loss that reads them where nothing is, bool [B, S]."""
    scores = get(output, "router_logits")
    if not isinstance(scores, tuple) or not hasattr(output, "router_logits"):
        return output
    where = to_device(left_out, scores[0].device)
    output.router_logits = tuple(
        watched(x.reshape(*left_out.shape, -1), where, _complain).reshape(x.shape)
        if x.numel() == left_out.numel() * x.shape[-1]
        else x
        for x in scores
    )
    return output


def _complain(read: Tensor) -> None:
    if read:
        raise HiddenStatesError(
            f"a loss outside the model reads outputs.router_logits at {int(read)} positions that were not computed: "
            "padding, and what a sparse step leaves out. Read them where gate.last.active says, or train with "
            "regate.Config(logits='all'), whose full steps compute padding, too"
        )
