"""Find the adapter for a model: registered ones first, then plug-ins, then those here, then the conventions."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from torch import nn

from model_adapters import conventional
from model_adapters.anyres import ANYRES
from model_adapters.base import ModelAdapter
from model_adapters.blip import BLIP
from model_adapters.chameleon import CHAMELEON
from model_adapters.errors import AdapterError
from model_adapters.experts import ERNIE, STEP
from model_adapters.gemma import GEMMA_3N, GEMMA_4
from model_adapters.git import GIT
from model_adapters.idefics import IDEFICS
from model_adapters.internvl_chat import INTERNVL_CHAT
from model_adapters.minicpm import MINICPM
from model_adapters.videochat2 import VIDEOCHAT2
from model_adapters.videollama2 import VIDEOLLAMA2

ENTRY_POINTS = "regate.adapters"
_HERE = (
    ANYRES, BLIP, CHAMELEON, ERNIE, GEMMA_3N, GEMMA_4, GIT, IDEFICS, INTERNVL_CHAT, MINICPM, STEP, VIDEOCHAT2,
    VIDEOLLAMA2,
)  # fmt: skip
_BUILT_IN = {name: adapter for adapter in _HERE for name in adapter.serves}
_REGISTERED: dict[str, ModelAdapter] = {}


def register_adapter(adapter: ModelAdapter) -> ModelAdapter:
    """Serve `adapter.serves` with this adapter from now on; the last registration wins. Returns it."""
    if not adapter.serves:
        raise AdapterError("an adapter must say which model types or class names it serves")
    for name in adapter.serves:
        _REGISTERED[name] = adapter
    return adapter


@cache
def _plug_ins() -> dict[str, ModelAdapter]:
    """Adapters of installed packages: entry points of the group `regate.adapters`."""
    adapters = [point.load() for point in entry_points(group=ENTRY_POINTS)]
    return {name: adapter for adapter in adapters for name in adapter.serves}


def names_of(model: nn.Module) -> list[str]:
    """The names under which adapters may serve the model: its config's type and its class names."""
    inner = conventional.unwrap(model)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    names = [cls.__name__ for cls in type(inner).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    return ([model_type] if model_type else []) + names


def find_adapter(model: nn.Module) -> ModelAdapter:
    """The adapter that serves `model`.

    Raises:
        AdapterError: none is registered and the model does not follow the conventions; says what was searched.
    """
    names = names_of(model)
    for table in (_REGISTERED, _plug_ins(), _BUILT_IN):
        for name in names:
            if name in table:
                return table[name]
    inner = conventional.language_model(model)
    missing = conventional.missing_conventions(inner)
    if missing:
        known = ", ".join(sorted({*_REGISTERED, *_plug_ins()})) or "none"
        raise AdapterError(
            f"no adapter serves {type(inner).__name__} (searched for {', '.join(names)}; registered: {known}), "
            f"and it does not follow the Hugging Face conventions: it lacks {', '.join(missing)}. "
            "Register one with regate.register_adapter(regate.ModelAdapter(serves=(...), ...))."
        )
    return ModelAdapter(serves=tuple(names[:1]))
