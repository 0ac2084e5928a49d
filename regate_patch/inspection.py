"""Look at a decoder without patching it and without its weights: what would be computed on active positions?"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from regate_patch.capture import GatedForward, tracing
from regate_patch.compiling import with_own_code
from regate_patch.errors import NoBlocksError
from regate_patch.passes.rewrite import rewrite, switched_off
from regate_patch.statistics import Statistics
from regate_patch.unseen import switched_off_by


def inspect(decoder: nn.Module, *args: Any, visible: bool = False, **kwargs: Any) -> Statistics:
    """Capture and rewrite `decoder` as called with these arguments, padding elided, and run the call dense.

    If `visible`, for active positions that see those that are not computed.

    Decoder and arguments may be on the "meta" device, where no weight exists and nothing is computed.

    Returns:
        what was found: blocks, graphs, FLOPs. Nothing stays on the decoder.

    Raises:
        NoBlocksError, UnsupportedGraphError: as a patched decoder would inside `active(...)`.
    """
    statistics = Statistics()
    looking = weakref.ref(statistics)  # Dynamo keeps every backend that it was ever given

    def look(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewritten, found = rewrite(gm, padding_elided=True, visible=visible, disable=switched_off()), looking()
        assert found is not None
        if rewritten is None:
            found.other_graphs += 1
        else:
            found.graphs.append(rewritten)
        return gm.forward

    standing: Any = decoder.forward
    forward = standing.forward if isinstance(standing, GatedForward) else standing
    with tracing(decoder):
        torch.compile(with_own_code(forward), backend=look, dynamic=True, fullgraph=True)(*args, **kwargs)
    statistics.last = tuple(statistics.graphs)
    if not statistics.attention + statistics.mlp:
        cause = switched_off_by()
        raise NoBlocksError(f"no attention block was found in {type(decoder).__name__}{f': {cause}' if cause else ''}")
    return statistics
