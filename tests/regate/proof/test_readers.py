"""Whatever reads the decoder's output or its logits: full steps are the unpatched model, or the reader is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regate
from regate_patch import reference
from tests import oracle
from tests.steps import assert_same
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
Objective = Callable[[nn.Module, Any], Tensor]


def _made(padding: Any, name: str = "llava") -> tuple[Any, dict[str, Any]]:
    torch._dynamo.reset()
    return CORE[name].build().double(), oracle.double(CORE[name].batch(padding))


def _step(model: Any, batch: dict[str, Any], objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = objective(model, model(**batch))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _last_hidden(model: Any, output: Any) -> Tensor:
    return output.loss + output.hidden_states[-1][:, -1].pow(2).sum()


def _middle_hidden(model: Any, output: Any) -> Tensor:
    return output.loss + output.hidden_states[1].pow(2).mean()


def _seen_by_hook(model: Any, output: Any) -> Tensor:
    return output.loss + model.seen[-1][:, -1].pow(2).sum()


def _all_logits(model: Any, output: Any) -> Tensor:
    return output.loss + output.logits.pow(2).mean()


def _no_preparation(model: Any) -> None:
    pass


def _z_loss(model: Any) -> None:
    def loss(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return entropy + 1e-2 * logits.float().logsumexp(-1).pow(2).mean()

    model.loss_function = loss


def _hook_on_norm(model: Any) -> None:
    model.seen = []
    model.model.language_model.norm.register_forward_hook(lambda module, args, output: model.seen.append(output))


def _hook_on_head(model: Any) -> None:
    model.seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: model.seen.append(output))


@pytest.mark.few(4)
@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize(
    ("objective", "prepare", "call", "config", "says"),
    [
        (_last_hidden, _no_preparation, {"output_hidden_states": True}, {}, "output_hidden_states=True"),
        (_middle_hidden, _no_preparation, {"output_hidden_states": True}, {}, "output_hidden_states=True"),
        (
            _seen_by_hook,
            _hook_on_norm,
            {},
            {},
            r"a hook \(tests.regate.proof.test_readers\) hangs on LlamaModel.norm",
        ),
        (_seen_by_hook, _hook_on_head, {}, {}, "hangs on Linear"),
        (lambda model, output: output.loss, _z_loss, {}, {}, "loss reads .* positions that predict no label"),
        (_all_logits, _no_preparation, {}, {"logits": "all"}, None),
    ],
)
def test_full_steps_are_the_unpatched_model(
    objective: Objective, prepare: Any, call: dict[str, Any], config: dict[str, Any], says: str | None, padding: Any
) -> None:
    model, batch = _made(padding)
    prepare(model)
    expected = _step(model, batch | call, objective)
    gate = regate.apply(model, regate.Config(warmup=1000, **config), teacher=None)
    for _ in range(2):
        assert_same(_step(model, batch | call, objective), expected)
    assert says is None or re.search(says, str(gate.report()))  # who reads
    assert gate.report()["labels_seen"] > 0


@pytest.mark.few(2)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("where", "says"), [("model", "LlavaModel"), ("model.language_model", "LlamaModel"), ("lm_head", "Linear")]
)
def test_hooks_see_the_whole_output(where: str, says: str, late: bool) -> None:
    """Whichever module on the output's way they hang on, and whether they were there before the gate's own."""
    model, batch = _made("right")
    model.seen = []

    def hang() -> Any:
        part = model.get_submodule(where)
        return part.register_forward_hook(lambda module, args, output: model.seen.append(output))

    def objective(model: Any, output: Any) -> Tensor:
        seen = model.seen.pop()
        return output.loss + (seen if isinstance(seen, Tensor) else seen[0])[:, -1].pow(2).sum()

    hook = hang()
    expected = _step(model, batch, objective)
    if late:
        hook.remove()
    gate = regate.apply(model, FULL, teacher=None)
    if late:
        hang()
    for _ in range(2):
        assert_same(_step(model, batch, objective), expected)
    assert f"hangs on {says}" in str(gate.report())


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_see_all_gradients(kind: str) -> None:
    model, batch = _made("right")
    seen: list[Tensor] = []
    getattr(model.lm_head, kind)(lambda module, *gradients: seen.append(gradients[-1][0].detach()))
    plain: Objective = lambda model, output: output.loss  # noqa: E731
    expected, by_logits = _step(model, batch, plain), seen.pop()
    gate = regate.apply(model, FULL, teacher=None)
    for _ in range(2):
        assert_same(_step(model, batch, plain), expected)
        torch.testing.assert_close(seen[-1], by_logits, atol=1e-8, rtol=0)
    assert "hangs on Linear" in str(gate.report())


def test_what_sparse_steps_leave_out_is_told_to_who_reads_it() -> None:
    """A second head that predicts two ahead reads no padding, but positions that predict no kept label."""
    model, batch = _made("right")
    own = model.loss_function

    def two_ahead(logits: Tensor, labels: Tensor, **others: Any) -> Any:
        second = F.cross_entropy(logits[:, :-2].tanh().flatten(0, 1), labels[:, 2:].flatten())
        return own(logits=logits, labels=labels, **others) + second

    model.loss_function = two_ahead
    plain: Objective = lambda model, output: output.loss  # noqa: E731
    expected = _step(model, batch, plain)
    gate = regate.apply(model, FULL, teacher=None)
    assert_same(_step(model, batch, plain), expected)
    assert "predict no label" in str(gate.report())
    assert "on sparse steps positions that are left out have" in str(gate.report())


def test_a_loss_that_reads_everything_is_right_on_padding_that_comes_later() -> None:
    """The first batch has none, and cannot show that padding is read."""
    model, batch = _made("none")
    padded = oracle.double(CORE["llava"].batch("right", seed=5))
    _z_loss(model)
    plain: Objective = lambda model, output: output.loss  # noqa: E731
    expected = _step(model, padded, plain)
    regate.apply(model, FULL, teacher=None)
    _step(model, batch, plain)
    assert_same(_step(model, padded, plain), expected)


def test_reading_may_begin_at_any_step() -> None:
    model, batch = _made("right")
    expected = _step(model, batch | {"output_hidden_states": True}, _last_hidden)
    regate.apply(model, FULL, teacher=None)
    _step(model, batch, lambda model, output: output.loss)
    assert_same(_step(model, batch | {"output_hidden_states": True}, _last_hidden), expected)


@pytest.mark.parametrize("layer", [1, 2])
def test_hidden_states_of_sparse_steps_are_the_references(layer: int) -> None:
    """At active positions; the others stay in the residual stream as it enters, and the report says so."""
    model, batch = _made("right")
    call = batch | {"output_hidden_states": True}
    gate = regate.apply(model, SPARSE, teacher=None)
    active: Any = None

    def objective(model: Any, output: Any) -> Tensor:
        nonlocal active
        active = gate.last.active if active is None and gate.last is not None else active
        return output.loss + (output.hidden_states[layer] * active[..., None]).pow(2).mean()

    got = _step(model, call, objective)
    kept = gate.last.kept if gate.last is not None else None
    regate.remove(model)
    masked = call | {"labels": torch.where(kept, batch["labels"], -100)}
    with reference.masked(model.model.language_model.layers, active):
        assert_same(got, _step(model, masked, objective))
    assert "the residual stream enters the first layer" in str(gate.report())
    assert gate.report()["positions_computed"] < gate.report()["positions_seen"]


def test_hidden_states_that_a_model_returns_under_a_name_of_its_own() -> None:
    """For a second network, say, that learns from them and sends no gradient back."""
    model, batch = _made("right")
    usual = type(model)

    class Own(usual):  # type: ignore[valid-type, misc]
        def forward(self, labels: Tensor, **others: Any) -> Any:
            hidden = self.model(**others)[0]
            logits = self.lm_head(hidden)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=100)
            return {"loss": loss, "logits": logits, "parts": {"seen": hidden[:, 1:]}}

    model.__class__ = Own
    seen: list[Tensor] = []

    def objective(model: Any, output: Any) -> Any:
        seen.append(output["parts"]["seen"].detach())
        return output["loss"]

    expected = _step(model, batch, objective)
    gate = regate.apply(model, FULL, teacher=None)
    for _ in range(2):
        assert_same(_step(model, batch, objective), expected)
        torch.testing.assert_close(seen[-1], seen[0], atol=1e-10, rtol=0)
    assert "returns its decoder's output" in str(gate.report())
    assert gate.report()["labels_seen"] == 2 * int((batch["labels"] != -100).sum())
