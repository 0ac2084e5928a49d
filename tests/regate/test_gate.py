"""The gate on real (tiny) multimodal models."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import regate
from regate.errors import StoreError
from regate_patch import reference
from tests import oracle
from tests.steps import assert_same, step
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3"])
def test_full_step_is_the_unpatched_model(name: str, padding: Any) -> None:
    model, batch = CORE[name].build().double(), oracle.double(CORE[name].batch(padding))
    loss, grads = step(model, batch)
    gate = regate.apply(model, replace(FULL, logits="all"), teacher=None)  # see test_head.py for the short head
    gated_loss, gated = step(model, batch)
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
    loss, grads = step(model, batch)
    last, labels = gate.last, batch["labels"]
    assert last is not None
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert last.labels_kept == math.ceil(int((labels != -100).sum()) / 2)
    assert not last.kept[labels == -100].any()
    report = gate.report()
    assert report["positions_computed"] == last.active.sum() < report["positions_seen"]
    assert report["attention_blocks"] == report["mlp_blocks"] == 2
    assert report["speedup_possible"] > 1.05


def _all_of_the_last(m: Tensor, ref: Tensor, prior: Tensor) -> Tensor:
    return torch.arange(m.numel()).float().view_as(m)


def test_sparse_loss_is_the_oracles() -> None:
    """Loss and gradients of a sparse step against the per-layer masked reference with masked labels."""
    model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("right"))
    gate = regate.apply(model, replace(SPARSE, logits="all"))
    loss, grads = step(model, batch)
    assert gate.last is not None
    regate.remove(model)
    batch["labels"] = torch.where(gate.last.kept, batch["labels"], -100)
    with reference.masked(model.model.language_model.layers, gate.last.active):
        expected, expected_grads = step(model, batch)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    for n, grad in expected_grads.items():
        torch.testing.assert_close(grads[n], grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mean_of_rows", [False, True])
def test_each_sample_keeps_a_label_of_the_batchs(mean_of_rows: bool) -> None:
    """Though its budget is for the last rows: of no label there is no mean."""
    model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("right", rows=4))
    own = model.loss_function

    def by_rows(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        return sum((own(logits[b, None], labels[b, None], **others) for b in range(4)), torch.zeros(())) / 4

    model.loss_function = by_rows if mean_of_rows else own
    gate = regate.apply(model, replace(SPARSE, keep=0.25, score=_all_of_the_last), teacher=None)
    found = step(model, batch)
    assert gate.last is not None
    assert gate.last.kept.sum(1).tolist()[:2] == [1, 1]
    assert gate.last.labels_kept == math.ceil(int((batch["labels"] != -100).sum()) / 4)
    kept, active = gate.last.labels_left, gate.last.active
    regate.remove(model)
    with reference.masked(model.model.language_model.layers, active):
        assert_same(found, step(model, {**batch, "labels": kept}))


@pytest.mark.parametrize("config", [FULL, SPARSE])
def test_a_penalty_on_gradients(config: regate.Config) -> None:
    """With attention that torch itself can differentiate twice, and logits in several chunks."""
    model, batch = CORE["llava"].double(), oracle.double(CORE["llava"].batch("right"))
    some = model.model.multi_modal_projector.linear_1.weight

    def penalized(output: Any) -> Tensor:
        (gradient,) = torch.autograd.grad(output.loss, some, create_graph=True)
        return gradient.square().sum()

    gate = regate.apply(model, config, teacher=None)
    with sdpa_kernel(SDPBackend.MATH):
        step(model, batch)
        gate._parts.lazy_head().chunk = 300
        found = step(model, batch, penalized)
        assert gate.last is not None
        kept, active = gate.last.labels_left, gate.last.active
        regate.remove(model)
        with reference.masked(model.model.language_model.layers, active):
            expected = step(model, {**batch, "labels": kept, "use_cache": False}, penalized)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-5)


def test_micro_batches_share_the_decision() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, regate.Config(warmup=1, cycle=2, full_steps=1, schedule="cycled"), teacher=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decisions = []
    for made in range(4):
        for micro in range(3):
            model(**CORE["llava"].batch(seed=3 * made + micro)).loss.backward()
            assert gate.last is not None
            decisions.append(gate.last.full)
        optimizer.step()
        optimizer.zero_grad()
    assert decisions == [True] * 6 + [False] * 3 + [True] * 3
    assert gate.report()["steps_full"] == 3
    assert "warm-up" not in str(gate.report())
    assert gate.report()["steps_sparse"] == 1


def test_a_run_that_is_all_warm_up_so_far_says_so() -> None:
    """But not where no step is ever sparse."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    for config, said in ((regate.Config(), True), (regate.Config.exact(), False)):
        gate = regate.apply(model, config, teacher=None)
        assert "warm-up" not in str(gate.report())
        model(**batch)
        assert ("1 full, 0 sparse; all of them were warm-up so far (warmup=100)" in str(gate.report())) == said


def test_optimizers_of_master_copies_and_of_others_are_told_apart() -> None:
    """Mixed-precision optimizers step copies of the weights; another model's optimizer is not ours to count."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    gate = regate.apply(model, FULL, teacher=None)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    copies = torch.optim.SGD(masters, lr=0.1)
    for made in range(4):
        assert gate.step == max(made - 1, 0)
        model(**batch).loss.backward()
        assert gate.step == made
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad
        copies.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
    ours, other = torch.optim.SGD(model.parameters(), lr=0.0), copies
    for made in range(4, 6):
        model(**batch).loss.backward()
        assert gate.step == made
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
        losses.append(step(model, batch | extra)[0])
        assert gate.last is not None
        assert int(gate.last.kept.sum()) < total
    torch.testing.assert_close(losses[0], losses[1])


def test_remove_restores_to_the_bit() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    keys, (loss, grads) = list(model.state_dict()), step(model, batch)
    hooks = ("_forward_hooks", "_forward_pre_hooks")  # transformers has some of its own

    def state() -> dict[str, tuple[list[str], list[list[int]]]]:
        return {name: (list(m.__dict__), [list(m.__dict__[h]) for h in hooks]) for name, m in model.named_modules()}

    before = state()
    regate.apply(model, SPARSE)
    regate.apply(model, SPARSE)
    step(model, batch)
    assert list(model.state_dict()) == keys
    regate.remove(model)
    assert state() == before
    again, again_grads = step(model, batch)
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
        torch.testing.assert_close(step(other, batch)[0], step(loaded, batch)[0])  # ungated


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
    loss, _ = step(model, batch)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    gate = regate.apply(model, FULL, teacher=None)
    torch.testing.assert_close(step(model, batch)[0], loss)
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
    step(model, batch)
    step(model, batch | {"pixel_values": batch["pixel_values"] + 1})
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


@pytest.mark.parametrize("removed", [False, True])
def test_a_gated_model_is_garbage_collected(removed: bool) -> None:
    """And its teacher's copy, also when Dynamo has captured them, which keeps what it was given."""
    model = CORE["llava"].build()
    gate = regate.apply(model, SPARSE)
    model(**CORE["llava"].batch("right")).loss.backward()
    assert gate._teacher is not None
    decoders = model.model.language_model, gate._teacher.decoder
    gone = [weakref.ref(x) for x in (model, gate, *decoders, *(d.layers[0].mlp.up_proj.weight for d in decoders))]
    if removed:
        regate.remove(model)
    del model, gate, decoders
    gc.collect()
    assert not any(x() for x in gone)
