"""The examples run, on little data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples import engine_alone
from examples.conversations import Conversations, collate, encode, read
from examples.demo import captions, tiny, train


@pytest.fixture(scope="module")
def some() -> list[captions.Caption]:
    return captions.load()["train"][:40]


def test_captions_split_cleanly(some: list[captions.Caption]) -> None:
    parts = captions.load()
    images = [{c.image for c in part} for part in parts.values()]
    assert len(set.union(*images)) == sum(map(len, images))
    assert all(len(c.words) == len(c.grounded) and sum(c.grounded) == 4 for c in some)


def test_labels_are_the_assistants_words(some: list[captions.Caption]) -> None:
    processor = tiny.build_processor(" ".join(c.words) + " " + captions.PROMPT for c in some)
    row = encode(some[0].record(), processor)
    labels = row["labels"][0]
    words = processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert words == [*some[0].words, "</s>"]
    batch = collate([Conversations([c.record() for c in some[:3]], processor)[i] for i in range(3)], 0)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0)


def test_several_turns(some: list[captions.Caption]) -> None:
    record = some[0].record()
    again = {"role": "user", "content": [{"type": "text", "text": captions.PROMPT}]}
    record["messages"] += [again, record["messages"][1]]
    processor = tiny.build_processor(" ".join(c.words) + " " + captions.PROMPT for c in some)
    labels = encode(record, processor)["labels"][0]
    assert int((labels != -100).sum()) == 2 * (len(some[0].words) + 1)


@pytest.mark.matrix
def test_demo_on_its_own_data(tmp_path: Path) -> None:
    options = (
        "--steps 6 --text-steps 2 --vision-steps 2 --batch-size 4 --warmup 1 --cycle 4 --full-steps 1 --eval-every 3"
    )
    results = train.main([*options.split(), "--eval-samples", "8", "--repeats", "1", "--out", str(tmp_path)])
    arms = results["runs"][0]["arms"]
    assert arms["regate"]["final"]["answer_tokens"] < arms["dense"]["final"]["answer_tokens"]
    assert arms["regate"]["final"]["answer_tokens"] == arms["random"]["final"]["answer_tokens"]
    assert arms["exact"]["final"]["answer_tokens"] == arms["dense"]["final"]["answer_tokens"]
    for dense, exact in zip(arms["dense"]["curve"], arms["exact"]["curve"], strict=True):
        assert exact["loss"] == pytest.approx(dense["loss"], rel=1e-4), "exact mode learns what dense training does"
    assert 0 < arms["exact"]["curve"][0]["seconds"] < arms["exact"]["curve"][-1]["seconds"]
    assert json.loads((tmp_path / "results.json").read_text())["command"].startswith("python")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_demo_on_a_users_model_and_data(tmp_path: Path, some: list[captions.Caption]) -> None:
    processor = tiny.build_processor(" ".join(c.words) + " " + captions.PROMPT for c in some)
    tiny.build_model(processor, width=32, layers=2).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [
        {
            "image": c.image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{captions.PROMPT}"},
                {"from": "gpt", "value": " ".join(c.words)},
            ],
        }
        for c in some
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert read(tmp_path / "data.json")[0] == some[0].record() | {"images": [Path(some[0].image)]}
    options = "--steps 3 --batch-size 4 --warmup 1 --cycle 2 --full-steps 0 --eval-every 3 --repeats 1 --arms regate"
    paths = ["--model", tmp_path / "model", "--data", tmp_path / "data.json", "--out", tmp_path / "out"]
    results = train.main([*options.split(), *map(str, paths)])
    assert results["runs"][0]["arms"]["regate"]["report"]["steps_sparse"] == 2


def test_engine_alone() -> None:
    assert all(0 < loss < 10 for loss in engine_alone.main(steps=2))
