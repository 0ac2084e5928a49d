"""Router auxiliary losses count the tokens that were computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextTopKRouter,
    load_balancing_loss_func,
)

import regate
from regate.errors import HiddenStatesError
from tests.oracle import double
from tests.zoo import CORE
from tests.zoo.examine import compacted

NAME = "qwen3_vl_moe"


def test_full_step_is_the_unpatched_model() -> None:
    model, batch = CORE[NAME].double(), double(CORE[NAME].batch("right"))
    batch["labels"][:, -2:] = -100  # positions that no label needs still count for the router
    expected = model(**batch, output_router_logits=True)
    expected.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    regate.apply(model, regate.Config(warmup=1000), teacher=None)
    got = model(**batch, output_router_logits=True)
    got.loss.backward()
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, atol=1e-10, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, atol=1e-10, rtol=0)


def test_sparse_step_counts_computed_tokens() -> None:
    """Against the routers' scores when each row's active positions run alone."""
    model, batch = CORE[NAME].double(), double(CORE[NAME].batch("right"))
    gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0), teacher=None)
    got = model(**batch, output_router_logits=True)
    assert gate.last is not None
    regate.remove(model)
    text, scores = model.config.text_config, []
    hooks = [
        m.register_forward_hook(lambda module, args, output: scores.append(output[0]))
        for m in model.modules()
        if isinstance(m, Qwen3VLMoeTextTopKRouter)
    ]
    for piece, row in zip(CORE[NAME].split(batch, 2), gate.last.active, strict=True):
        with compacted(model.model.language_model.layers, row):
            model(**piece)
    for hook in hooks:
        hook.remove()
    layers = [torch.cat(scores[i :: len(hooks)]) for i in range(len(hooks))]
    expected = load_balancing_loss_func(tuple(layers), text.num_experts, text.num_experts_per_tok)
    torch.testing.assert_close(got.aux_loss, expected, atol=1e-10, rtol=0)
    assert gate.report()["positions_computed"] < gate.report()["positions_seen"]


def test_of_trls_head_and_of_classes_made_from_the_models() -> None:
    """TRL takes the function of another file, and FSDP2 makes a class of its own from the model's."""
    trl = pytest.importorskip("trl.trainer.utils")
    got = []
    for fused in (False, True):
        model, batch = CORE[NAME].double(), double(CORE[NAME].batch("right"))
        model.__class__ = type("FSDP" + type(model).__name__, (type(model),), {"__module__": "torch.distributed.fsdp"})
        options: dict[str, Any] = {"output_router_logits": True}
        if fused:
            trl.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
            options["fused_lm_head"] = True
        gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0), teacher=None)
        got.append(model(**batch, **options).aux_loss)
        assert gate.report()["positions_computed"] < gate.report()["positions_seen"]
    torch.testing.assert_close(got[1], got[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("config", [regate.Config.exact(), regate.Config(warmup=0, cycle=1, full_steps=0)])
def test_scores_of_positions_that_were_not_computed(config: regate.Config) -> None:
    """A caller's own loss over them says so; one over computed positions goes on."""
    model, batch = CORE[NAME].double(), double(CORE[NAME].batch("right"))
    gate = regate.apply(model, config, teacher=None)
    scores = model(**batch, output_router_logits=True).router_logits[0]
    with pytest.raises(HiddenStatesError, match="router_logits at"):
        scores.logsumexp(-1).pow(2).mean().backward()
    scores = model(**batch, output_router_logits=True).router_logits[0]
    assert gate.last is not None
    scores[gate.last.active.flatten()].logsumexp(-1).pow(2).mean().backward()
