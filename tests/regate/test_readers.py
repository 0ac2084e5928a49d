"""Whatever reads the decoder's output or its logits: full steps are the unpatched model, or the reader is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regate
from regate.errors import LabelsError, LogitsError
from regate.training import supervision
from regate_patch import reference
from tests import oracle
from tests.steps import assert_same
from tests.zoo import CORE, members
from tests.zoo.releases import case

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
            r"a hook \(tests.regate.test_readers\) hangs on LlamaModel.norm",
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
    if says is not None:
        with pytest.raises(AssertionError, match=says):  # the report names who reads
            assert str(gate.report()) == ""
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


def test_logits_that_were_not_made_say_so() -> None:
    model, batch = _made("right")
    regate.apply(model, FULL, teacher=None)
    logits = model(**batch).logits
    assert logits.shape == (*batch["labels"].shape, 100)
    assert logits.float().detach().dtype == torch.float32  # passing them on is no reading
    for read in (lambda: logits[:, -1], lambda: logits.argmax(-1), lambda: logits + 1, lambda: float(logits.sum())):
        with pytest.raises(LogitsError, match=r"regate\.Config\(logits='all'\)"):
            read()
    with pytest.raises(LogitsError, match="do not exist"):
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("name", [case("blip-2")])
def test_logits_within_an_output_say_so_too(name: str) -> None:
    model, batch = members()[name].build(), members()[name].batch("right")
    regate.apply(model, FULL, teacher=None)
    inner = model(**batch).language_model_outputs.logits
    assert inner.shape == (*batch["labels"].shape, 100)
    with pytest.raises(LogitsError, match=r"regate\.Config\(logits='all'\)"):
        inner.float().mean()


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


@dataclass(frozen=True)
class _Own:
    loss: Tensor
    scores: Tensor


@dataclass(slots=True)
class _Slots:
    loss: Tensor
    scores: Tensor


class _Named(NamedTuple):
    loss: Tensor
    scores: Tensor


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("made", "read"),
    [
        pytest.param(lambda o: [o.loss, o.logits], lambda output: (output[0], output[1]), id="list"),
        pytest.param(
            lambda o: {"loss": o.loss, "scores": o.logits}, lambda o: (o["loss"], o["scores"]), id="another name"
        ),
        pytest.param(lambda o: {"loss": o.loss, 0: o.logits}, lambda o: (o["loss"], o[0]), id="no name"),
        pytest.param(lambda o: _Named(o.loss, o.logits), lambda o: (o.loss, o.scores), id="named tuple"),
        pytest.param(lambda o: _Own(o.loss, o.logits), lambda o: (o.loss, o.scores), id="frozen"),
        pytest.param(lambda o: _Slots(o.loss, o.logits), lambda o: (o.loss, o.scores), id="slots"),
    ],
)
def test_logits_in_outputs_of_ones_own_say_so(made: Any, read: Any) -> None:
    model, batch = _made("right")
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: made(forward(*args, **kwargs)))
    objective: Objective = lambda model, output: read(output)[0]  # noqa: E731
    expected = _step(model, batch, objective)
    regate.apply(model, FULL, teacher=None)
    assert_same(_step(model, batch, objective), expected)
    logits = read(model(**batch))[1]
    assert logits.shape == (*batch["labels"].shape, 100)
    with pytest.raises(LogitsError, match=r"regate\.Config\(logits='all'\)"):
        logits.float().mean()
    regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0, logits="all"), teacher=None)
    with pytest.raises(LogitsError, match=r"gate\.last\.labels_left"):
        read(model(**batch))[1].pow(2).mean().backward()


def test_logits_in_a_tuple_are_watched() -> None:
    model, batch = _made("right")
    gate = regate.apply(model, SPARSE, teacher=None)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert gate.last is not None
    with pytest.raises(LogitsError, match=r"gate\.last\.labels_left"):
        (loss + logits.pow(2).mean()).backward()


def test_a_loss_outside_must_take_the_labels_that_are_kept() -> None:
    """On sparse steps: logits at the others mean nothing, and a gradient that comes from there is an error."""
    model, batch = _made("right")
    config = regate.Config(warmup=0, cycle=1, full_steps=0, logits="all")
    gate = regate.apply(model, config, teacher=None)

    def outside(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    output = model(**batch)
    with pytest.raises(LogitsError, match=r"gate\.last\.labels_left"):
        outside(output.logits, batch["labels"]).backward()
    output = model(**batch)
    assert gate.last is not None
    loss = outside(output.logits, gate.last.labels_left)
    loss.backward()
    torch.testing.assert_close(loss.float(), output.loss.float())


# -- supervision beside `labels` ------------------------------------------------------------------------


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_shifted_labels_are_masked_with_labels(name: str) -> None:
    model, batch = _made("right", name)
    batch |= {"shift_labels": _shifted(batch["labels"])}
    gate = regate.apply(model, SPARSE, teacher=None)
    plain: Objective = lambda model, output: output.loss  # noqa: E731
    got = _step(model, batch, plain)
    last = gate.last
    assert last is not None
    regate.remove(model)
    masked = batch | {"labels": last.labels_left, "shift_labels": _shifted(last.labels_left)}
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), last.active):
        assert_same(got, _step(model, masked, plain))


def _weighted(model: Any, name: str = "loss_weights", *, at_predictors: bool = False) -> None:
    """A loss of the model's own that takes weights of labels and divides by their sum."""
    forward = type(model).forward

    @functools.wraps(forward)
    def weighs(*args: Any, **kwargs: Any) -> Any:
        weights = kwargs.pop(name)
        output = forward(model, *args, **kwargs)
        labels = _shifted(kwargs["labels"])
        losses = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none")
        weights = (weights if at_predictors else F.pad(weights, (0, 1))[:, 1:]).flatten()
        output.loss = (losses * weights).sum() / weights.sum()
        return output

    model.forward = weighs


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
    plain: Objective = lambda model, output: output.loss  # noqa: E731
    dense = _step(model, batch, plain)
    gate = regate.apply(model, SPARSE if sparse else FULL, teacher=None)
    got = _step(model, batch, plain)
    if not sparse:
        assert_same(got, dense)
        return
    last = gate.last
    assert last is not None
    regate.remove(model)
    kept = F.pad(last.kept, (0, 1))[:, 1:] if at_predictors else last.kept
    masked = batch | {"labels": last.labels_left, name: weights * kept}
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), last.active):
        assert_same(got, _step(model, masked, plain))


def test_weights_of_a_shape_that_cannot_be_laid_along_labels() -> None:
    model, batch = _made("right")
    _weighted(model)
    regate.apply(model, SPARSE, teacher=None)
    with pytest.raises(LabelsError, match=r"`loss_weights` \[2, \d+\] seems to name or weigh labels"):
        model(**batch, loss_weights=torch.ones(2, batch["labels"].shape[1] + 3))


def _divided(model: Any, name: str, divisor: Callable[[Any], Any]) -> None:
    """A loss of the model's own: each row's sum by what `divisor` makes of an entry of the call, added up."""
    forward = type(model).forward

    @functools.wraps(forward)
    def divides(*args: Any, **kwargs: Any) -> Any:
        entry = kwargs.pop(name)
        output = forward(model, *args, **kwargs)
        labels = _shifted(kwargs["labels"])
        losses = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none")
        output.loss = (losses.view(labels.shape).sum(1) / divisor(entry)).sum()
        return output

    model.forward = divides


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
    plain: Objective = lambda model, output: output.loss  # noqa: E731
    call = batch | {name: entry(batch["labels"] != -100)}
    dense = _step(model, call, plain)
    regate.apply(model, FULL, teacher=None)
    assert_same(_step(model, call, plain), dense)
    gate = regate.apply(model, SPARSE, teacher=None)
    got, last = _step(model, call, plain), gate.last
    assert last is not None
    regate.remove(model)
    masked = batch | {"labels": last.labels_left, name: entry(last.kept)}
    with reference.masked(oracle.layers_of(gate.adapter.decoder(model)), last.active):
        assert_same(got, _step(model, masked, plain))


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
        ("num_frames", 5),
        ("logits_to_keep", 5),
        ("pad_token_id", 5),
        ("temperature", 5.0),
        ("whatever", 4),
        ("num_images", torch.tensor([2, 3])),
        ("row_ids", torch.tensor([2, 3])),
        ("whatever", torch.tensor([3, 2])),
        ("class_weights", torch.ones(2, 3)),
        ("loss_weights", [1.0, 0.5]),
        ("loss_weights", [[1.0, 0.5], [1.0, 0.5]]),
        ("loss_type", "sum"),
        ("options", {"image_weights": torch.ones(2, 7), "deep": {"temperature": 5}}),
    ],
)
def test_what_is_no_supervision_stays(name: str, x: Any) -> None:
    assert supervision.beside({name: x}, _labels_of_a_batch()) == {}


def test_one_label_is_no_telling_number() -> None:
    labels = torch.tensor([[-100, -100, 3]])
    assert supervision.beside({"whatever": 1, "other": torch.tensor([1])}, labels) == {}
    assert [*supervision.beside({"num_items_in_batch": 1}, labels)] == ["num_items_in_batch"]


def test_numbers_in_a_dict_are_scaled_in_a_copy() -> None:
    labels = _labels_of_a_batch()
    options = {"by_what": torch.tensor([2, 3]), "deep": {"total": 5, "mode": "sum"}}
    found = supervision.beside({"options": options}, labels)
    changed = supervision.masked(found, labels, labels == 8)["options"]
    assert changed["by_what"].tolist() == [0, 1]
    assert changed["deep"] == {"total": 1.0, "mode": "sum"}
    assert options["by_what"].tolist() == [2, 3]
    assert options["deep"] == {"total": 5, "mode": "sum"}


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
