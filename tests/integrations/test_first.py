"""The model as its own teacher, in Trainers and on several ranks: the references of a copy, each computed once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

import regate
from regate import trainer as callbacks
from regate.errors import ConfigError, StoreError
from tests.integrations import ranks_first
from tests.integrations.processes import run_ranks
from tests.integrations.ranks import build
from tests.integrations.ranks_first import batch_of
from tests.integrations.test_trainer import CONFIG, MODEL, Rows, assert_equal, trainer, weights

pytestmark = pytest.mark.matrix
References = dict[bytes, list[float]]


def references(gate: regate.Gate) -> References:
    return {key: losses.tolist() for key, losses in gate.store.items("reference")}


class Drawing(Rows):
    """Rows whose images are drawn anew whenever they are read, by every generator; `stop` raises as Ctrl-C does."""

    stop: int | None = None

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i == self.stop:
            raise KeyboardInterrupt
        row = super().__getitem__(i)
        return row | {"pixel_values": row["pixel_values"] + torch.rand(()) * random.random()}


class Endless(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from Rows()


def run(folder: Path, choice: Any, data: Any = None, **options: Any) -> tuple[Trainer, regate.Gate]:
    """A trainer and its gate; the teacher is `choice`."""
    model = MODEL.build()
    gate = regate.apply(model, CONFIG, teacher=choice, store=options.pop("store", None))
    ours = trainer(folder, model, **options)
    ours.train_dataset = data or Drawing()
    return ours, gate


def test_a_trainer_trains_as_with_a_copy(tmp_path: Path) -> None:
    copied, _ = run(tmp_path, "copy")
    copied.train()
    first, gate = run(tmp_path, "first")
    first.train()
    assert_equal(weights(first.model), weights(copied.model))
    assert gate.report()["steps_sparse"] == 3
    assert gate.report()["teacher_samples"] == gate.store.count("reference") == len(Rows())
    other = regate.apply(MODEL.build(), CONFIG, teacher="copy")
    other.precompute(DataLoader(Rows(), batch_size=3), progress=False)
    assert references(gate) == references(other)


def test_where_one_rank_has_no_room_for_a_copy_none_keeps_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, gate = run(tmp_path, "auto")
    assert not gate.first
    monkeypatch.setattr(callbacks, "any_rank", lambda here: True)
    ours.train()
    assert gate.first
    assert gate.report()["steps_sparse"] == 3
    assert gate.store.count("reference") == len(Rows())


@pytest.mark.parametrize("persistent", [False, True])
def test_resumes_to_the_bit(tmp_path: Path, persistent: bool) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    if persistent:
        options["store"] = str(tmp_path / "store")
    whole, gate = run(tmp_path / "a", "first", Rows(), **options)
    whole.train()
    expected, made = weights(whole.model), references(gate)
    gate.remove()
    resumed, gate = run(tmp_path / "a", "first", Rows(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_equal(weights(resumed.model), expected)
    assert references(gate) == made
    assert gate.report()["teacher_samples"] == len(Rows())  # counted before the checkpoint, none after
    if persistent:
        resumed, _ = run(tmp_path / "a", "first", Rows(), **options | {"store": str(tmp_path / "lost")})
        with pytest.raises(StoreError, match="store of the run"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


def test_interrupted_it_goes_on(tmp_path: Path) -> None:
    data = Drawing()
    data.stop = 13
    ours, gate = run(tmp_path, "first", data)
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert gate.store.count("reference") == 12
    data.stop = None
    ours.train()
    assert gate.report()["teacher_samples"] == len(data)
    assert gate.report()["steps_sparse"] == 3


def test_a_stream_is_refused_by_name(tmp_path: Path) -> None:
    ours, _ = run(tmp_path, "first", Endless())
    with pytest.raises(ConfigError, match=r"Endless.* has no length.*keep a copy"):
        ours.train()
    ours, gate = run(tmp_path, "precomputed", Endless())
    gate.precompute(DataLoader(Rows(), batch_size=2), progress=False)
    ours.train()
    assert gate.report()["steps_sparse"] == 3


def test_other_data_after_training_is_refused(tmp_path: Path) -> None:
    ours, _ = run(tmp_path, "first", Rows(12))
    ours.train()
    ours.train()  # nothing is missing
    ours.train_dataset = Rows(13)
    with pytest.raises(StoreError, match="no longer is the teacher"):
        ours.train()


# -- several ranks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.integrations.ranks_first", tmp_path_factory.mktemp("ranks"))


def expected(cell: Any, batches: Any) -> References:
    """By a copy, in one process."""
    gate = regate.apply(build(cell), ranks_first.CONFIG, teacher="copy")
    gate.precompute(batches, progress=False)
    return references(gate)


def test_ranks_of_a_trainer_share_the_work(ranks: list[dict[str, Any]]) -> None:
    alone = expected(ranks_first.FULL, DataLoader(ranks_first.Rows(), batch_size=4))  # type: ignore[var-annotated]
    for rank in ranks:
        assert rank["trainer"]["references"] == rank["copied"]["references"] == alone
        assert rank["trainer"]["sparse"] == 2
        assert_equal(rank["trainer"]["weights"], rank["copied"]["weights"])
    assert [rank["trainer"]["computed"] for rank in ranks] == [12, 11]


def test_a_split_model_teaches_itself(ranks: list[dict[str, Any]]) -> None:
    alone = expected(ranks_first.FULL, DataLoader(ranks_first.Rows(3), batch_size=2))  # type: ignore[var-annotated]
    afterwards = expected(ranks_first.FULL, [batch_of(0), batch_of(1)])
    for rank in ranks:
        assert rank["split"]["references"] == alone
        assert "before the first optimizer step" in rank["split"]["missing"]
        assert rank["split"]["sparse"] == 2
        assert rank["afterwards"]["references"] == afterwards
        assert rank["split"]["losses"] == rank["afterwards"]["losses"]
        assert rank["dealt out"] == rank["afterwards"]
    assert [rank["split"]["computed"] for rank in ranks] == [2, 1]


def test_adapters_of_a_split_model_teach_in_step(ranks: list[dict[str, Any]]) -> None:
    batches = [batch_of(seed) for seed in (0, 1, 3, 8)]
    alone = expected(ranks_first.LORA, batches)
    for rank in ranks:
        assert {k: v for k, v in rank["adapters"]["references"].items() if v} == alone
    assert [rank["adapters"]["computed"] for rank in ranks] == [4, 6]  # two of rank 0's have no label
    for rank in ranks:
        assert rank["adapters dealt out"]["references"] == expected(ranks_first.LORA, [batch_of(0), batch_of(1)])
        assert rank["adapters dealt out"]["losses"][:2] == rank["adapters"]["losses"][:2]
