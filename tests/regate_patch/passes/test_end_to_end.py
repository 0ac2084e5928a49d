"""Rows of different lengths laid end to end, and samples of one row kept apart: as in rows of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import regate_patch
from model_adapters import conventional
from model_adapters.checkpointing import followable_checkpoints
from regate_patch import Active
from regate_patch.attention import attend
from tests import oracle
from tests.regate_patch.passes.test_causal import SMALL
from tests.zoo import CORE
from tests.zoo.releases import INDUCTOR_ON_CPU


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[5], [3, 0, 1, 7], [1, 1, 1]])
def test_attention_of_samples(heads: int, lengths: list[int]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    query = torch.randn(1, total, 4, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(1, heads, total, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (owner[:, None] == owner) & torch.ones(total, total, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    got = attend(query, key, value, starts, max(lengths), 0.3)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    grads = (torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (got, expected))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_under_autocast() -> None:
    """In the dtype in which SDPA takes it there."""
    query = torch.randn(1, 4, 6, 8)
    key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(query, key, value, torch.tensor([0, 6], dtype=torch.int32), 6, None)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


@pytest.mark.few(2)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "qwen3_vl_moe"])
def test_exact(name: str, rows: int) -> None:
    """Rotary angles of one row and of all, M-RoPE, features listed by a mask, routers that see a flat list."""
    torch._dynamo.reset()
    model, batch = CORE[name].double(), oracle.double(CORE[name].batch("left", rows=rows))
    active = oracle.random_active(batch) & batch["attention_mask"].bool()
    active[-1, -5:] = False  # short, and not because of padding
    handle = regate_patch.patch(conventional.decoder(model), backend="eager", padding_elided=True)
    got = oracle.run(model, batch, regate_patch.active(active), active)
    assert [graph.end_to_end for graph in handle.statistics.graphs] == [True]
    handle.remove()
    oracle.assert_same(got, oracle.masked(model, batch, active))
    by_rows = oracle.engine(model, batch, active, padding_elided=True, disable=["end_to_end"])
    oracle.assert_same(got, by_rows)


def test_what_is_read() -> None:
    """The tail runs at fewer positions; nobody knows on the host how many there are."""
    torch._dynamo.reset()
    model, batch = CORE["llava"].double(), oracle.double(CORE["llava"].batch("right", rows=3))
    active = oracle.random_active(batch) & batch["attention_mask"].bool()
    read = active & (torch.rand(active.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    expected = oracle.masked(model, batch, active).output * read[..., None]
    chosen = Active.from_mask(active).reading(read)
    handle = regate_patch.patch(model.model.language_model, backend="eager", padding_elided=True)
    for _ in range(2):  # the first call reads everything
        got = oracle.run(model, batch, regate_patch.active(chosen), read)
        torch.testing.assert_close(got.output, expected, atol=1e-10, rtol=0)
    assert handle.statistics.last[0].tail


def test_inductor() -> None:
    """One artefact for other numbers of rows and positions."""
    torch._dynamo.reset()
    model = CORE["llava"].double()
    handle = regate_patch.patch(model.model.language_model, backend="inductor", padding_elided=True)
    for rows in (2, 5, 3):
        batch = oracle.double(CORE["llava"].batch("right", rows=rows, seed=rows))
        active = oracle.random_active(batch, seed=rows) & batch["attention_mask"].bool()
        got = oracle.run(model, batch, regate_patch.active(active), active)
        oracle.assert_same(got, oracle.masked(model, batch, active), tolerance=1e-6)  # float32 in its norms
    assert (len(handle.statistics.graphs), handle.statistics.recompiles) == (1, 0)


@pytest.mark.few(2)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=INDUCTOR_ON_CPU)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_graph_per_layer(name: str, checkpointing: bool, backend: str) -> None:
    """As where parameters are sharded: the graph that makes the mask tells those of the layers what it says."""
    torch._dynamo.reset()
    model, batch = CORE[name].build().double(), oracle.double(CORE[name].batch("right"))
    active = oracle.random_active(batch)
    expected = oracle.masked(model, batch, active)
    oracle.cut_between_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    graphs: list[str] = []
    with followable_checkpoints(conventional.decoder(model)):
        got = oracle.engine(
            model, batch, active, allow_graph_breaks=True, padding_elided=True, backend=backend,
            observe=lambda name, gm: graphs.append(str(gm.graph)) if name == "insert" else None,
        )  # fmt: skip
    oracle.assert_same(got, expected, tolerance=1e-10 if name == "llava" and backend == "eager" else 1e-6)
    assert all("attn_mask" not in graph and "regate_patch.attention.attend" in graph for graph in graphs)
    assert graphs


@pytest.mark.few(3)
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize("leap", [False, True])
@pytest.mark.parametrize("apart", [False, True], ids=["whole", "a graph per layer"])
def test_samples_of_a_row_are_apart(config: Any, leap: bool, apart: bool) -> None:
    """A packed row equals rows of their own, whether position ids begin again or leap."""
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_config(config(**SMALL)).double()
    lengths = (5, 1, 4)
    ids = torch.arange(20).reshape(2, 10)
    places = torch.cat([torch.arange(n) + leap * 20 * i for i, n in enumerate(lengths)]).expand(2, -1)
    mask = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.7
    owner = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1) + torch.tensor([[0], [3]])
    counts = tuple(owner[mask].unique_consecutive(return_counts=True)[1].tolist())
    chosen = replace(Active.from_mask(mask), samples=counts)
    decoder = conventional.decoder(model)
    handle = regate_patch.patch(decoder, backend="eager", padding_elided=True, allow_graph_breaks=apart)
    if apart:
        oracle.cut_between_layers(model)
    with regate_patch.active(chosen):
        got = decoder(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
    assert (
        [(graph.causal, graph.apart) for graph in handle.statistics.last] == [(1, True)] * 2 if apart else [(2, True)]
    )
    handle.remove()
    for i in range(6):
        own = (owner == i) & mask
        together = {"attention_mask": torch.ones(1, int(own.sum()), dtype=torch.long)}  # though its ids leap now
        with torch.no_grad():
            alone = decoder(input_ids=ids[own][None], position_ids=places[own][None], use_cache=False, **together)
        torch.testing.assert_close(got[own], alone.last_hidden_state[0], atol=1e-10, rtol=0)


class _PerRow(nn.Module):
    """A layer that turns the stream by a vector of each row's, as models with a condition do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states * condition[:, None])[:, None]
            hidden_states = hidden_states + F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
        return hidden_states


def test_a_value_per_row_keeps_rows() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    decoder = _PerRow().double()
    x, condition = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    handle = regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(mask):
        got = decoder(x, condition)
    assert [graph.end_to_end for graph in handle.statistics.graphs] == [False]
    handle.remove()
    for row in range(2):
        alone = decoder(x[row][mask[row]][None], condition[row][None])
        torch.testing.assert_close(got[row][mask[row]], alone[0])


def test_no_active_position_at_all() -> None:
    torch._dynamo.reset()
    model, batch = CORE["llava"].double(), oracle.double(CORE["llava"].batch("right"))
    nothing = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    expected = oracle.masked(model, batch, nothing)
    got = oracle.engine(model, batch, nothing, padding_elided=True)
    oracle.assert_same(got, expected)
