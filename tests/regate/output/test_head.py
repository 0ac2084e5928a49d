"""The vocabulary projection at kept labels alone: same loss, same gradients, no logits; or not at all."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from model_adapters import conventional
from regate.output.head import Reading
from regate.output.withheld import WithheldLogits
from tests import oracle
from tests.zoo import CORE, members
from tests.zoo.common import PAD

FULL = regate.Config(warmup=1000)


def _steps(
    monkeypatch: pytest.MonkeyPatch, name: str, config: regate.Config | None, padding: Any, number: int = 3
) -> tuple[Any, list[Any]]:
    """Loss and gradients of training forwards on different batches, and what the head was given in each."""
    torch._dynamo.reset()
    model = CORE[name].build().double()
    gate = regate.apply(model, config, teacher=None) if config else None
    seen: list[int] = []
    head = conventional.head(model)
    forward = nn.Linear.forward

    def noting(self: nn.Linear, x: Tensor) -> Tensor:
        if self is head and x.dim() == 3:
            seen.append(x.shape[1])
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", noting)
    found = []
    for seed in range(number):
        model.zero_grad(set_to_none=True)
        output = model(**oracle.double(CORE[name].batch(padding, seed=seed)))
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), grads, output.logits, seen[-1]))
    return gate, found


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "idefics3", "mistral3"])
@pytest.mark.parametrize(("padding", "keep"), [("left", 1.0), ("right", 0.5)])
def test_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, name: str, padding: Any, keep: float) -> None:
    sparse: dict[str, Any] = {
        "warmup": 0,
        "cycle": 1,
        "full_steps": 0,
        "keep": keep,
        "selection": "random",
        "logits": "kept",
    }
    if keep == 1:
        _, expected = _steps(monkeypatch, name, None, padding)
    else:
        _, expected = _steps(monkeypatch, name, regate.Config(**{**sparse, "logits": "all"}), padding)
    gate, found = _steps(monkeypatch, name, regate.Config(**sparse) if keep < 1 else FULL, padding)
    assert "every position" not in str(gate.report())
    tolerance = {"atol": 1e-6, "rtol": 1e-5}  # transformers' losses are float32 whatever the model is
    for (loss, grads, logits, read), (whole, gradients, _, length) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, whole, **tolerance)
        for n, gradient in gradients.items():
            torch.testing.assert_close(grads[n], gradient, **tolerance, msg=lambda m, n=n: f"{n}: {m}")
        assert isinstance(logits, WithheldLogits)
        assert read < length


def test_all_logits_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = _steps(monkeypatch, "llava", regate.Config(warmup=1000, logits="all"), "right")
    assert all(logits.shape[1] == length for _, _, logits, length in found)


def test_a_loss_that_needs_every_position_gets_it() -> None:
    """Its own forward divides by the length: shortening would change the loss, and is not done."""
    model = CORE["llava"].build()
    forward = type(model).forward

    def divides(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return type(output)(**{**output, "loss": output.loss / output.logits.shape[1]})

    batch = CORE["llava"].batch("right")
    gate = regate.apply(model, FULL, teacher=None)
    model.forward = types.MethodType(divides, model)  # as trainers do
    expected = model.eval()(**batch).loss
    model.train()
    for _ in range(2):
        output = model(**batch)
        torch.testing.assert_close(output.loss, expected)
        assert output.logits is not None
    assert "vocabulary projection runs at every position: the model's loss on the short sequence" in str(gate.report())


@pytest.mark.parametrize(("padding", "says"), [("right", None), ("left", "are not finite on the first batch")])
def test_padding_whose_gradient_is_no_number(padding: Any, says: str | None) -> None:
    """Gemma 3n takes roots of embeddings' squares, and those of padding may be zero. Behind the text nobody sees what
    comes of it; in front of it the model's own gradients are lost."""
    specimen = members()["gemma3n"]
    model, batch = specimen.build(), specimen.batch(padding)
    model.get_input_embeddings().weight.data[PAD] = 0.0
    gate = regate.apply(model, FULL, teacher=None)
    model(**batch, use_cache=False).loss.backward()
    assert ("vocabulary projection runs at every position" in str(gate.report())) == (says is not None)
    assert says is None or says in str(gate.report())


def test_difficulties_are_the_same() -> None:
    def learnt(logits: Any) -> dict[bytes, Any]:
        model = CORE["llava"].build()
        gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0, logits=logits), teacher=None)
        for seed in (0, 1, 0, 1):
            model(**CORE["llava"].batch("right", seed=seed)).loss.backward()
        gate.flush()
        return dict(gate.store.items("difficulty"))

    short, whole = learnt("kept"), learnt("all")
    assert short.keys() == whole.keys()
    for key, losses in short.items():
        torch.testing.assert_close(torch.from_numpy(losses), torch.from_numpy(whole[key]), atol=5e-3, rtol=0)


def test_reading() -> None:
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, 8, 9]])
    kept = torch.tensor([[False, True, True, True], [False, False, True, False]])
    reading = Reading.of(labels, kept)
    assert reading.labels.tolist() == [[-100, 5, 6], [-100, 7, 8]]
    assert reading.index[:, :2].tolist() == [[0, 1], [2, 5]]
    hidden: Tensor = torch.arange(8.0).reshape(2, 4, 1)
    assert reading.shorten((hidden, "cache"))[0][:, :2, 0].tolist() == [[0.0, 1.0], [2.0, 5.0]]
    one_less = Reading.of(labels, kept & (labels != 8))
    assert one_less.labels.tolist() == [[-100, 5, 6], [-100, 7, -100]]
    assert one_less.index.shape == (2, 3)
    assert one_less.places.label.tolist() == [5, 6, 7]


def test_a_mean_of_rows_means_is_not_dealt_out() -> None:
    """Its rows are no longer those that it averages: the head then runs at every position."""
    model, batch = _by_row(), oracle.double(CORE["llava"].batch("right"))
    expected = model(**batch).loss
    gate = regate.apply(model, FULL, teacher=None)
    torch.testing.assert_close(model(**batch).loss, expected)
    assert "vocabulary projection runs at every position" in str(gate.report())


@pytest.mark.parametrize("first", ["one row", "as many labels in each row"])
def test_a_first_batch_that_cannot_tell_rows_means(first: str) -> None:
    """What it cannot tell is not taken for granted of batches that differ; one that can is looked at again."""
    model, batch = _by_row(), oracle.double(CORE["llava"].batch("right"))
    early = next(iter(CORE["llava"].split(batch, 2)))
    if first != "one row":
        early = {name: torch.cat([x, x]) for name, x in early.items()}
        early["labels"] = torch.where(early["labels"].ne(-100).cumsum(1) == 1, early["labels"], -100)
    expected = [model(**x).loss for x in (early, batch)]
    gate = regate.apply(model, FULL, teacher=None)
    torch.testing.assert_close(model(**early).loss, expected[0])
    assert "vocabulary projection" not in str(gate.report())
    torch.testing.assert_close(model(**batch).loss, expected[1])
    assert "vocabulary projection runs at every position" in str(gate.report())


def _by_row() -> Any:
    """A model whose loss is the mean of rows' means."""
    model = CORE["llava"].build().double()

    def by_row(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        losses = [nn.functional.cross_entropy(x[:-1], y[1:]) for x, y in zip(logits, labels, strict=True)]
        return torch.stack(losses).mean()

    model.loss_function = by_row
    return model
