"""The engine: given active positions, rewrite a decoder's graph and compute only those.

    handle = regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(index):          # [B, K] int64, ascending
        decoder(inputs_embeds=...)
    handle.remove()

Needs torch only, and knows nothing of scores, teachers or multimodal models: any rule may choose the positions.
"""

from regate_patch.capture import Backend, Handle, OnUnsupported, class_forward, patch
from regate_patch.context import Active, Rule, active, current
from regate_patch.errors import (
    ActiveIndexError,
    NoBlocksError,
    NotElidedError,
    PatchError,
    RegateError,
    UnknownBackendError,
    UnknownPassError,
    UnsupportedGraphError,
)
from regate_patch.inspection import inspect
from regate_patch.passes.rewrite import Rewrite
from regate_patch.sharding import is_sharded
from regate_patch.statistics import Statistics
from regate_patch.transfer import to_device

__all__ = [
    "Active",
    "ActiveIndexError",
    "Backend",
    "Handle",
    "NoBlocksError",
    "NotElidedError",
    "OnUnsupported",
    "PatchError",
    "RegateError",
    "Rewrite",
    "Rule",
    "Statistics",
    "UnknownBackendError",
    "UnknownPassError",
    "UnsupportedGraphError",
    "active",
    "class_forward",
    "current",
    "inspect",
    "is_sharded",
    "patch",
    "to_device",
]
