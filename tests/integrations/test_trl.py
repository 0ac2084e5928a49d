"""TRL's SFTTrainer: its fused head returns log-probabilities and no logits, and it sums and divides them itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import regate
from regate.errors import ConfigError
from tests.integrations.test_trainer import MODEL, Rows

pytestmark = pytest.mark.matrix
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
_rows = list(map(Rows().__getitem__, range(len(Rows()))))


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(100)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t3")), pad_token="t0", eos_token="t2"
    )
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def trainer(folder: Path, model: Any, **options: Any) -> SFTTrainer:
    peft_config = options.pop("peft_config", None)
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in _rows]).with_format(
            "torch"
        ),
        data_collator=lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]},
        processing_class=_tokenizer(folder / "tokenizer"),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("counted", [False, True], ids=["mean", "num_items_in_batch"])
def test_loss_and_metrics_are_means_over_kept_labels(tmp_path: Path, counted: bool) -> None:
    batch = MODEL.batch("none")
    total = torch.tensor(int((batch["labels"] != -100).sum()))
    model = MODEL.build()
    gate = regate.apply(model, replace(SPARSE, logits="all"))
    expected = model(**batch)
    expected.loss.backward()
    gradient = model.lm_head.weight.grad
    kept = gate.last.kept if gate.last else torch.zeros(())

    model = MODEL.build()
    ours = trainer(tmp_path, model)
    gate = regate.apply(model, SPARSE)
    loss = ours.compute_loss(model, dict(batch), num_items_in_batch=total if counted else None)
    loss.backward()
    assert gate.last is not None
    assert torch.equal(gate.last.kept, kept)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)
    at = kept.nonzero(as_tuple=True)
    guesses = expected.logits[at[0], at[1] - 1]
    right = (guesses.argmax(-1) == batch["labels"][at]).float().mean()
    entropy = torch.distributions.Categorical(logits=guesses).entropy().mean()
    metrics = ours._metrics["train"]
    assert metrics["mean_token_accuracy"][0] == pytest.approx(float(right), abs=1e-6)
    assert metrics["entropy"][0] == pytest.approx(float(entropy), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trains(tmp_path: Path, lora: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]) if lora else None
    ours = trainer(tmp_path, MODEL.build(), peft_config=config)
    gate = regate.apply(ours.model, SPARSE)
    ours.train()
    report = gate.report()
    assert report["steps_sparse"] == 3
    assert report["positions_computed"] < report["positions_seen"]
    assert gate.store.count("difficulty") == 12
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(entry["regate/kept_labels"] == 0.5 for entry in logged)
    assert all(4 < entry["loss"] < 5.5 for entry in logged)  # about log(100): neither halved nor doubled
    assert all(0 <= entry["mean_token_accuracy"] <= 1 for entry in logged)
    assert logged[-1]["num_tokens"] == 3 * 4 * _rows[0]["input_ids"].numel()


def test_losses_that_weigh_the_sum_are_refused(tmp_path: Path) -> None:
    model = MODEL.build()
    ours = trainer(tmp_path, model, loss_type="dft")
    regate.apply(model, SPARSE, teacher=None)
    with pytest.raises(ConfigError, match="dft"):
        ours.train()
