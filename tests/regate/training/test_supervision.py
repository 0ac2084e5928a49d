"""What comes beside `labels` and names, weighs or counts them: sparse steps mask it with the labels they leave out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regate
from regate.errors import LabelsError
from regate.training import supervision
from regate.training.supervision import Numbers
from regate_patch import reference
from tests import oracle
from tests.steps import assert_same, step
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def _made(padding: Any, name: str = "llava") -> tuple[Any, dict[str, Any]]:
    torch._dynamo.reset()
    return CORE[name].build().double(), oracle.double(CORE[name].batch(padding))


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_shifted_labels_are_masked_with_labels(name: str) -> None:
    model, batch = _made("right", name)
    batch |= {"shift_labels": _shifted(batch["labels"])}
    gate = regate.apply(model, SPARSE, teacher=None)
    got = step(model, batch)
    last = gate.last
    assert last is not None
    regate.remove(model)
    masked = batch | {"labels": last.labels_left, "shift_labels": _shifted(last.labels_left)}
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), last.active):
        assert_same(got, step(model, masked))


def _with_loss(model: Any, name: str, loss: Callable[[Tensor, Any], Any]) -> None:
    """A loss of the model's own, of losses at predictors [B, S] and an entry of the call, which its forward takes."""
    own = type(model).forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        entry = kwargs.pop(name)
        output = own(model, *args, **kwargs)
        labels = _shifted(kwargs["labels"])
        losses = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        output.loss = loss(losses, entry)
        return output

    model.forward = forward


def _weighted(model: Any, name: str = "loss_weights", *, at_predictors: bool = False) -> None:
    """It takes weights of labels and divides by their sum."""

    def loss(losses: Tensor, weights: Tensor) -> Tensor:
        weights = weights if at_predictors else F.pad(weights, (0, 1))[:, 1:]
        return (losses * weights).sum() / weights.sum()

    _with_loss(model, name, loss)


def _divided(model: Any, name: str, divisor: Callable[[Any], Any]) -> None:
    """Each row's sum by what `divisor` makes of an entry of the call, added up."""
    _with_loss(model, name, lambda losses, entry: (losses.sum(1) / divisor(entry)).sum())


@pytest.mark.few(3)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("name", "at_predictors"),
    [("loss_weights", False), ("loss_weights", True), ("answer_mask", False), ("emphasis", True)],
)
def test_weights_of_labels_are_masked_with_labels(name: str, at_predictors: bool, sparse: bool) -> None:
    """And with them the sum that they are divided by, whatever their name, and however they are laid along labels."""
    model, batch = _made("right")
    labelled = batch["labels"] != -100
    weights = torch.rand(labelled.shape, dtype=torch.float64)
    weights *= F.pad(labelled, (0, 1))[:, 1:] if at_predictors else labelled
    batch |= {name: weights}
    _weighted(model, name, at_predictors=at_predictors)
    dense = step(model, batch)
    gate = regate.apply(model, SPARSE if sparse else FULL, teacher=None)
    got = step(model, batch)
    if not sparse:
        assert_same(got, dense)
        return
    last = gate.last
    assert last is not None
    regate.remove(model)
    kept = F.pad(last.kept, (0, 1))[:, 1:] if at_predictors else last.kept
    masked = batch | {"labels": last.labels_left, name: weights * kept}
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), last.active):
        assert_same(got, step(model, masked))


def test_weights_of_a_shape_that_cannot_be_laid_along_labels() -> None:
    model, batch = _made("right")
    _weighted(model)
    regate.apply(model, SPARSE, teacher=None)
    with pytest.raises(LabelsError, match=r"`loss_weights` \[2, \d+\] seems to name or weigh labels"):
        model(**batch, loss_weights=torch.ones(2, batch["labels"].shape[1] + 3))


def _itself(entry: Any) -> Any:
    return entry


_OF_ROWS: list[tuple[str, Callable[[Tensor], Any], Callable[[Any], Any]]] = [
    *(
        (name, lambda labelled: int(labelled.sum()), _itself)
        for name in ("token_count", "label_num", "valid_tokens", "global_batch_tokens", "denominator", "normalizer")
    ),
    ("by_what", lambda labelled: labelled.sum(), _itself),
    ("by_what", lambda labelled: float(labelled.sum()), _itself),
    ("by_what", lambda labelled: labelled.sum(1), _itself),
    ("by_what", lambda labelled: labelled.sum(1, keepdim=True).double(), lambda entry: entry[:, 0]),
    ("denominator", lambda labelled: labelled.sum(1), _itself),
    ("options", lambda labelled: {"mean": True, "by_what": int(labelled.sum())}, lambda entry: entry["by_what"]),
    ("options", lambda labelled: {"loss_weights": labelled.double()}, lambda entry: entry["loss_weights"].sum()),
    ("loss_weights", lambda labelled: labelled.double()[..., None], lambda entry: entry.sum()),
    ("loss_weights", lambda labelled: labelled.double()[:, None], lambda entry: entry.sum()),
    ("seq_mask", lambda labelled: labelled.long(), lambda entry: entry.sum()),
    ("answer_positions", lambda labelled: labelled, lambda entry: entry.sum()),
    ("token_type_mask", lambda labelled: F.pad(labelled, (0, 1))[:, 1:].long(), lambda entry: entry.sum()),
    ("visual_answer_weights", lambda labelled: labelled * 0.5, lambda entry: entry.sum()),
]  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize(("name", "entry", "divisor"), _OF_ROWS)
def test_what_a_loss_is_divided_by_is_of_kept_labels(name: str, entry: Any, divisor: Any) -> None:
    """Be it a number or a mask, whatever its name; else a sparse step's loss is too small."""
    model, batch = _made("right")
    _divided(model, name, divisor)
    call = batch | {name: entry(batch["labels"] != -100)}
    dense = step(model, call)
    regate.apply(model, FULL, teacher=None)
    assert_same(step(model, call), dense)
    gate = regate.apply(model, SPARSE, teacher=None)
    got, last = step(model, call), gate.last
    assert last is not None
    regate.remove(model)
    masked = batch | {"labels": last.labels_left, name: entry(last.kept)}
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), last.active):
        assert_same(got, step(model, masked))


def test_what_may_be_as_many_as_labels_by_chance_stays_and_is_told() -> None:
    """Such as seconds a frame: until another batch has another number of labels, and it is that, too."""
    model, batch = _made("right")
    seen: list[Any] = []
    _with_loss(model, "margin", lambda losses, entry: (seen.append(entry), losses.mean())[1])
    places = (batch["labels"] != -100).nonzero()
    gate = regate.apply(model, SPARSE, teacher=None)

    def train(labels: int, margin: int) -> tuple[float, int]:
        some = torch.full_like(batch["labels"], -100)
        some[tuple(places[:labels].T)] = batch["labels"][tuple(places[:labels].T)]
        model(**batch | {"labels": some}, margin=margin)
        assert gate.last is not None
        return seen[-1], gate.last.labels_kept

    for _ in range(2):
        assert train(4, 4) == (4, 2)
    assert "`margin` was the number of labels in every batch so far, but may be so by chance" in str(gate.report())
    assert train(6, 6) == (3, 3)
    assert train(4, 4) == (2, 2)
    assert "`margin` was the number of labels in every batch so far: where labels are left out" in str(gate.report())
    assert train(4, 6) == (6, 2)
    assert train(4, 4) == (4, 2)
    assert "`margin` no longer is the number of labels" in str(gate.report())
    other = regate.apply(CORE["llava"].build(), SPARSE, teacher=None)
    other.load_state_dict(gate.state_dict())
    assert other._parts.numbers == gate._parts.numbers  # a run that goes on knows what it knew


@pytest.mark.parametrize("loss", ["with another term", "by a root"])
def test_a_number_of_labels_counts_whatever_the_loss_does_with_it(loss: str) -> None:
    model, batch = _made("right")
    seen: list[Any] = []

    def made(losses: Tensor, entry: Any) -> Tensor:
        seen.append(entry)
        return losses.sum() / entry**0.5 if loss == "by a root" else losses.sum() / entry + 0.2

    _with_loss(model, "by_what", made)
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**batch, by_what=int((batch["labels"] != -100).sum()))
    assert gate.last is not None
    assert seen[-1] == gate.last.labels_kept


def test_a_number_that_once_was_another_counts_nothing() -> None:
    labels, numbers = _labels_of_a_batch(), Numbers()
    assert [*supervision.beside({"by_what": 5, "deep": {"other": 5}}, labels, numbers)] == ["by_what", "deep"]
    assert supervision.beside({"by_what": 4, "deep": {"other": 3}}, labels, numbers) == {}
    assert numbers.others == {"by_what", "deep.other"}
    assert supervision.beside({"by_what": 5, "deep": {"other": 5}}, labels, numbers) == {}


@pytest.mark.parametrize("number", [np.int64, np.float32, np.array, torch.tensor, int])
def test_numbers_of_any_kind(number: Callable[[int], Any]) -> None:
    labels, numbers = _labels_of_a_batch(), Numbers()
    for kept, counted in ((labels == 7, 3), (labels == 8, 5)):
        some = torch.where(labels > 6, labels, -100) if counted == 3 else labels
        found = supervision.beside({"num_items_in_batch": number(counted), "by_what": number(counted)}, some, numbers)
        left = 3.0 if counted == 3 else 1.0  # as it was, where it may be by chance
        assert {name: float(x) for name, x in supervision.masked(found, some, kept).items()} == {
            "num_items_in_batch": 1.0,
            "by_what": left,
        }
    assert [*supervision.guesses(found)] == [("by_what", False)]


def _labels_of_a_batch() -> Tensor:
    """Two labels of the first row, three of the second."""
    return torch.tensor([[-100, -100, -100, 5, 6, -100, -100], [-100, -100, 7, 8, 9, -100, -100]])


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("attention_mask", torch.tensor([[1] * 7, [1] * 7])),
        ("seq_mask", torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]])),  # says more
        ("seq_mask", torch.tensor([[0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]])),  # says less
        ("positions", torch.tensor([[0, 0, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 0, 0]])),
        ("token_type_ids", torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]])),  # a prefix sees itself
        ("image_mask", torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0] * 7])),
        ("max_length", 5),
        ("num_query_tokens", 5),
        ("num_img_tokens", torch.tensor([5])),
        ("second_per_grid_ts", torch.tensor([2.0, 3.0])),
        ("num_frames", 5),
        ("logits_to_keep", 5),
        ("pad_token_id", 5),
        ("temperature", 5.0),
        ("whatever", 4),
        ("num_images", torch.tensor([2, 3])),
        ("row_ids", torch.tensor([2, 3])),
        ("whatever", torch.tensor([3, 2])),
        ("class_weights", torch.ones(2, 3)),
        ("query_weights", torch.ones(2, 5)),
        ("memory_weights", torch.ones(2, 20)),
        ("answer_lengths", torch.tensor([2, 3])),
        ("loss_weights", [1.0, 0.5]),
        ("loss_weights", [[1.0, 0.5], [1.0, 0.5]]),
        ("loss_type", "sum"),
        ("options", {"image_weights": torch.ones(2, 7), "deep": {"temperature": 5}}),
        ("options", {0: 5, ("num_tokens",): 5}),
        ("num_delay_tokens", 2),  # of speech: fewer than half of the labels
    ],
)
def test_what_is_no_supervision_stays(name: str, x: Any) -> None:
    assert supervision.beside({name: x}, _labels_of_a_batch()) == {}


@pytest.mark.parametrize("name", ["property_labels", "memory_labels", "latent_targets", "query_loss_weights"])
def test_names_of_other_things_hide_no_labels(name: str) -> None:
    labels = _labels_of_a_batch()
    assert [*supervision.beside({name: torch.where(labels > 6, labels, -100)}, labels)] == [name]
    weights = {"properties": {name: (labels > 6).float()}, "registered_tokens_count": 12}
    assert [*supervision.beside(weights, labels)] == ["properties", "registered_tokens_count"]


def test_what_is_called_a_number_of_labels_but_is_too_small_stays_and_is_told() -> None:
    """Also where a later batch has no more labels than that."""
    model, batch = _made("right")
    seen: list[Any] = []
    _with_loss(model, "num_delay_tokens", lambda losses, entry: (seen.append(entry), losses.mean())[1])
    gate = regate.apply(model, SPARSE, teacher=None)
    labels = int((batch["labels"] != -100).sum())
    for number in (labels // 2 - 1, labels):
        model(**batch, num_delay_tokens=number)
    assert seen[-2:] == [labels // 2 - 1, labels]
    assert "`num_delay_tokens` has the name of a number of labels, but is less than half" in str(gate.report())


def test_a_mean_of_several_batches_is_scaled_in_a_long_one_too() -> None:
    labels, numbers = _labels_of_a_batch(), Numbers()
    for number in (4, 1):  # of five labels
        found = supervision.beside({"num_tokens": number}, labels, numbers)
        assert supervision.masked(found, labels, labels == 8) == {"num_tokens": number / 5}
    again = Numbers()
    again.load_state_dict(numbers.state_dict())
    assert again == numbers


def test_a_divisor_of_several_micro_batches_under_another_name_is_told() -> None:
    model, batch = _made("right")
    _divided(model, "ntokens", _itself)
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**batch, ntokens=3 * int((batch["labels"] != -100).sum()))
    assert "the model's loss is divided by `ntokens`, which sparse steps leave as it is" in str(gate.report())


def test_one_label_is_no_telling_number() -> None:
    labels = torch.tensor([[-100, -100, 3]])
    assert supervision.beside({"whatever": 1, "other": torch.tensor([1])}, labels) == {}
    assert [*supervision.beside({"num_items_in_batch": 1}, labels)] == ["num_items_in_batch"]


def test_numbers_in_a_dict_are_scaled_in_a_copy() -> None:
    labels = _labels_of_a_batch()
    options = {"by_what": torch.tensor([2, 3]), "deep": {"num_tokens": 5, "mode": "sum"}}
    found = supervision.beside({"options": options}, labels)
    changed = supervision.masked(found, labels, labels == 8)["options"]
    assert changed["by_what"].tolist() == [0, 1]
    assert changed["deep"] == {"num_tokens": 1.0, "mode": "sum"}
    assert options["by_what"].tolist() == [2, 3]
    assert options["deep"] == {"num_tokens": 5, "mode": "sum"}


@pytest.mark.parametrize("weights", [torch.ones(2, 9), [torch.ones(22)] * 2, [[1.0] * 22] * 2])
def test_weights_in_a_form_that_cannot_be_laid_along_labels(weights: Any) -> None:
    """Of the answers alone, or in lists."""
    model, batch = _made("right")
    regate.apply(model, SPARSE, teacher=None)
    with pytest.raises(LabelsError, match=r"`loss_weights` (\[2, 9\]|\(a list\)) seems to name or weigh labels"):
        model(**batch, loss_weights=weights)


def test_a_loss_for_each_position_is_told_what_to_divide_by() -> None:
    model, batch = _made("right")
    each = type(model).forward

    @functools.wraps(each)
    def by_position(*args: Any, **kwargs: Any) -> Any:
        output = each(model, *args, **kwargs)
        losses = F.cross_entropy(output.logits.flatten(0, 1), _shifted(kwargs["labels"]).flatten(), reduction="none")
        output.loss = losses.view(kwargs["labels"].shape)
        return output

    model.forward = by_position
    for config, told in ((FULL, False), (SPARSE, True)):
        gate = regate.apply(model, config, teacher=None)
        model(**batch)
        assert ("must divide by the number of these, gate.last.kept" in str(gate.report())) == told


def test_a_sum_is_told_what_to_divide_by() -> None:
    for reduction, told in (("sum", True), ("mean", False)):
        model, batch = _made("right")
        model.loss_function = lambda logits, labels, reduction=reduction, **others: F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction
        )
        gate = regate.apply(model, SPARSE, teacher=None)
        model(**batch)
        assert ("the model's loss is the sum of its labels' losses" in str(gate.report())) == told
