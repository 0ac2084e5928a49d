"""One artefact serves every batch size, length and number of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import regate_patch
from model_adapters import conventional
from regate_patch.analysis.graph import is_call
from tests.zoo import CORE

SHAPES = [(b, s, k) for b in (2, 3, 5) for s, k in ((14, 4), (17, 17), (23, 3), (23, 9), (31, 2), (32, 5), (40, 16))]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_shapes_share_one_graph(name: str) -> None:
    compiled = []

    def counting(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(gm)
        return gm.forward

    decoder = conventional.decoder(CORE[name].build())
    handle = regate_patch.patch(decoder, backend=counting)
    assert len(set(SHAPES)) >= 20
    for b, s, k in SHAPES:
        index = torch.stack([torch.randperm(s)[:k].sort().values for _ in range(b)])
        x = torch.randn(b, s, 32, requires_grad=True)
        with regate_patch.active(index):
            out = decoder(inputs_embeds=x, attention_mask=torch.ones(b, s, dtype=torch.long), use_cache=False)
        out.last_hidden_state.sum().backward()
    assert len(handle.statistics.graphs) == 1
    assert len(compiled) == 1  # the inner compiler got one graph, and the whole of it
    linears = sum(is_call(n, torch._C._nn.linear, torch.nn.functional.linear) for n in compiled[0].graph.nodes)
    assert linears == 2 * 7
