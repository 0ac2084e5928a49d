"""The passes, in order, from a captured decoder graph to one that computes active positions only."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import fx

from regate_patch import ops
from regate_patch.analysis import flops
from regate_patch.analysis.blocks import find_span
from regate_patch.analysis.graph import erase_dead, expr, is_call, is_scalar, value
from regate_patch.analysis.mixers import find_mixers, is_attention, sequence_candidates
from regate_patch.analysis.refusals import check
from regate_patch.analysis.tokens import find_tokens
from regate_patch.passes.causal import use_causal_kernels
from regate_patch.passes.checkpointing import inline, outline
from regate_patch.passes.insert import insert
from regate_patch.passes.mutations import name_mutations
from regate_patch.passes.tail import find_tail


@dataclass(frozen=True, eq=False)
class Rewrite:
    """What was found in one captured graph and what became of it.

    Attributes:
        module: takes `(active_index, active_valid, *inputs of the captured graph)`, with a tail
            `(active_index, active_valid, read_index, read_valid, *inputs of the captured graph)`.
        attention, mlp: number of blocks of each kind.
        recurrences: operations other than attention that run along the sequence (convolutions, linear attention);
            they run over the active positions in their order.
        flops_linear, flops_quadratic: forward FLOPs of the blocks for a row that computes n positions are
            `flops_linear * n + flops_quadratic * n**2`, and `flops_tail` less for each position that is not read.
        gathers, scatters: how many the rewriter put in: one gather per live-in, one for the stream; with a tail, one
            more for the attention's result and one for the stream, and one scatter.
        causal: attentions whose mask gave way to `is_causal` (see `regate_patch.passes.causal`).
        longest: the sequence length up to which that is right: within it, no window hides anything.
        tail: does what comes after the last attention run at positions that are read (see `regate_patch.passes.tail`)?
    """

    module: fx.GraphModule
    attention: int
    mlp: int
    recurrences: int
    flops_linear: int
    flops_quadratic: int
    gathers: int
    scatters: int
    causal: int = 0
    longest: float = inf
    tail: bool = False
    flops_tail: int = 0


Observer = Callable[[str, fx.GraphModule], None]


def rewrite(
    gm: fx.GraphModule,
    *,
    whole: bool = True,
    padding_elided: bool = False,
    any_length: bool = True,
    observe: Observer | None = None,
) -> Rewrite | None:
    """Rewrite a graph that Dynamo captured; None if it holds no attention, and so nothing to elide.

    Args:
        gm: the captured graph, left as it was.
        whole: this graph should be all of the decoder: then its tail is looked for.
        padding_elided: no active position is one that the attention mask hides.
        any_length: the rewritten graph must serve sequences of any length, else those up to its `longest`.
        observe: called with each pass's name and the graph after it (for tests and debugging).

    Raises:
        UnsupportedGraphError: see `regate_patch.analysis.blocks` and `regate_patch.passes.insert`.
    """
    see = observe or (lambda name, graph: None)
    gm = _copy(gm)
    see("captured", gm)
    gm = inline(gm)
    gm = drop_assertions(gm)
    if not sequence_candidates(gm):
        return None
    gm = name_mutations(gm)
    erase_dead(gm.graph)
    see("flat", gm)
    tokens = find_tokens(gm, sequence_candidates(gm))
    span = find_span(gm, find_mixers(gm, tokens), tokens)
    check(span, tokens)
    causal, longest = use_causal_kernels(gm, span, tokens, any_length=any_length) if padding_elided else (0, inf)
    linear, quadratic = flops.polynomial(span.nodes, tokens)
    tail = find_tail(gm.graph, span, tokens) if whole else None
    flops_tail = flops.polynomial(tail.nodes, tokens)[0] if tail else 0
    gm = insert(gm, span, tail, tokens)
    see("inserted", gm)
    gathers, scatters = count(gm)
    gm = outline(gm)
    gm.recompile()
    see("outlined", gm)
    return Rewrite(
        module=gm,
        attention=span.attention,
        mlp=span.mlp,
        recurrences=sum(not is_attention(mixer) for mixer in span.mixers),
        flops_linear=linear,
        flops_quadratic=quadratic,
        gathers=gathers,
        scatters=scatters,
        causal=causal,
        longest=longest,
        tail=tail is not None,
        flops_tail=flops_tail,
    )


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed, sharing parameters and fake tensors with the original."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copied)
    graph.output(output)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(gm, graph)


def drop_assertions(gm: fx.GraphModule) -> fx.GraphModule:
    """Remove run-time assertions on sizes (they hold at full length only) and read sizes from the inputs."""
    graph = gm.graph
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and is_scalar(node):
            known.setdefault(expr(value(node)), node)
        elif is_call(node, operator.getitem) and is_call(node.args[0], "size") and is_scalar(node):
            if (same := known.get(expr(value(node)))) is not None:
                node.replace_all_uses_with(same)
        elif is_call(node, torch.ops.aten._assert_scalar.default, torch._check, torch._assert):
            graph.erase_node(node)
    erase_dead(graph)
    return gm


def count(gm: fx.GraphModule) -> tuple[int, int]:
    """(gathers, scatters) that the rewriter put into the graph."""
    gathers = sum(is_call(n, ops.gather_tokens, ops.select_tokens) for n in gm.graph.nodes)
    scatters = (ops.scatter_tokens, ops.scatter_on_zeros, ops.scatter_flat_on_zeros)
    return gathers, sum(is_call(n, *scatters) for n in gm.graph.nodes)
