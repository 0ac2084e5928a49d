"""Pass: cancel what one block scatters against what the next one gathers.

    gather(scatter(x, y)) = y                       (on every active position)
    scatter(scatter(x, y1), y2) = scatter(x, y2)

Applied from the first block to the last, a stack of L layers keeps one gather of the stream, one gather per
distinct live-in, and one scatter: the same program on a shorter sequence.
"""

from __future__ import annotations

from torch import fx

from regate_patch import ops
from regate_patch.graph import erase_dead, is_call


def fuse(gm: fx.GraphModule) -> fx.GraphModule:
    """See the module's description. Changes `gm` in place and returns it."""
    for node in list(gm.graph.nodes):
        if is_call(node, ops.gather_tokens):
            source, index, dims, batch_dim, _ = node.args
            if is_call(source, ops.scatter_tokens) and source.args[1] is index:
                if dims == (source.args[5],) and batch_dim == source.args[6]:
                    node.replace_all_uses_with(source.args[3])
        elif is_call(node, ops.scatter_tokens):
            source = node.args[0]
            if is_call(source, ops.scatter_tokens) and source.args[1] is node.args[1]:
                x, *_, x_at_index, dim, batch_dim = source.args
                node.args = (x, *node.args[1:4], x_at_index, dim, batch_dim)
    erase_dead(gm.graph)
    gm.graph.lint()
    return gm
