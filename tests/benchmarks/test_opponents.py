"""The dense arms to be beaten are dense training: the padded model's loss and gradients, with less computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import arms, opponents
from benchmarks.models import SIZES, build, causal_lm
from benchmarks.workloads import batch
from regate.insight.estimate import Sample

DATA = batch(Sample(6, 4, 13), 3, 256)  # rows of different lengths
WAYS = {
    "logits at labels": (False, [opponents.labelled]),
    "end to end": (True, [opponents.laid]),
    "both": (True, [opponents.laid, opponents.labelled]),
}


def _learned(model: nn.Module, forward: nn.Module, data: opponents.Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = forward(**data, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"lora": True, "checkpointing": True}], ids=["full", "lora"])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_numbers_of_the_padded_model(
    way: str, options: dict[str, bool], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opponents, "_LOGITS", chunk * SIZES["tiny"].vocabulary)
    model = build(SIZES["tiny"], device="cpu", dtype=torch.float32, **options)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)  # from zero nothing but itself would have a gradient
    loss, gradients = _learned(model, model, DATA)
    laid, collate = WAYS[way]
    data = opponents.Once(*collate)(DATA)
    if laid:
        causal_lm(model).config._attn_implementation = opponents.KERNEL
        assert data["input_ids"].shape == (1, int(DATA["attention_mask"].sum()))
    found, others = _learned(model, opponents.AtLabels(model) if "targets" in data else model, data)
    torch.testing.assert_close(found, loss)
    assert others.keys() == gradients.keys()
    assert all(float(g.abs().max()) > 0 for g in gradients.values())
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)


def test_rows_do_not_see_each_other() -> None:
    """Another first row, of the same length, leaves the second one's loss as it is."""
    model = build(SIZES["tiny"], device="cpu", dtype=torch.float32)
    model.config._attn_implementation = opponents.KERNEL
    losses = []
    for seed in (1, 2):
        data = {name: x[:2].clone() for name, x in DATA.items()}
        data["input_ids"][0] = torch.randint(3, 256, data["input_ids"][0].shape, generator=torch.manual_seed(seed))
        data["labels"][0] = -100
        losses.append(model(**opponents.laid(data), use_cache=False).loss.item())
    assert losses[0] == losses[1]


def test_compiled_arms_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that compiles nothing, and is sooner done than inductor."""
    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: own(model, **(options | {"backend": "eager"})))
    model = build(SIZES["tiny"], device="cpu", dtype=torch.float32)
    before = model.lm_head.weight.detach().clone()
    for step in arms.dense(model, "inductor").values():
        step(DATA, DATA["labels"] != -100)
        assert not torch.equal(model.lm_head.weight, before)
        before = model.lm_head.weight.detach().clone()


def test_logits_at_labels_keep_less() -> None:
    model = build(SIZES["tiny"], device="cpu", dtype=torch.float32)
    kept = {}
    for name, step in arms.dense(model, "eager").items():
        with arms.saved_bytes() as found:
            step(DATA, DATA["labels"] != -100)
        kept[name] = found["bytes"]
    assert kept["dense, both"] < min(kept["dense, logits at labels"], kept["dense, end to end"])
    assert kept["dense, logits at labels"] < kept["dense"] > kept["dense, end to end"]


def test_batches_are_collated_once() -> None:
    collated = opponents.Once(opponents.laid)
    assert collated(DATA) is collated(DATA)
    assert collated(dict(DATA)) is not collated(DATA)
