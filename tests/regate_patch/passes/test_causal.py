"""Masks that say only "causal, without padding" give way to causal kernels; all others stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config

import regate_patch
from model_adapters import conventional
from tests import oracle
from tests.zoo import CORE

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attn_implementation": "sdpa",
}


@pytest.mark.few(2)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_exact(name: str, padding: Any) -> None:
    model, batch = CORE[name].build().double(), oracle.double(CORE[name].batch(padding))
    active = oracle.random_active(batch)
    graphs: list[Any] = []
    got = oracle.engine(
        model, batch, active, padding_elided=True, observe=lambda name, gm: graphs.append((name, str(gm.graph)))
    )
    expected = oracle.masked(model, batch, active)
    oracle.assert_same(got, expected, tolerance=1e-10 if name != "gemma3" else 1e-6)
    after = dict(graphs)
    # Gemma 3's image tokens see each other in both directions.
    assert after["causal"].count("is_causal: True") == (0 if name == "gemma3" else 2)
    assert ("hide_filling" in after["insert"]) == (name == "gemma3")


def _causal(model: nn.Module, **inputs: torch.Tensor) -> list[tuple[int, int]]:
    """(attentions, those that run a causal kernel) of each graph of a decoder on half of its positions."""
    handle = regate_patch.patch(conventional.decoder(model), backend="eager", padding_elided=True)
    ids = torch.arange(20).reshape(2, 10)
    with regate_patch.active(torch.tensor([[0, 2, 3, 6, 7], [0, 1, 5, 6, 7]])):
        model(input_ids=ids, use_cache=False, **inputs)
    return [(graph.attention, graph.causal) for graph in handle.statistics.graphs]


@pytest.mark.few(2)
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, GemmaConfig])
@pytest.mark.parametrize("masked", [True, False])
def test_causal_decoders(config: Any, masked: bool) -> None:
    model = AutoModelForCausalLM.from_config(config(**SMALL))
    inputs = {"attention_mask": torch.ones(2, 10, dtype=torch.int64)} if masked else {}
    assert _causal(model, **inputs) == [(2, 2)]


@pytest.mark.parametrize(("window", "causal"), [(4, 0), (300, 2), (100_000, 2)])
def test_windows(window: int, causal: int) -> None:
    """One that is wider than the sequence hides nothing."""
    model = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=window))
    assert _causal(model, attention_mask=torch.ones(2, 10, dtype=torch.int64)) == [(2, causal)]


@pytest.mark.parametrize("layers", [1, 2])
def test_sequences_longer_than_the_window(layers: int) -> None:
    """They get the mask back; shorter ones still do without. Exact on both sides of the window's edge.

    In one graph, or, with 1 layer in each, in two that are given the mask of another.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=40)).double()
    if layers == 1:
        oracle.cut_between_layers(model)
    decoder = conventional.decoder(model)
    handle = regate_patch.patch(decoder, backend="eager", padding_elided=True, allow_graph_breaks=layers == 1)
    for length, causal in ((20, 2), (39, 2), (40, 0), (41, 0), (60, 0), (12, 2), (200, 0)):
        ids = torch.randint(64, (2, length))
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, -2:] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            with regate_patch.active(mask.bool()):
                found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        there = mask.bool()
        torch.testing.assert_close(found[there], expected[there], rtol=1e-5, atol=1e-5)  # Mistral's norms are float32
        assert [graph.causal for graph in handle.statistics.last] == [min(causal, layers)] * (2 // layers), length
    assert [graph.causal for graph in handle.statistics.graphs] == [layers, 0]
    assert handle.statistics.graphs[0].longest == 39
    assert handle.statistics.recompiles == (2 if layers == 1 else 1)  # the norm behind them is given a view, or none


def test_masks_of_position_ids_stay_where_nobody_tells_samples_apart() -> None:
    """Without an attention mask, position ids that restart would divide the row."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]] * 2)
    assert _causal(model, position_ids=position_ids) == [(2, 0)]


def test_masks_given_whole_stay() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    whole = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    assert _causal(model, attention_mask=whole) == [(2, 0)]


class _OfDocuments(nn.Module):
    """One attention, whose mask is made of a number per position: of its document, or 0 on padding."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.apart = nn.Linear(16, 48), apart

    def forward(self, hidden: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in self.qkv(hidden).chunk(3, -1))
        order = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        seen = numbers[:, None, :] == numbers[:, :, None] if self.apart else numbers[:, None, :] != 0
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=(seen & order)[:, None])
        return hidden + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("apart", [False, True])
def test_numbers_that_keep_documents_apart_are_no_padding_mask(apart: bool) -> None:
    decoder = _OfDocuments(apart=apart).double()
    numbers = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 2, 2, 0]])
    hidden = torch.randn(2, 8, 16, dtype=torch.float64)
    expected = decoder(hidden, numbers)
    handle = regate_patch.patch(decoder, backend="eager", padding_elided=True)
    with regate_patch.active(numbers != 0):
        found = decoder(hidden, numbers)
    assert [graph.causal for graph in handle.statistics.graphs] == [0 if apart else 1]
    torch.testing.assert_close(found[numbers != 0], expected[numbers != 0])


def test_only_if_promised() -> None:
    """Without the promise, an active position may be one that the mask hides."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    handle = regate_patch.patch(conventional.decoder(model), backend="eager")
    with regate_patch.active(torch.tensor([[0, 2, 3], [0, 1, 5]])):
        model(input_ids=torch.arange(20).reshape(2, 10), use_cache=False)
    assert [graph.causal for graph in handle.statistics.graphs] == [0]


def test_a_mask_that_is_written_into_between_graphs_stays() -> None:
    """What was proven of it no longer holds."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).double()
    first = oracle.layers_of(conventional.decoder(model))[0]

    @torch.compiler.disable
    def hide(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"][:, :, 8, 2] = False

    first.register_forward_pre_hook(hide, with_kwargs=True)
    ids, mask = torch.randint(64, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    mask[1, -1] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        handle = regate_patch.patch(
            conventional.decoder(model), backend="eager", padding_elided=True, allow_graph_breaks=True
        )
        with regate_patch.active(mask.bool()):
            found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert all(graph.causal == 0 for graph in handle.statistics.last)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
