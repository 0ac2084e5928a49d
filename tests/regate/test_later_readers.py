"""What begins to read more only after the proof on the first batch, or reads where no hook and no output says so."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regate
from regate import forward
from regate.errors import HiddenStatesError
from regate.proof.reads import operations
from tests import oracle
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
Model = Any


def _made(padding: Any = "right") -> tuple[Model, dict[str, Any]]:
    torch._dynamo.reset()
    return CORE["llava"].double(), oracle.double(CORE["llava"].batch(padding))


def _assert_exact(steps: Any, *, padding: Any = "right", prepare: Any = lambda model: None) -> regate.Gate:
    """`steps(model, batch)` yields losses; the last one and its gradients are the unpatched model's."""
    results = []
    for gated in (False, True):
        model, batch = _made(padding)
        prepare(model)
        gate = regate.apply(model, FULL, teacher=None) if gated else None
        for loss in steps(model, batch):
            model.zero_grad(set_to_none=True)
            loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, by_expected), (got, by_got) = results
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)  # transformers' losses are float32
    for name, gradient in by_expected.items():
        torch.testing.assert_close(by_got[name], gradient, atol=1e-8, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert gate is not None
    return gate


def _z_loss(model: Model, weights: list[float], *, skipped: bool) -> Iterator[float]:
    """The weight of a loss over all logits, step by step; `skipped` where it is 0, or multiplied by it."""
    own = model.loss_function
    state = {"weight": 0.0}

    def loss(logits: Tensor, **others: Any) -> Tensor:
        found = own(logits=logits, **others)
        if skipped and not state["weight"]:
            return found
        return found + state["weight"] * logits.logsumexp(-1).pow(2).mean()

    model.loss_function = loss
    for weight in weights:
        state["weight"] = weight
        yield weight


@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize("skipped", [True, False])
def test_a_loss_that_is_added_later(skipped: bool, padding: Any) -> None:
    def steps(model: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        for _ in _z_loss(model, [0.0, 0.0, 1e-2], skipped=skipped):
            yield model(**batch).loss

    gate = _assert_exact(steps, padding=padding)
    assert "positions that predict no label" in str(gate.report())


class _WithAuxiliaryHead(nn.Module):
    """A model whose call has more labels in some batches, for a head on what its decoder returns.

    `by`: how it comes by the decoder's output.
    """

    def __init__(self, inner: Model, by: str) -> None:
        super().__init__()
        self.inner, self.config, self.decoded = inner, inner.config, [torch.empty(0)]
        own = inner.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            self.decoded[0] = output[0]
            return output

        if by == "hook":
            inner.model.register_forward_hook(lambda m, args, output: self.decoded.__setitem__(0, output[0]))
        elif by == "wrapped forward":
            inner.model.forward = forward
        else:
            inner.model.forward = functools.wraps(own)(forward)  # by its looks the model's own

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, boxes: Any = None, **others: Any) -> Any:
        output = self.inner(input_ids=input_ids, labels=labels, **others)
        if boxes is not None:
            output.loss = output.loss + (self.decoded[0].mean((1, 2)) - boxes).pow(2).mean()
        return output


def _with_auxiliary_head(by: str) -> Any:
    def steps(inner: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        model = _WithAuxiliaryHead(inner, by)
        yield model(**batch).loss
        yield model(**batch, boxes=torch.ones(len(batch["labels"]), dtype=torch.float64)).loss

    return steps


@pytest.mark.parametrize("by", ["hook", "wrapped forward"])
def test_an_auxiliary_head_around_the_model_that_only_some_batches_use(by: str) -> None:
    gate = _assert_exact(_with_auxiliary_head(by))
    assert "hangs on LlavaModel" in str(gate.report())


@pytest.mark.parametrize("config", [FULL, SPARSE])
def test_an_auxiliary_head_that_nobody_sees_is_an_error(config: regate.Config) -> None:
    model, batch = _made()
    regate.apply(model, config, teacher=None)
    first, second = _with_auxiliary_head("a forward like its own")(model, batch)
    first.backward()
    with pytest.raises(HiddenStatesError, match="output_hidden_states=True"):
        second.backward()


def _last_layer(model: Model) -> nn.Module:
    return model.model.language_model.layers[-1]


def _wrap(layer: Any, seen: list[Tensor]) -> None:
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        seen.append(output if isinstance(output, Tensor) else output[0])
        return output

    layer.forward = forward


@pytest.mark.parametrize("later", [False, True])
def test_a_layer_whose_forward_is_wrapped(later: bool) -> None:
    def steps(model: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        seen: list[Tensor] = []
        if later:
            yield model(**batch).loss
        _wrap(_last_layer(model), seen)
        yield model(**batch).loss + seen[-1].pow(2).mean()

    gate = _assert_exact(steps)
    assert "leave it otherwise than by being returned" in str(gate.report())


def test_a_hook_on_all_modules() -> None:
    seen: list[Tensor] = []

    def steps(model: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        layer = _last_layer(model)

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if module is layer:
                seen.append(output if isinstance(output, Tensor) else output[0])

        handle = nn.modules.module.register_module_forward_hook(keep)
        try:
            yield model(**batch).loss + seen[-1].pow(2).mean()
        finally:
            handle.remove()

    _assert_exact(steps)


def _count_proofs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    proofs: list[None] = []
    own = forward.ask_for_readers
    monkeypatch.setattr(
        forward, "ask_for_readers", lambda *args, **names: (proofs.append(None), own(*args, **names))[1]
    )
    return proofs


def test_what_is_proven_is_not_proven_again(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = _count_proofs(monkeypatch)
    torch._dynamo.reset()
    model = CORE["llava"].build()
    regate.apply(model, regate.Config(warmup=2, cycle=2, full_steps=1), teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step, padding in enumerate(["right", "left", "none"] * 2):
        model(**CORE["llava"].batch(padding, rows=2, seed=step)).loss.backward()
        optimizer.step()
    assert len(proofs) == 1


def test_a_loss_that_comes_and_goes_is_proven_once_in_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = _count_proofs(monkeypatch)
    model, batch = _made()
    regate.apply(model, FULL, teacher=None)
    for _ in _z_loss(model, [0.0, 1e-2] * 5, skipped=True):
        model(**batch).loss.backward()
    assert len(proofs) == 2


def test_losses_that_are_ever_new_are_not_proven_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = _count_proofs(monkeypatch)
    model, batch = _made()
    own = model.loss_function
    gate = regate.apply(model, FULL, teacher=None)
    for n in range(16):

        def loss(n: int = n, **inputs: Any) -> Tensor:
            found = own(**inputs)
            for _ in range(n):
                found = found * 1.5
            return found

        model.loss_function = loss
        model(**batch).loss.backward()
    assert len(proofs) < 12
    assert "ever new ways" in str(gate.report())


def test_operations_of_a_loss() -> None:
    hidden = torch.randn(3, requires_grad=True).exp()
    plain = operations(hidden.sum(), (hidden,))
    assert plain == {("SumBackward0", 1)}  # what made the hidden states is not of the loss
    assert operations(hidden.sum() * 0.0, (hidden,)) != operations(hidden.sum() * 0.5, (hidden,))
    assert operations(hidden.sum() * 0.25, (hidden,)) == operations(hidden.sum() * 0.5, (hidden,))


def _over(model: Model, loss: Any) -> None:
    """Its loss, of logits, labels, and `of_rows`, a number for each row that the call may bring."""
    own = type(model).forward

    @functools.wraps(own)
    def forward(*args: Any, of_rows: Tensor | None = None, **kwargs: Any) -> Any:
        output = own(model, *args, **kwargs)
        output.loss = loss(output.logits, kwargs["labels"], of_rows)
        return output

    model.forward = forward


def _of_each_row(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.view(len(labels), -1).sum(1)


@pytest.mark.parametrize("number", [torch.tensor([1.0, -0.5]), torch.tensor([0, 1]), [2.0, 1.0]])
def test_a_number_for_each_row_that_is_unlike_only_later(number: Any) -> None:
    """Labels are dealt out to other rows only where that is known to change nothing."""

    def weighted(logits: Tensor, labels: Tensor, weight: Any) -> Tensor:
        return (_of_each_row(logits, labels) * torch.as_tensor(weight)).sum() / (labels[:, 1:] != -100).sum()

    def steps(model: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        _over(model, weighted)
        alike = [1.0, 1.0] if isinstance(number, list) else torch.ones_like(number)
        for of_rows in (alike, number):
            yield model(**batch, of_rows=of_rows).loss

    _assert_exact(steps)


def test_a_row_without_labels_that_comes_later() -> None:
    def of_rows_with_some(logits: Tensor, labels: Tensor, _: Any) -> Tensor:
        return _of_each_row(logits, labels).sum() / (labels[:, 1:] != -100).any(1).sum()

    def steps(model: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        _over(model, of_rows_with_some)
        yield model(**batch).loss
        batch["labels"][0] = -100
        yield model(**batch).loss

    _assert_exact(steps)


@pytest.mark.parametrize("weigh", [
    pytest.param(lambda losses, share: (torch.stack(losses) * torch.tensor([1.0, share])).sum(), id="some factors"),
    pytest.param(lambda losses, share: torch.lerp(*losses, torch.tensor(share)), id="lerp"),
])  # fmt: skip
def test_a_weight_in_a_tensor_that_is_0_at_first(weigh: Any) -> None:
    def steps(model: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        own, shares = model.loss_function, [0.0, 0.0, 1e-2]
        for share in shares:
            model.loss_function = lambda logits, share=share, **others: weigh(
                [own(logits=logits, **others), logits.float().logsumexp(-1).pow(2).mean()], share
            )
            yield model(**batch).loss

    _assert_exact(steps)


@pytest.mark.parametrize("by", ["a part of the model", "the decoder"])
def test_hidden_states_that_a_class_keeps(by: str) -> None:
    """For a loss outside, which reads them where no label is predicted."""

    def part(model: Model) -> Any:
        return model.model if by == "a part of the model" else model.model.language_model

    def prepare(model: Model) -> None:
        usual = type(part(model))

        class Keeps(usual):  # type: ignore[valid-type, misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                output = usual.forward(self, *args, **kwargs)
                self.kept = [output.last_hidden_state]
                return output

        part(model).__class__ = Keeps

    def steps(model: Model, batch: dict[str, Any]) -> Iterator[Tensor]:
        for _ in range(2):
            loss = model(**batch).loss
            yield loss + part(model).kept[0][:, :4].pow(2).mean()

    gate = _assert_exact(steps, prepare=prepare)
    assert "Keeps.kept keeps its decoder's output" in str(gate.report())
