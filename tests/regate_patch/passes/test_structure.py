"""What the passes leave in the graph: counted, so that a pass that matches nothing fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from transformers import LlavaForConditionalGeneration

import regate_patch
from model_adapters import conventional
from regate_patch import ops
from regate_patch.analysis.graph import is_call
from regate_patch.passes.rewrite import count
from tests import oracle
from tests.plain import Decoder
from tests.zoo import CORE


def _observe(decoder: torch.nn.Module, call: Callable[[], None]) -> tuple[dict[str, fx.Graph], regate_patch.Handle]:
    """The graph after each pass, while `call` makes the engine capture."""
    graphs: dict[str, fx.Graph] = {}

    def observe(name: str, gm: fx.GraphModule) -> None:
        graphs[name] = _snapshot(gm)

    handle = regate_patch.patch(decoder, backend="eager", observe=observe)
    call()
    return graphs, handle


def _snapshot(gm: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return graph


def _stream_gathers(graph: fx.Graph) -> int:
    """Gathers of a [B, S, D] value: of the stream input or of a scatter's result."""
    return sum(
        is_call(n, ops.gather_tokens)
        and (is_call(n.args[0], ops.scatter_tokens) or "embeds" in str(n.args[0]) or "hidden_states" in str(n.args[0]))
        for n in graph.nodes
    )


@pytest.mark.parametrize("layers", [1, 4])
def test_plain_decoder(layers: int) -> None:
    decoder = Decoder(layers=layers)
    x = torch.randn(2, 9, 16)

    def call() -> None:
        with regate_patch.active(torch.tensor([[0, 2, 5], [1, 3, 4]])):
            decoder(x)

    _, handle = _observe(decoder, call)
    (graph,) = handle.statistics.graphs
    assert (graph.attention, graph.mlp) == (layers, layers)
    # Causal attention without a mask: no live-in at all. The tail gathers attention and stream once more.
    assert (graph.gathers, graph.scatters) == (1 + 2, 1 + 1)


@pytest.mark.few(2)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [2, 5])
def test_llava(layers: int, checkpointing: bool) -> None:
    config = CORE["llava"].config()
    config.text_config.num_hidden_layers = layers
    model = LlavaForConditionalGeneration(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = CORE["llava"].batch("right")
    active = oracle.random_active(batch)

    def call() -> None:
        with regate_patch.active(active):
            model(**batch, use_cache=False)

    graphs, handle = _observe(conventional.decoder(model), call)
    (graph,) = handle.statistics.graphs
    live_ins = 3  # cos, sin, attention mask
    assert (graph.gathers, graph.scatters) == (1 + live_ins + 2, 1 + 1)
    assert _stream_gathers(graphs["insert"]) == 1 + 1
    checkpoints = [n for n in graphs["outline"].nodes if is_call(n, torch.utils.checkpoint.checkpoint)]
    assert len(checkpoints) == (layers if checkpointing else 0)


def test_checkpointing_saves_memory() -> None:
    """The rewritten graph recomputes: it keeps fewer tensors for backward."""
    saved = {}
    for checkpointing in (False, True):
        model = CORE["llava"].build()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        regate_patch.patch(conventional.decoder(model), backend="eager")
        batch = CORE["llava"].batch("right")
        kept = []
        with (
            regate_patch.active(oracle.random_active(batch)),
            torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t),
        ):
            model(**batch, use_cache=False)
        saved[checkpointing] = sum(kept)
    assert saved[True] < 0.8 * saved[False]


def test_count_counts() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(ops.gather_tokens, (x, x, (1,), 0, 3)))
    assert count(fx.GraphModule({}, graph)) == (1, 0)
