"""Find what comes after the last attention: there each position is on its own, and only those that are read count.

A loss reads few of the decoder's positions. Those that nobody reads must still give keys and values to the last layer,
but nothing after its attention: not its output projection, not its MLP. That tail of the span is a span of its own,
computed at positions that are read; `regate_patch.passes.insert` nests it in the other.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from torch import fx

from regate_patch.analysis.blocks import Span
from regate_patch.analysis.graph import ancestors, is_call, is_tensor, shape, value
from regate_patch.analysis.mixers import SDPA
from regate_patch.analysis.tokens import Tokens


def find_tail(graph: fx.Graph, span: Span, tokens: Tokens) -> Span | None:
    """The nodes of the span that no mixer depends on; None where they cannot be cut off from the rest.

    They can where per-token values come in from fused attentions and the residual stream alone, and go out through the
    span's exit alone: the scores of a router, say, that a loss reads, too, are needed everywhere.
    """
    if span.exit is None:
        return None
    above = ancestors(graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    mixing = reduce(or_, (above[mixer] for mixer in span.mixers), 0)
    nodes = [n for n in span.nodes if not mixing >> position[n] & 1]
    inside = set(nodes)
    if any(user not in inside for n in nodes if n is not span.exit for user in n.users):
        return None
    sources = {
        s for n in nodes for s in n.all_input_nodes if s not in inside and is_tensor(s) and tokens.mentioned_by(s)
    }
    cores = {s for s in sources if s in span.mixers and is_call(s, *SDPA)}
    fused = reduce(or_, (above[core] for core in cores), 0)
    if any(not fused >> position[mixer] & 1 for mixer in span.mixers):
        return None  # an attention of several nodes, such as a softmax and the product after it, reaches in here
    stream = [n for n in [span.entry, *span.nodes] if n in sources - cores and shape(n) == shape(span.exit)]
    if not stream or len(stream) + len(cores) < len(sources) or value(stream[0]).dtype != value(span.exit).dtype:
        return None
    return Span(stream[0], span.exit, nodes, [])
