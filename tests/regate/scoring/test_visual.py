"""Visual tokens that say what another says are left out on sparse steps."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch

import regate
from regate.errors import ConfigError
from regate.scoring.visual import thinned
from regate_patch import UnsupportedGraphError, reference
from tests import oracle
from tests.zoo import CORE, elders

SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0, logits="all", visual_keep=0.4)


def test_one_of_each_group_of_twins_stays() -> None:
    """Whatever their length, and whatever stands between them."""
    distinct = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    visual = torch.ones(2, 23, dtype=torch.bool)
    visual[:, :2] = visual[:, 22] = False
    embeddings = torch.randn(2, 23, 16, generator=torch.Generator().manual_seed(1))
    embeddings[0, 2:22] = distinct.repeat_interleave(4, 0)
    embeddings[1, 2:22] = distinct.repeat_interleave(4, 0) * torch.linspace(1, 9, 20)[:, None]
    stay = thinned(embeddings, visual, 0.25)
    assert not (stay & ~visual).any()
    for row in stay:
        groups = (row.nonzero().squeeze(1) - 2) // 4
        assert groups.tolist() == [0, 1, 2, 3, 4]


def test_autocast_chooses_as_well() -> None:
    """Between tokens that are alike to two digits."""
    embeddings = torch.randn(1, 1, 64) + 0.05 * torch.randn(1, 40, 64)
    visual = torch.ones(1, 40, dtype=torch.bool)
    expected = thinned(embeddings, visual, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(thinned(embeddings, visual, 0.7), expected)


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.5, 0.3, 0.01])
def test_count(keep: float) -> None:
    visual = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    visual[2] = False
    stay = thinned(torch.randn(3, 40, 8), visual, keep)
    assert stay.sum(1).tolist() == [ceil(keep * n - 1e-6) for n in visual.sum(1).tolist()]
    assert not (stay & ~visual).any()


@pytest.mark.few(2)
@pytest.mark.parametrize("elided", ["hidden", "visible"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_loss_and_gradients_are_the_oracles(name: str, elided: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions, M-RoPE and deepstack features stay with the tokens they belong to."""
    torch._dynamo.reset()
    model, batch = CORE[name].double(), oracle.double(CORE[name].batch("right"))
    oracle.norms_in_double(model, monkeypatch)
    gate = regate.apply(model, replace(SPARSE, elided=elided), teacher=None)
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert gate.last is not None
    visual = gate.adapter.layout(model, batch).visual
    staying = (gate.last.active & visual).sum(1)
    assert (staying >= (visual.sum(1) * 0.4).ceil()).all()
    assert (staying <= (visual.sum(1) * 0.4).ceil() + 1).all()  # one more, where it predicts the first label
    assert gate.report()["positions_computed"] == gate.last.active.sum()
    regate.remove(model)
    model.zero_grad()
    batch["labels"] = torch.where(gate.last.kept, batch["labels"], -100)
    seen = batch["attention_mask"].bool() if elided == "visible" else None
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), gate.last.active, seen):
        expected = model(**batch).loss
        expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[n], p.grad, atol=1e-9, rtol=0, msg=lambda m, n=n: f"{n}: {m}")


def test_what_cannot_stay_visible_is_refused_before_warm_up() -> None:
    """Not after it, when the first sparse step comes."""
    torch._dynamo.reset()
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    model.set_attn_implementation("eager")
    regate.apply(model, regate.Config.exact(elided="visible"), teacher=None)
    model(**batch)
    regate.apply(model, regate.Config(warmup=100, elided="visible"), teacher=None)
    with pytest.raises(UnsupportedGraphError, match=r"elided='visible'(.|\n)*attn_implementation='sdpa'"):
        model(**batch)


def test_a_dense_step_costs_the_same_whatever_is_seen() -> None:
    found = []
    for elided in ("hidden", "visible"):
        torch._dynamo.reset()
        model = CORE["llava"].build()
        gate = regate.apply(model, replace(SPARSE, elided=elided), teacher=None)  # type: ignore[arg-type]
        model(**CORE["llava"].batch("right"))
        found.append(gate.counters)
    hidden, visible = found
    assert hidden.flops_dense == visible.flops_dense
    assert hidden.flops_computed < visible.flops_computed < visible.flops_dense


def test_with_the_short_head() -> None:
    """The proof before the first step runs on thinned tokens, too; both steps thin by the same."""
    torch._dynamo.reset()
    computed, losses = [], []
    for logits in ("all", "kept"):
        model = CORE["llava"].build()
        gate = regate.apply(model, replace(SPARSE, logits=logits), teacher=None)
        losses.append([model(**CORE["llava"].batch("right", seed=seed)).loss.item() for seed in range(2)])
        computed.append(gate.report()["positions_computed"])
    assert computed[0] > computed[1]  # who reads all logits reads those after the last label, too
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_full_steps_see_everything() -> None:
    torch._dynamo.reset()
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none")
    gate = regate.apply(model, regate.Config(visual_keep=0.1), teacher=None)
    model(**batch)
    assert gate.last is not None
    visual = gate.adapter.layout(model, batch).visual
    assert (gate.last.active & visual).sum() == visual.sum() > 0


@pytest.mark.parametrize("warmup", [0, 100])
def test_no_embeddings_to_compare(warmup: int) -> None:
    torch._dynamo.reset()
    specimen = elders.MEMBERS["chameleon"]
    model = specimen.build()
    regate.apply(model, replace(SPARSE, warmup=warmup, logits="kept"), teacher=None)
    with pytest.raises(ConfigError, match="is not called with such; set visual_keep=1"):
        model(**specimen.batch("right"))
