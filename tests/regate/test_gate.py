"""The gate on real (tiny) multimodal models."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from regate.errors import LabelsError, StoreError, UnknownArchitectureError
from regate_patch import NotElidedError
from tests import oracle
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def _step(model: nn.Module, batch: dict[str, Tensor], **extra: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **extra).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3"])
def test_full_step_is_the_unpatched_model(name: str, padding: Any) -> None:
    model, batch = CORE[name].build().double(), oracle.double(CORE[name].batch(padding))
    loss, grads = _step(model, batch)
    gate = regate.apply(model, replace(FULL, logits="all"), teacher=None)  # see test_head.py for the short head
    gated_loss, gated = _step(model, batch)
    assert gate.last is not None
    assert int(gate.last.active.sum()) < batch["attention_mask"].numel()
    # Gemma's norms compute in float32 whatever they are given.
    tolerance = {"atol": 1e-10, "rtol": 1e-10} if name != "gemma3" else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(gated_loss, loss, **tolerance)
    assert gated.keys() == grads.keys()
    for n, grad in grads.items():
        torch.testing.assert_close(gated[n], grad, **tolerance, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.few(5)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CORE)
def test_sparse_step(name: str, checkpointing: bool) -> None:
    model, batch = CORE[name].build(), CORE[name].batch("right")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gate = regate.apply(model, SPARSE, teacher=None if checkpointing else "auto")
    loss, grads = _step(model, batch)
    last, labels = gate.last, batch["labels"]
    assert last is not None
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert (last.kept.sum(1) == torch.ceil((labels != -100).sum(1) / 2)).all()
    assert not last.kept[labels == -100].any()
    report = gate.report()
    assert report["positions_computed"] == last.active.sum() < report["positions_seen"]
    assert report["attention_blocks"] == report["mlp_blocks"] == 2
    assert report["speedup_possible"] > 1.05


def _all_of_the_last(m: Tensor, ref: Tensor, prior: Tensor) -> Tensor:
    return torch.arange(m.numel()).float().view_as(m)


@pytest.mark.parametrize("alone", [False, True])
def test_sparse_loss_is_the_oracles(alone: bool) -> None:
    """Loss and gradients of a sparse step against the per-layer masked reference with masked labels.

    Also where the batch's budget goes to one sample alone.
    """
    from regate_patch import reference

    model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("right"))
    config = replace(SPARSE, budget="batch", keep=0.25, score=_all_of_the_last) if alone else SPARSE
    gate = regate.apply(model, replace(config, logits="all"))
    loss, grads = _step(model, batch)
    assert gate.last is not None
    assert int(gate.last.kept.sum(1).min()) == (0 if alone else 5)
    regate.remove(model)
    batch["labels"] = torch.where(gate.last.kept, batch["labels"], -100)
    with reference.masked(model.model.language_model.layers, gate.last.active):
        expected, expected_grads = _step(model, batch)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    for n, grad in expected_grads.items():
        torch.testing.assert_close(grads[n], grad, atol=1e-10, rtol=0)


def test_micro_batches_share_the_decision() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, regate.Config(warmup=1, cycle=2, full_steps=1, schedule="cycled"), teacher=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decisions = []
    for step in range(4):
        for micro in range(3):
            model(**CORE["llava"].batch(seed=3 * step + micro)).loss.backward()
            assert gate.last is not None
            decisions.append(gate.last.full)
        optimizer.step()
        optimizer.zero_grad()
    assert decisions == [True] * 6 + [False] * 3 + [True] * 3
    assert gate.report()["steps_full"] == 3
    assert gate.report()["steps_sparse"] == 1


def test_optimizers_of_master_copies_and_of_others_are_told_apart() -> None:
    """Mixed-precision optimizers step copies of the weights; another model's optimizer is not ours to count."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    gate = regate.apply(model, FULL, teacher=None)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    copies = torch.optim.SGD(masters, lr=0.1)
    for step in range(4):
        assert gate.step == max(step - 1, 0)
        model(**batch).loss.backward()
        assert gate.step == step
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad
        copies.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
    ours, other = torch.optim.SGD(model.parameters(), lr=0.0), copies
    for step in range(4, 6):
        model(**batch).loss.backward()
        assert gate.step == step
        ours.step()
        other.step()
        other.step()
    assert gate.state_dict()["step"] == 6
    assert gate.report()["steps_missed"] == 0


def test_trainers_own_label_count_is_rescaled() -> None:
    """A sum over kept labels divided by the count of all would shrink sparse steps' gradients."""
    batch, losses = CORE["llava"].batch("none"), []
    total = int((batch["labels"] != -100).sum())
    for extra in ({}, {"num_items_in_batch": torch.tensor(float(total))}):
        model = CORE["llava"].build()
        gate = regate.apply(model, SPARSE)
        losses.append(_step(model, batch, **extra)[0])
        assert gate.last is not None
        assert int(gate.last.kept.sum()) < total
    torch.testing.assert_close(losses[0], losses[1])


def test_remove_restores_to_the_bit() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    keys, (loss, grads) = list(model.state_dict()), _step(model, batch)
    hooks = ("_forward_hooks", "_forward_pre_hooks")  # transformers has some of its own

    def state() -> dict[str, tuple[list[str], list[list[int]]]]:
        return {name: (list(m.__dict__), [list(m.__dict__[h]) for h in hooks]) for name, m in model.named_modules()}

    before = state()
    regate.apply(model, SPARSE)
    regate.apply(model, SPARSE)
    _step(model, batch)
    assert list(model.state_dict()) == keys
    regate.remove(model)
    assert state() == before
    again, again_grads = _step(model, batch)
    assert torch.equal(again, loss)
    assert all(torch.equal(again_grads[n], g) for n, g in grads.items())
    with pytest.raises(regate.RegateError, match="no gate"):
        regate.remove(model)


def test_evaluation_and_generation_are_untouched() -> None:
    model, batch = CORE["llava"].build().eval(), CORE["llava"].batch("none")
    prompt = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        before, generated = model(**batch), model.generate(**prompt, max_new_tokens=5, do_sample=False)
    regate.apply(model, SPARSE)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before.logits)
        assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), generated)


def test_saving_and_copying(tmp_path: Path) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    regate.apply(model, SPARSE)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(_step(other, batch)[0], _step(loaded, batch)[0])  # ungated


def test_users_own_compile_and_replaced_forward() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    gate = regate.apply(model, SPARSE)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as Liger and TRL do
    compiled = torch.compile(model, backend="eager")
    compiled(**batch).loss.backward()
    report = gate.report()
    assert report["steps_sparse"] == 1
    assert report["attention_blocks"] == 2


def test_forwards_that_are_replaced_with_other_arguments() -> None:
    """Before and after `apply`: by one that says nothing of its arguments, or has them in another order."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    loss, _ = _step(model, batch)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    gate = regate.apply(model, FULL, teacher=None)
    torch.testing.assert_close(_step(model, batch)[0], loss)
    of_class = ("input_ids", "pixel_values", "attention_mask")
    positional = model(*(batch[name] for name in of_class), labels=batch["labels"])
    torch.testing.assert_close(positional.loss, loss)

    def own(labels: Tensor, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return forward(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, labels=labels)

    model.forward = own
    names = ("labels", "pixel_values", "input_ids", "attention_mask")
    torch.testing.assert_close(model(*(batch[name] for name in names)).loss, loss)
    assert gate.report()["labels_seen"] == 3 * int((batch["labels"] != -100).sum())


def test_difficulties_tell_images_apart() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=1)
    gate = regate.apply(model, FULL)
    _step(model, batch)
    _step(model, batch | {"pixel_values": batch["pixel_values"] + 1})
    gate.flush()
    assert gate.store.stats()["difficulty"] == 2
    gate.choose(batch)
    assert gate.store.stats()["reference"] == 1  # the teacher sees no image


def test_sample_ids_are_for_the_gate_alone() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    batch = {k: v[:1].expand(2, *v.shape[1:]) for k, v in batch.items()}  # one sample twice, told apart by id
    gate = regate.apply(model, FULL, teacher=None)
    model(**batch, sample_ids=["a", "b"])
    gate.flush()
    assert gate.store.stats()["difficulty"] == 2
    with torch.no_grad():
        model.eval()(**batch, sample_ids=["a", "b"])


def test_as_many_sample_ids_as_samples() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    regate.apply(model, FULL, teacher=None)
    row = {"input_ids": batch["input_ids"].view(1, -1), "labels": batch["labels"].view(1, -1)}
    row["position_ids"] = torch.arange(batch["labels"].shape[1]).repeat(2)[None]
    for call, ids in ((batch, ["a"]), (batch, []), (row | {"pixel_values": batch["pixel_values"]}, torch.tensor([7]))):
        with pytest.raises(StoreError, match=rf"brings {len(ids)} `sample_ids` and 2 samples.*one for each sample"):
            model(**call, sample_ids=ids)


@pytest.mark.parametrize("ids", [5, "ab", b"ab", {"a": 1, "b": 2}, {1, 2}, torch.tensor(2)])
def test_sample_ids_that_are_no_list(ids: Any) -> None:
    model = CORE["llava"].build()
    regate.apply(model, teacher=None)
    with pytest.raises(StoreError, match="must be a list, a tensor or an array with one id per sample, got"):
        model(**CORE["llava"].batch("none", rows=2), sample_ids=ids)


def test_one_sample_id_for_two_samples_is_refused() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    regate.apply(model, SPARSE, teacher=None)
    model(**batch, sample_ids=["a", "b"])
    batch["labels"][1, -1] = -100
    with pytest.raises(StoreError, match="share one of the `sample_ids`"):
        model(**batch, sample_ids=["a", "b"])


def test_a_gated_model_is_garbage_collected() -> None:
    model = CORE["llava"].build()
    gone = weakref.ref(model)
    regate.apply(model, FULL)
    del model
    gc.collect()
    assert gone() is None


# -- bad input ------------------------------------------------------------------------------------------


def test_no_labels_at_all_runs_ungated() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    gate = regate.apply(model, SPARSE)
    model(**{k: v for k, v in batch.items() if k != "labels"})
    model(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert gate.report()["forwards_ungated"] == 1
    assert gate.report()["labels_seen"] == 0


def test_a_row_without_labels_and_an_empty_row() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right", rows=3)
    batch["labels"][0] = -100
    gate = regate.apply(model, SPARSE)
    loss, grads = _step(model, batch)
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
    loss, _ = _step(model, batch)
    regate.apply(model, FULL, teacher=None)
    torch.testing.assert_close(_step(model, batch)[0], loss)


def test_a_hook_that_changes_the_batch_comes_first() -> None:
    """Also one that was registered after the gate: labels of a curriculum, say. Its first forward is not gated."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    fewer = batch["labels"].clone()
    fewer[:, :14] = -100

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"labels": fewer}

    dense, _ = _step(model, batch | {"labels": fewer})
    gate = regate.apply(model, FULL, teacher=None)
    _step(model, batch)
    hook = model.register_forward_pre_hook(change, with_kwargs=True)
    for _ in range(2):
        torch.testing.assert_close(_step(model, batch)[0], dense)
    assert gate.last is not None
    assert gate.last.labels_seen == int((fewer != -100).sum())
    assert gate.report()["forwards_ungated"] == 1
    assert "(tests.regate.test_gate) hangs on LlavaForConditionalGeneration" in str(gate.report())
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
    loss, _ = _step(model, batch)
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
    short = batch["attention_mask"][:, :-1]
    said = rf"attention_mask is \[2, {short.shape[1]}\], but the batch has \[2, {short.shape[1] + 1}\] positions"
    with pytest.raises(UnknownArchitectureError, match=said):
        model(**batch | {"attention_mask": short})


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
