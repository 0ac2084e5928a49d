"""Hugging Face's Trainer: the numbers of a loop by hand, resumption to the bit, and proof that it is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import regate
from regate.errors import CheckpointError, NotGatedError
from tests.zoo import CORE

pytestmark = pytest.mark.matrix
MODEL = CORE["smolvlm"]  # the checkpoints of some others (Llava) Trainer 5.23 itself cannot load back
CONFIG = regate.Config(warmup=1, cycle=4, full_steps=1, schedule="cycled")
Row = dict[str, Tensor]


class Rows(Dataset[Row]):
    """Single rows, as a processor gives them; `note` is a column that no model takes."""

    def __init__(self, number: int = 24) -> None:
        self.rows = [MODEL.batch("none", rows=1, seed=seed, answer=9) for seed in range(number)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return {k: v[0] for k, v in self.rows[i].items()}


def trainer(folder: Path, model: Any, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", None)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(folder), **(defaults | options))
    return Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows(2), callbacks=callbacks)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_as_a_loop_by_hand(tmp_path: Path) -> None:
    model = MODEL.build()
    gate = regate.apply(model, CONFIG)
    ours = trainer(tmp_path, model)
    order = [list(batch) for batch in _batches(ours)]
    ours.train()

    by_hand = MODEL.build()
    reference = regate.apply(by_hand, CONFIG)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for step in range(6):
        micro = order[2 * step : 2 * step + 2]
        total = sum(int((batch["labels"] != -100).sum()) for batch in map(dict, micro))
        for batch in map(dict, micro):
            by_hand(**batch, num_items_in_batch=torch.tensor(total)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights(by_hand).items():
        torch.testing.assert_close(dict(model.named_parameters())[name], weight, atol=1e-6, rtol=1e-5)
    exact = ("steps_full", "steps_sparse", "labels_kept", "positions_computed", "steps_missed")
    assert [gate.report()[n] for n in exact] == [reference.report()[n] for n in exact]
    assert gate.report()["steps_sparse"] == 3


def _batches(trainer: Trainer) -> list[list[tuple[str, Tensor]]]:
    """The batches of the first epoch, in the order in which training will see them."""
    from transformers import set_seed

    set_seed(trainer.args.seed)
    batches = [list(batch.items()) for batch in trainer.get_train_dataloader()]
    set_seed(trainer.args.seed)
    return batches


def test_numbers_in_the_log(tmp_path: Path) -> None:
    model = MODEL.build()
    regate.apply(model, CONFIG, teacher=None)
    ours = trainer(tmp_path, model)
    ours.train()
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert len(logged) == 6
    full, sparse = logged[0], logged[2]
    assert full["regate/kept_labels"] == 1.0
    assert sparse["regate/kept_labels"] == 0.5
    assert sparse["regate/active_tokens"] < full["regate/active_tokens"]
    assert sparse["regate/speedup_estimate"] > full["regate/speedup_estimate"] > 1.0


@pytest.mark.parametrize(("warmup", "told"), [(6, True), (5, True), (4, False)])
def test_a_run_that_ends_before_its_first_sparse_step_says_so(tmp_path: Path, warmup: int, told: bool) -> None:
    model = MODEL.build()
    gate = regate.apply(model, regate.Config(warmup=warmup, cycle=4, full_steps=1, schedule="cycled"), teacher=None)
    trainer(tmp_path, model).train()
    assert ("all 6 steps of this run are full" in str(gate.report())) == told
    assert (gate.report()["steps_sparse"] == 0) == told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schedule": "cycled"}, True),
        ({}, False),
        ({"schedule": "cycled", "total_steps": 6, "final_full_steps": 1}, False),
    ],
)
def test_a_run_that_ends_long_after_its_last_full_step_says_so(
    tmp_path: Path, changes: dict[str, Any], told: bool
) -> None:
    model = MODEL.build()
    gate = regate.apply(model, regate.Config(warmup=1, cycle=8, full_steps=1, **changes), teacher=None)
    trainer(tmp_path, model).train()
    assert ("this run ends 4 steps after its last full one" in str(gate.report())) == told


@pytest.mark.parametrize("persistent", [False, True])
def test_resumes_to_the_bit(tmp_path: Path, persistent: bool) -> None:
    def run(name: str, **options: Any) -> tuple[Trainer, regate.Gate]:
        model = MODEL.build()
        gate = regate.apply(model, CONFIG, store=str(tmp_path / "store") if persistent else None)
        return trainer(tmp_path / name, model, save_strategy="steps", save_steps=3, **options), gate

    whole, gate = run("a")
    whole.train()
    expected, state = weights(whole.model), gate.state_dict()
    resumed, gate = run("a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_equal(weights(resumed.model), expected)
    again = gate.state_dict()
    assert again["step"] == state["step"] == 6
    assert_equal(again["difficulty"], state["difficulty"])
    assert_equal({"mean": again["prior"]["mean"]}, {"mean": state["prior"]["mean"]})


def test_a_checkpoint_from_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MODEL.build()
    gate = regate.apply(model, CONFIG, teacher=None)
    trainer(tmp_path / "a", model, save_strategy="steps", save_steps=3, max_steps=3).train()
    moved = tmp_path / "moved"
    (tmp_path / "a" / "checkpoint-3").rename(moved)
    regate.apply(model, CONFIG, teacher=None)
    resumed = trainer(tmp_path / "b", model)
    with pytest.raises(CheckpointError, match=r"gate\.load"):
        resumed.train(resume_from_checkpoint=str(moved))
    gate = regate.apply(model, CONFIG, teacher=None)
    gate.load(moved)
    trainer(tmp_path / "b", model, max_steps=5).train(resume_from_checkpoint=str(moved))
    assert gate.state_dict()["step"] == 5
    state = torch.load(moved / "regate.pt")
    torch.save(state | {"step": 2}, moved / "regate.pt")  # a step that a gradient scaler skipped is the trainer's alone
    gate = regate.apply(model, CONFIG, teacher=None)
    gate.load(moved)
    trainer(tmp_path / "b", model, max_steps=5).train(resume_from_checkpoint=str(moved))
    assert gate.state_dict()["step"] == 4


def test_a_checkpoint_that_was_cut_short_names_a_whole_one(tmp_path: Path) -> None:
    model = MODEL.build()
    regate.apply(model, CONFIG, teacher=None)
    trainer(tmp_path, model, save_strategy="steps", save_steps=2, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "regate.pt").unlink()
    regate.apply(model, CONFIG, teacher=None)
    with pytest.raises(CheckpointError, match=r"Resume from .*checkpoint-2, which holds one"):
        trainer(tmp_path, model).train(resume_from_checkpoint=True)


def test_a_dense_run_goes_on_gated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MODEL.build()
    trainer(tmp_path, model, save_strategy="steps", save_steps=2, max_steps=2).train()
    gate = regate.apply(model, CONFIG, teacher=None)
    trainer(tmp_path, model, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert gate.state_dict()["step"] == 4
    assert "without a gate" in caplog.text


def test_resumes_where_the_gate_stands_by_chance(tmp_path: Path) -> None:
    """In the same process, after the checkpoint: what was learnt since is forgotten."""
    model = MODEL.build()
    gate = regate.apply(model, CONFIG, teacher=None)
    trainer(tmp_path, model, save_strategy="steps", save_steps=1).train()
    learnt, counted = weights(model), gate.report()["labels_kept"]
    assert gate.step == 5
    trainer(tmp_path, model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(weights(model), learnt)
    assert gate.report()["labels_kept"] == counted


@pytest.mark.parametrize("anew", [False, True])
def test_training_again_says_where_the_schedule_goes_on(tmp_path: Path, anew: bool) -> None:
    model = MODEL.build()
    gate = regate.apply(model, CONFIG, teacher=None)
    full = []
    for _ in range(2):
        trainer(tmp_path, model, max_steps=3).train()
        full.append(gate.report()["steps_full"])
        if anew:
            gate.step = 0
    assert full == ([2, 4] if anew else [2, 3])
    assert ("the gate's schedule goes on at step 3" in str(gate.report())) is not anew


def test_a_model_made_in_train_is_trained_dense_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = trainer(tmp_path, MODEL.build(), max_steps=1).args

    def dense() -> Any:
        return MODEL.build()

    ours = Trainer(args=arguments, model_init=dense, train_dataset=Rows(4))
    gate = regate.apply(ours.model, CONFIG, teacher=None)
    ours.train()
    assert gate.last is None
    assert "call regate.apply in model_init" in caplog.text

    def gated() -> Any:
        model = MODEL.build()
        regate.apply(model, CONFIG, teacher=None)
        return model

    caplog.clear()
    Trainer(args=arguments, model_init=gated, train_dataset=Rows(4)).train()
    assert "model_init" not in caplog.text


def test_evaluation_early_stopping_and_saving_the_best(tmp_path: Path) -> None:
    model = MODEL.build()
    gate = regate.apply(model, CONFIG, teacher=None)
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 20}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 5.0}
    ours = trainer(tmp_path, model, callbacks=[EarlyStoppingCallback(2)], **options)
    ours.train()
    assert ours.state.global_step < 20
    assert gate.report()["steps_sparse"] > 0


OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "inductor": {},
}
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(tmp_path: Path, option: str, device: str) -> None:
    """Each ends in the weights of a run without it."""
    results = []
    for chosen in ("", option):
        model = MODEL.build()
        gate = regate.apply(model, CONFIG, teacher=None, backend="inductor" if chosen == "inductor" else "eager")
        trainer(tmp_path, model, max_steps=4, use_cpu=device == "cpu", **OPTIONS.get(chosen, {})).train()
        assert gate.report()["steps_sparse"] == 2
        # Under the user's own torch.compile Dynamo gives up wrappers that the decoder's forward has, too, and then
        # captures what they wrap.
        assert gate.report()["recompiles"] <= (chosen == "torch_compile")
        results.append(weights(model))
    compiled = option == "inductor"  # which rounds otherwise
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, atol=1e-4 if compiled else 1e-6, rtol=1e-5)


def test_a_loss_that_hides_the_labels_is_found_out(tmp_path: Path) -> None:
    model = MODEL.build()
    regate.apply(model, CONFIG, teacher=None)
    with pytest.raises(NotGatedError, match="got no `labels`"):
        trainer(tmp_path, model, label_smoothing_factor=0.1).train()


def test_parts_called_directly_are_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = MODEL.build(), MODEL.batch()
    gate = regate.apply(model, CONFIG, teacher=None, on_unsupported="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(4):
        model.forward(**batch).loss.backward()
        optimizer.step()
    assert gate.report()["steps_missed"] == 2
    assert "no training forward" in caplog.text
    assert "; 2 should have been sparse, and were not" in str(gate.report())
