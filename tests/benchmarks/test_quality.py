"""The experiments on quality: tasks and arms are what they say; runs resume, and count what they spend."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.quality.__main__ as quality
import regate
from benchmarks.quality import arms, occlusion, page, results, seconds, stranger
from benchmarks.quality.context import losses_of_kept
from benchmarks.quality.elision import (
    Gradients,
    at_random,
    by_change,
    everything_computed,
    led_by_references,
    visual_by,
    worthiest,
)
from benchmarks.quality.evaluate import with_blank, with_shuffled
from benchmarks.quality.run import Run, calibration, reweighted
from benchmarks.quality.start import endless, started, teacher
from benchmarks.quality.tasks import Settings, Task, arguments, captions, clips, photos
from benchmarks.quality.tasks.registry import TASKS
from examples.demo import tiny

SHORT = Settings(
    steps=3, batch_size=4, schedule={"warmup": 1, "cycle": 4, "full_steps": 0}, vision_steps=1, vision_batch_size=4,
    text_steps=1, evaluations=1, few=4, free=2,
)  # fmt: skip


def _captions(limit: int = 8) -> Task:
    task = captions.task(settings=SHORT, limit=limit)
    processor = task.train.processor
    return dataclasses.replace(task, build=lambda seed: tiny.build_model(processor, width=16, layers=1, seed=seed))


@pytest.fixture(scope="module")
def task() -> Task:
    return _captions()


def test_runs_once_and_resumes(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "captions", lambda: task)
    command = ["--tasks", "captions", "--arms", "dense", "regate", "--seeds", "0", "--out", str(tmp_path), "--again"]
    threads = torch.get_num_threads()
    try:
        quality.main(command)
        assert sorted(p.name for p in tmp_path.glob("*.json")) == ["captions-dense-0.json", "captions-regate-0.json"]
        monkeypatch.setattr(Run, "record", lambda self: pytest.fail("ran again"))
        quality.main(command)
    finally:
        torch.set_num_threads(threads)
    dense, regate = (json.loads((tmp_path / f"captions-{arm}-0.json").read_text()) for arm in ("dense", "regate"))
    assert dense["curve"][0]["loss"] == regate["curve"][0]["loss"], "arms must start from the same weights"
    assert dense["curve"][-1]["answer_tokens"] > regate["curve"][-1]["answer_tokens"] > 0
    assert dense["curve"][-1]["positions"] > regate["curve"][-1]["positions"] > 0
    assert dense["curve"][-1]["teacher_seconds"] == 0 < regate["curve"][-1]["teacher_seconds"]
    assert regate["report"]["labels_kept"] == regate["curve"][-1]["answer_tokens"]
    assert regate["report"]["steps_sparse"] == 2
    assert regate["context"].keys() == {"train", "validation"}
    assert not dense["context"]
    results.gather(tmp_path, tmp_path / "results")
    text = page.write(folder=tmp_path / "results", docs=tmp_path / "docs").read_text()
    assert "| whole answer |" not in text, "answers were generated for test samples only"
    final = page.write(part="test", folder=tmp_path / "results", docs=tmp_path / "docs").read_text()
    assert "| whole answer |" in final
    assert (tmp_path / "docs" / "evidence" / "captions.png").exists()
    assert "too few seeds" in (tmp_path / "docs" / "evidence" / "captions.md").read_text()


def _attentive(task: Task) -> Any:
    """Untrained, a word's loss hardly depends on what is before it."""
    model = task.build(0).train()
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(5)
    return model


@pytest.mark.parametrize("full_steps", [0, 64])
def test_losses_of_kept_words_with_and_without_the_elided_ones(task: Task, full_steps: int) -> None:
    model = _attentive(task)
    config = regate.Config(warmup=1, cycle=128, full_steps=full_steps, selection="random")
    gate = regate.apply(model, config, backend="eager")
    gate.step = 1
    batches = task.train.batches(4)
    found = losses_of_kept(model, gate, batches)
    assert found is not None
    assert gate.last is not None
    assert not gate.last.whole.any(), "whole samples lack no words"
    assert abs(found["sparse"] / found["full"] - 1) > 1e-3, "words before it tell something of a word"
    with everything_computed():
        found = losses_of_kept(model, gate, batches)
    assert found is not None
    assert found["sparse"] == pytest.approx(found["full"], rel=1e-5)
    gate.step = 0
    assert losses_of_kept(model, gate, batches) is None, "on a full step nothing is elided"


def test_visual_tokens_can_be_left_out_at_random(task: Task) -> None:
    model = task.build(0).train()
    gate = regate.apply(model, regate.Config(warmup=0, full_steps=0, cycle=1, visual_keep=0.5), backend="eager")
    batch = next(iter(task.train.batches(4)))
    active = []
    for seed in range(2):
        with visual_by(at_random(seed)):
            model(**arguments(batch), use_cache=False)
        assert gate.last is not None
        assert gate.last.active.sum(1).tolist() == gate.last.computed
        active.append(gate.last.active)
    assert not torch.equal(*active)


def test_visual_tokens_can_be_chosen_by_their_gradient(task: Task) -> None:
    """The norms are those of an embedding that is moved by hand, and the largest stay."""
    model, batch = _attentive(task), next(iter(task.train.batches(4)))
    looked = Gradients().look(model, batch)
    assert model.training
    given: list[torch.Tensor] = []

    def moved(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, kwargs | {"inputs_embeds": given[-1]}

    hook = model.model.language_model.register_forward_pre_hook(moved, with_kwargs=True)
    model.eval()(**arguments(batch)).loss.backward()
    hook.remove()
    assert given[0].grad is not None
    torch.testing.assert_close(looked.norms, given[0].grad.norm(dim=-1))
    visual = batch["input_ids"] == model.config.image_token_id
    stay = worthiest(looked(looked.embeddings, visual), visual, 0.5)
    for row, own, staying in zip(looked.norms, visual, stay, strict=True):
        n = int(own.sum())
        assert staying.sum() == -(-n // 2)
        assert not (staying & ~own).any()
        assert row[staying].min() >= row[own & ~staying].max()


def test_what_changes_from_frame_to_frame_is_worth_most() -> None:
    """Two places in three frames and an end: at the second one something comes in the last frame."""
    wall, door, thing = torch.eye(3)
    embeddings = torch.stack([wall, wall, door, 2 * wall, door, wall, thing, thing])[None]  # a word, the clip, its end
    visual = torch.tensor([[False, *[True] * 7]])
    assert by_change(2)(embeddings, visual).tolist() == [[0, 0, 0, 0, 1, 0, 1, 0]]
    assert not by_change(2)(embeddings, torch.zeros_like(visual)).any()
    with pytest.raises(ValueError, match="only clips"):
        by_change(None)


def test_samples_of_larger_reference_losses_keep_more_visual_tokens(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = task.build(0).train(), next(iter(task.train.batches(4)))
    config = regate.Config(warmup=0, full_steps=0, cycle=1, visual_keep=0.25, student_weight=0.0)
    gate = regate.apply(model, config, backend="eager")
    gate.precompute([arguments(batch)], progress=False)
    labels = (batch["labels"] != -100).sum(1).tolist()
    losses = [np.full(n, loss, np.float32) for n, loss in zip(labels, (1, 1, 1, 5), strict=True)]
    monkeypatch.setattr(gate.store, "get", lambda table, names: losses if table == "reference" else [None] * len(names))
    with led_by_references():
        model(**arguments(batch), use_cache=False)
    assert gate.last is not None
    assert gate.last.active.sum(1).tolist() == gate.last.computed
    visual = batch["input_ids"] == model.config.image_token_id
    n = int(visual[0].sum())
    assert (gate.last.active & visual).sum(1).tolist() == [np.ceil(n * share) for share in (0.125,) * 3 + (0.625,)]


def test_what_answers_need_is_told_by_hiding_it(task: Task) -> None:
    found = occlusion.measure(_attentive(task), task.validation)
    assert set(found) == {"all", *(f"{rule} {keep:g}" for rule in occlusion.RULES for keep in occlusion.KEEPS)}
    for keep in occlusion.KEEPS:
        best = found[f"gradient {keep:g}"]["gradient"]
        assert keep < best < 1
        assert best == max(found[f"{rule} {keep:g}"]["gradient"] for rule in occlusion.RULES)
    text = occlusion.section({"models": [found], "task": "t", "samples": 4})
    assert f"| 25% | {100 * found['likeness 0.25']['grounded']:.1f}% (" in text


def test_teachers_of_other_sizes(task: Task, tmp_path: Path) -> None:
    own = sum(p.numel() for p in task.build(0).model.language_model.parameters())
    small, large = (teacher(task, 0, tmp_path, size) for size in ("small", "large"))
    sizes = [sum(p.numel() for p in some.model.parameters()) for some in (small, large)]
    assert sizes[0] < own < sizes[1]
    again = teacher(task, 0, tmp_path, "small")
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_seeds_take_shared_starts_in_turn(task: Task, tmp_path: Path) -> None:
    shared = dataclasses.replace(task, settings=dataclasses.replace(SHORT, starts=2))
    first, second, third = (started(shared, seed, tmp_path).state_dict() for seed in range(3))
    assert len(list(tmp_path.iterdir())) == 2
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_rate_rises_and_falls() -> None:
    assert list(map(Settings(steps=4).rate, range(4))) == [1, 0.75, 0.5, 0.25]
    assert list(map(Settings(steps=8, lr_warmup=2).rate, range(4))) == [1 / 3, 2 / 3, 0.75, 0.625]


def test_a_strangers_losses_of_a_task(task: Task) -> None:
    found = stranger.measure("copy", task, 4)
    assert found["samples"] == 4
    assert 0.5 <= found["kept"] < 0.6
    assert 0 <= found["grounded_kept"] <= 1
    assert found["loss_of_grounded"] > 0 < found["loss_of_others"]


def test_masking_computes_every_position(task: Task, tmp_path: Path) -> None:
    ends = {}
    for arm in ("paper", "masking"):
        run = Run(task, arm, 0, starts=tmp_path)
        ends[arm] = run.record()["curve"][-1]
    valid = sum(int(b["attention_mask"].sum()) for b, _ in zip(_batches(task), range(3), strict=False))
    assert ends["masking"]["positions"] == valid > ends["paper"]["positions"]
    assert ends["masking"]["answer_tokens"] == ends["paper"]["answer_tokens"]


def _batches(task: Task) -> Any:
    return endless(task.train.batches(task.settings.batch_size, seed=1))


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in the files of Fashion-MNIST, as many as there are in the package of Debian that brings them."""
    random = np.random.default_rng(0)
    for part, number in (("train", 60_000), ("t10k", 10_000)):
        labels = random.permutation(np.arange(number, dtype=np.int64) % 10).astype(np.uint8)
        images = random.integers(256, size=(number, 28, 28), dtype=np.uint8)
        for kind, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + values.tobytes(), compresslevel=0)
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    monkeypatch.setattr(photos, "FOLDER", tmp_path)


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("make", [captions.task, photos.task, clips.task])
def test_grounded_words_need_the_image(make: Callable[..., Task]) -> None:
    """Marked words are the labels they should be, and a sample's text without them is one of few."""
    task = make(limit=40)
    batch = next(iter(task.train.batches(40)))
    tokenizer = task.train.processor.tokenizer
    assert not (batch["grounded"] & (batch["labels"] == -100)).any()
    for row, marked, sample in zip(batch["input_ids"], batch["grounded"], task.train.samples, strict=True):
        answer = sample.record["messages"][1]["content"][0]["text"].split()
        expected = [word for word, is_grounded in zip(answer, sample.grounded, strict=True) if is_grounded]
        assert tokenizer.convert_ids_to_tokens(row[marked].tolist()) == expected
    facts = {tuple(f) for f in batch["facts"].tolist()}
    assert len(facts) > 5
    if make is photos.task:
        visual = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum(1)
        assert (visual >= 256).all()
        assert (visual >= 8 * (batch["labels"] != -100).sum(1)).all()


def test_controls_take_the_own_input_away(task: Task) -> None:
    batch = next(iter(task.validation.batches(4)))
    blank, shuffled = with_blank(task.pixels)(batch), with_shuffled(task.pixels)(batch)
    assert all(torch.equal(image, blank[task.pixels][0]) for image in blank[task.pixels])
    assert torch.equal(shuffled[task.pixels][1], batch[task.pixels][0])
    assert set(arguments(batch)) == set(batch) - {"grounded", "facts"}


def test_texts_of_a_share_are_anothers(task: Task) -> None:
    mixed = task.train.mixed_up(0.5, seed=3)
    pairs = list(zip(task.train.samples, mixed.samples, strict=True))
    assert sum(own.record["messages"] is not other.record["messages"] for own, other in pairs) == 4
    assert all(own.record["images"] is other.record["images"] and own.facts == other.facts for own, other in pairs)
    words = [(sample.grounded, str(sample.record["messages"])) for sample in mixed.samples]
    assert sorted(words) == sorted((own.grounded, str(own.record["messages"])) for own, _ in pairs)
    assert task.train.mixed_up(0, seed=3) is task.train


def test_reweighted_gives_grounded_words_their_share() -> None:
    logits = torch.randn(2, 6, 5, dtype=torch.float64).float()
    labels = torch.randint(5, (2, 6))
    labels[:, :2] = -100
    grounded = torch.zeros(2, 6, dtype=torch.bool)
    grounded[:, 3] = True
    losses = -torch.log_softmax(logits.double(), -1)[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    weights = torch.where(grounded[:, 1:], 0.4 / 2, 0.6 / 6) * (labels[:, 1:] != -100)
    assert reweighted(logits, labels, grounded, 0.4).item() == pytest.approx(float((weights * losses).sum()), rel=1e-6)


def test_calibration_by_quarter() -> None:
    assert calibration([(0, 4, 2, 1), (1, 4, 2, 1), (7, 4, 2, 2)], 8) == [
        {"quarter": 0, "precision": 0.25, "recall": 0.5},
        {"quarter": 3, "precision": 0.5, "recall": 1.0},
    ]


def test_arms_are_timed_in_turns(task: Task, tmp_path: Path) -> None:
    found = seconds.measure(task, ["dense", "exact", "regate"], starts=tmp_path, turns=1)
    assert found["dense"] == {"full": 1.0, "sparse": 1.0, "teacher": 0.0}
    assert found["exact"]["teacher"] == 0 < found["regate"]["teacher"]
    assert min(found[arm][kind] for arm in found for kind in ("full", "sparse")) > 0


@pytest.mark.parametrize("name", [name for name, arm in arms.ARMS.items() if arm.config is not None])
def test_arms_are_valid_settings(name: str) -> None:
    config = arms.ARMS[name].settings(Settings(), seed=3)
    assert (config.seed, config.total_steps) == (3, Settings().steps)
    sparse = [not config.is_full(step) for step in range(Settings().steps)]
    assert any(sparse) or name == "exact", "an arm that is never sparse would be dense by another name"


@pytest.mark.slow
@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_gives_a_record(name: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = arms.ARMS[name]
    counts = {"warmup", "full_steps", "final_full_steps"}  # of runs longer than this one
    config = arm.config and {k: min(v, 1) if k in counts else v for k, v in arm.config.items()}
    monkeypatch.setitem(arms.ARMS, name, dataclasses.replace(arm, config=config))
    record = Run(task, name, 0, starts=tmp_path).record()
    ends = record["curve"][-1]
    assert ends["step"] == SHORT.steps
    assert 0 < ends["answer_tokens"] <= ends["positions"]
    assert 0 <= record["final"]["test"]["grounded"] <= 1


def test_arms_without_a_score_have_no_teacher() -> None:
    gated = {name: arm.settings(Settings(), 0) for name, arm in arms.ARMS.items() if arm.config is not None}
    assert [name for name, config in gated.items() if not config.uses_references] == [
        "exact", "random", "untaught", "student", "few-random", "wrong-random", "cycled-random", "paper-random",
        "paper-student",
    ]  # fmt: skip
