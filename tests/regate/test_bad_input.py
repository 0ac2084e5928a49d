"""What a gated model is given and cannot use, or that fails within it: told, and nothing is left behind."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from regate.errors import LabelsError, UnknownArchitectureError
from regate_patch import NotElidedError
from tests.steps import step
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def test_no_labels_at_all_runs_ungated() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    gate = regate.apply(model, SPARSE)
    model(**{k: v for k, v in batch.items() if k != "labels"})
    model(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert gate.report()["forwards_ungated"] == 1
    assert gate.report()["labels_seen"] == 0


def test_answers_that_are_all_masked_are_noted_once() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    masked = batch | {"labels": torch.full_like(batch["labels"], -100)}
    gate = regate.apply(model, FULL, teacher=None)
    for forwards, noted in ((7, False), (1, True), (9, True)):
        for _ in range(forwards):
            model(**masked)
        assert (str(gate.report()).count("8 training forwards in a row had no label") == 1) == noted
    again = regate.apply(model, FULL, teacher=None)
    for labelled in [False] * 7 + [True] + [False] * 7:
        model(**(batch if labelled else masked))
    assert "in a row" not in str(again.report())


def test_a_row_without_labels_and_an_empty_row() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right", rows=3)
    batch["labels"][0] = -100
    gate = regate.apply(model, SPARSE)
    loss, grads = step(model, batch)
    assert torch.isfinite(loss)
    assert gate.last is not None
    assert not gate.last.active[0].any()
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (lambda x: x[:, :-1], r"labels \[2, "),
        (lambda x: torch.where(x >= 0, 5000, x), "vocabulary size 100"),
        (lambda x: torch.where(x >= 0, -7, x), "vocabulary size 100"),
        (lambda x: x[:0], r"the batch is empty: labels \[0, "),
    ],
)
def test_bad_labels(labels: Any, says: str) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    regate.apply(model, SPARSE)
    batch["labels"] = labels(batch["labels"])
    with pytest.raises(LabelsError, match=says):
        model(**{name: x if len(batch["labels"]) else x[:0] for name, x in batch.items()})


def _ignores_0(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)


@pytest.mark.parametrize("config", [FULL, SPARSE, regate.Config.exact()], ids=["full", "sparse", "exact"])
@pytest.mark.parametrize("told", ["call", "options", "config", "module", "partial", "nowhere"])
def test_labels_that_another_index_ignores(told: str, config: regate.Config) -> None:
    """Where it can be told, before the model runs."""
    torch._dynamo.reset()
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    call: dict[str, Any] = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, 0)}
    says = {
        "call": r"the call's `ignore_index` is 0: .* Set ignored labels to -100",
        "options": r"the call's `ignore_index` is 0",
        "config": "the model's config has ignore_index=0, no label is -100",
        "module": "the model's `criterion` has ignore_index=0",
        "partial": "the model's loss has ignore_index=0",
        "nowhere": "the model's loss takes -100 for a token id",
    }
    if told == "call":
        call["ignore_index"] = 0
    elif told == "options":
        call["loss_kwargs"] = {"ignore_index": 0}
    elif told == "config":
        model.config.text_config.ignore_index = 0
    elif told == "module":
        model.criterion = nn.CrossEntropyLoss(ignore_index=0)
    else:
        model.loss_function = functools.partial(_ignores_0, ignore_index=0) if told == "partial" else _ignores_0
    regate.apply(model, config, teacher=None)
    with pytest.raises(LabelsError, match=says[told]):
        model(**call)


def test_an_index_that_labels_do_not_go_by() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    model.config.text_config.ignore_index = 0
    regate.apply(model, SPARSE, teacher=None)
    model(**batch, ignore_index=-100)


def test_a_head_that_was_widened_by_hand() -> None:
    """Its config does not know."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none")
    model.lm_head = nn.Linear(32, 108, bias=False)
    model.loss_function = lambda logits, labels, **others: nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    batch["labels"][0, -3] = 107
    loss, _ = step(model, batch)
    regate.apply(model, FULL, teacher=None)
    torch.testing.assert_close(step(model, batch)[0], loss)


def test_a_hook_that_changes_the_batch_comes_first() -> None:
    """Also one that was registered after the gate: labels of a curriculum, say. Its first forward is not gated."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    fewer = batch["labels"].clone()
    fewer[:, :14] = -100

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"labels": fewer}

    dense, _ = step(model, batch | {"labels": fewer})
    gate = regate.apply(model, FULL, teacher=None)
    step(model, batch)
    hook = model.register_forward_pre_hook(change, with_kwargs=True)
    for _ in range(2):
        torch.testing.assert_close(step(model, batch)[0], dense)
    assert gate.last is not None
    assert gate.last.labels_seen == int((fewer != -100).sum())
    assert gate.report()["forwards_ungated"] == 1
    assert "(tests.regate.test_bad_input) hangs on LlavaForConditionalGeneration" in str(gate.report())
    hook.remove()
    regate.remove(model)
    assert not any("regate" in type(h).__module__ for h in model._forward_pre_hooks.values())


def test_a_failed_forward_leaves_no_trace() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    gate = regate.apply(model, SPARSE)
    with pytest.raises(ValueError, match="tokens"):
        model(**batch | {"pixel_values": batch["pixel_values"][:1]})
    from regate_patch import current

    assert current() is None
    loss, _ = step(model, batch)
    assert torch.isfinite(loss)
    assert gate.report()["attention_blocks"] == 2


def test_ctrl_c_leaves_the_config_as_it_was() -> None:
    """What is saved then generates as before."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    regate.apply(model, SPARSE, teacher=None)
    before, found = model.config.to_dict(), []

    def stop(*args: object) -> None:
        found.append(model.config.to_dict())
        raise KeyboardInterrupt

    for inside in (model.model.vision_tower, model.lm_head):
        hook = inside.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
        assert model.config.to_dict() == before
    assert found == [before, before]
    assert before["text_config"]["use_cache"]


def test_unknown_architecture() -> None:
    with pytest.raises(regate.RegateError, match=r"no adapter serves Linear.*register_adapter"):
        regate.apply(nn.Linear(2, 2))


def test_a_mask_of_another_length() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    regate.apply(model, teacher=None)
    mask = batch["attention_mask"]
    for other in (mask[:, :-1], mask[:1]):
        said = f"attention_mask is {list(other.shape)}, but the batch has {list(mask.shape)} positions"
        with pytest.raises(UnknownArchitectureError, match=re.escape(said)):
            model(**batch | {"attention_mask": other})


def test_decoder_that_is_never_called() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    other = CORE["llava"].build().model.language_model
    adapter = regate.ModelAdapter(serves=("llava",), decoder=lambda m: other)
    regate.apply(model, SPARSE, adapter=adapter, teacher=None)
    with pytest.raises(regate.RegateError, match="without calling its decoder"):
        model(**batch)


def test_a_forward_that_passes_by_what_the_gate_left_is_noticed() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    regate.apply(model, SPARSE, teacher=None)
    decoder = model.model.language_model
    decoder.forward = type(decoder).forward.__get__(decoder)  # by something that wraps it anew
    with pytest.raises(NotElidedError, match="call the one before"):
        model(**batch)
