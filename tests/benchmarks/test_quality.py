"""The experiments on quality: they run, resume, count what they spend; their statistics find known answers."""

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
from benchmarks.quality import analysis, arms, defaults, findings, occlusion, page, results, seconds, stranger, summary
from benchmarks.quality.context import losses_of_kept
from benchmarks.quality.elision import Gradients, at_random, everything_computed, visual_by, worthiest
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


def _ran(arm: str, *, steps: int = 1, loss: float = 2.0, seed: int = 0) -> dict[str, Any]:
    look = {"step": 0, "loss": loss, "grounded": 0.0}
    made = {"command": "", "commit": "0123456789abcdef", "device": {"cpu": "of the test", "load_average": 1}}
    return {
        "task": "t", "arm": arm, "seed": seed, "settings": {"steps": steps}, "source": "", "curve": [look],
        "final": {}, "calibration": [], "report": {}, "made": made,
    }  # fmt: skip


def _gather(folder: Path, *records: dict[str, Any]) -> set[tuple[str, str, int]]:
    """Of what lies in a new folder of runs, beside what was gathered before."""
    runs = folder / f"runs{len(list(folder.iterdir()))}"
    runs.mkdir()
    for record in records:
        (runs / f"{record['arm']}-{record['seed']}.json").write_text(json.dumps(record))
    results.gather(runs, folder / "results")
    return results.ran(folder / "results")


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
    stay = worthiest(looked(visual), visual, 0.5)
    for row, own, staying in zip(looked.norms, visual, stay, strict=True):
        n = int(own.sum())
        assert staying.sum() == -(-n // 2)
        assert not (staying & ~own).any()
        assert row[staying].min() >= row[own & ~staying].max()


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


def test_runs_are_added_to_those_before(tmp_path: Path) -> None:
    _gather(tmp_path, _ran("dense"), _ran("regate"))
    found = _gather(tmp_path, _ran("dense", seed=1), _ran("regate", loss=2.0001))
    assert found == {("t", "dense", 0), ("t", "regate", 0), ("t", "dense", 1)}
    runs = results.load(tmp_path / "results")["t"]["runs"]
    assert [(run["arm"], run["seed"], run["curve"][0]["loss"]) for run in runs] == [
        ("dense", 0, 2.0), ("regate", 0, 2.0001), ("dense", 1, 2.0),
    ]  # fmt: skip
    assert all(run["made"] == {"commit": "012345678", "cpu": "of the test"} for run in runs)


def test_runs_of_different_settings_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(results.MixedRunsError, match="regate, seed 0"):
        _gather(tmp_path, _ran("dense"), _ran("regate", steps=2))
    _gather(tmp_path, _ran("dense"))
    with pytest.raises(results.MixedRunsError, match="other settings than"):
        _gather(tmp_path, _ran("regate", steps=2))


def test_runs_from_other_weights_are_not_mixed(tmp_path: Path) -> None:
    _gather(tmp_path, _ran("dense"))
    with pytest.raises(results.MixedRunsError, match="same weights"):
        _gather(tmp_path, _ran("regate", loss=2.1))


@pytest.mark.slow
def test_settings_that_came_later_have_their_defaults(tmp_path: Path) -> None:
    _gather(tmp_path, _ran("dense") | {"settings": {"steps": 1, "link_steps": 0}})
    assert _gather(tmp_path, _ran("regate")) == {("t", "dense", 0), ("t", "regate", 0)}


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


def _record(arm: str, seed: int, accuracy: list[float], cost: float = 10.0, *, answers: float = 1.0) -> dict[str, Any]:
    """`answers`: the share of its positions that are answer tokens."""
    curve = [
        {"step": i, "grounded": a, "answer_tokens": cost * i, "positions": cost * i / answers, "seconds": cost * i,
         "teacher_seconds": 1.0}
        for i, a in enumerate(accuracy)
    ]  # fmt: skip
    test = {"grounded": accuracy[-1], "other": 0.9}
    return {"arm": arm, "seed": seed, "curve": curve, "final": {"test": test, "free_running": 0.5}}


def test_differences_are_paired_by_seed() -> None:
    shared = {0: 0.5, 1: 0.7, 2: 0.9}  # seeds differ far more than arms
    runs = [_record("dense", seed, [0.0, a]) for seed, a in shared.items()]
    runs += [_record("regate", seed, [0.0, a + 0.01 * (seed + 1)]) for seed, a in shared.items()]
    runs.append(_record("regate", 9, [0.0, 0.0]))  # no partner
    found = analysis.paired(runs, "regate", analysis.final("grounded", "test"))
    assert found is not None
    assert list(found.by_seed) == [0, 1, 2]
    assert found.mean == pytest.approx(0.02)
    assert 0.0099 < found.low < 0.02 < found.high < 0.0301
    assert analysis.paired(runs, "random", analysis.final("grounded", "test")) is None


def test_arms_are_timed_in_turns(task: Task, tmp_path: Path) -> None:
    found = seconds.measure(task, ["dense", "exact", "regate"], starts=tmp_path, turns=1)
    assert found["dense"] == {"full": 1.0, "sparse": 1.0, "teacher": 0.0}
    assert found["exact"]["teacher"] == 0 < found["regate"]["teacher"]
    assert min(found[arm][kind] for arm in found for kind in ("full", "sparse")) > 0


def test_runs_cost_what_their_steps_do_in_turns(tmp_path: Path) -> None:
    timed = {"dense": seconds.Cost(1.0, 1.0, 0.0), "cycled": seconds.Cost(1.1, 0.5, 3.0)}
    path = tmp_path / "seconds.json"
    path.write_text(json.dumps({"tasks": {"t": {arm: dataclasses.asdict(cost) for arm, cost in timed.items()}}}))
    settings = {"steps": 8, "schedule": {"warmup": 2, "cycle": 4, "full_steps": 1}}
    runs = [{"arm": arm, "curve": [{"step": step} for step in (0, 2, 8)]} for arm in timed]
    found = seconds.by_turns("t", {"settings": settings, "runs": runs}, path)["runs"]
    assert [look["seconds"] for look in found[0]["curve"]] == [0, 2, 8]
    full = [0, 1, 2, 6]  # warm-up, and one in four
    assert [look["seconds"] for look in found[1]["curve"]] == pytest.approx([0, 2.2, 1.1 * len(full) + 0.5 * 4])
    assert [look["teacher_seconds"] for look in found[1]["curve"]] == [3.0] * 3
    with pytest.raises(KeyError, match="not timed: regate"):
        seconds.by_turns("t", {"settings": settings, "runs": [{"arm": "regate", "curve": []}]}, path)


def test_defaults_are_those_of_the_library() -> None:
    for choice in defaults.CHOICES:
        for other in choice.others:
            own, changed = arms.ARMS["regate"].config or {}, arms.ARMS[other].config or {}
            differing = {name for name in {*own, *changed} if own.get(name) != changed.get(name)}
            assert {*choice.settings} & differing, f"{other} does not change {choice.settings}"


def test_interval_is_that_of_the_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    low, high = analysis.interval(values)
    centre, error = float(torch.tensor(values).mean()), float(torch.tensor(values).std()) / 20
    assert low == pytest.approx(centre - 1.96 * error, abs=0.01)
    assert high == pytest.approx(centre + 1.96 * error, abs=0.01)


def test_the_deepest_fall_on_the_way() -> None:
    looks = [{"other": x} for x in (0.5, 0.9, 0.7, 0.95, 0.94)]
    assert analysis.fall({"curve": looks}) == pytest.approx(0.2)


def test_cost_to_reach_and_area() -> None:
    dense, regate = _record("dense", 0, [0.0, 0.4, 0.8]), _record("regate", 0, [0.0, 0.8, 0.9], cost=5.0)
    assert analysis.cost_to_reach(regate, 0.8, "answer_tokens") == pytest.approx(5.0)
    assert analysis.cost_to_reach(dense, 0.6, "answer_tokens") == pytest.approx(15.0)
    assert analysis.cost_to_reach(dense, 0.81, "answer_tokens") is None
    assert analysis.reached([dense, regate], "regate", "answer_tokens").shares == {0: pytest.approx(0.25)}
    assert analysis.reached([dense, regate], "regate", "all_seconds").shares == {0: pytest.approx(6 / 21)}
    there = [_record(arm, 1, [0.8, 0.8]) for arm in ("dense", "regate")]  # says nothing of what it costs to get there
    assert analysis.reached([dense, regate, *there], "regate", "answer_tokens").seeds == 1
    areas = analysis.areas([dense, regate], "dense", "answer_tokens")
    assert areas == {0: pytest.approx(0.2)}  # up to 10, regate's all
    assert analysis.ahead([dense, regate, there[0]], "regate", "answer_tokens") == {0: True}
    assert analysis.ahead([dense, regate], "dense", "answer_tokens", base="regate") == {0: False}


def test_targets_are_held_to_what_runs_show() -> None:
    runs = [_record("dense", seed, [0.0, 0.4, 0.8], answers=0.5) for seed in range(10)]
    runs += [_record("regate", seed, [0.0, 0.79, 0.82], cost=5.0, answers=0.5) for seed in range(10)]
    runs += [_record("random", seed, [0.0, 0.4, 0.9], cost=5.0, answers=0.5) for seed in range(10)]
    rows = {
        told.strip(): cell.strip()
        for line in summary.targets({"captions": {"runs": runs}}, "test").splitlines()[4:]
        for told, cell in [line.strip("|").split("|")]
    }
    told = {target: cell.rpartition(": ")[2] for target, cell in rows.items()}
    assert set(told.values()) == {"met", "missed"}
    assert told["`regate` is ahead of `random`"] == "missed"
    assert told["98% of dense's accuracy by half of its answer tokens"] == "met"
    plateau = "dense is on its plateau: it learnt at most 2% of what it knows in its last quarter"
    assert rows[plateau] == "0 of 10 seeds: missed"
    assert len(rows) == 7, "targets of arms that were not run are not told"
    short = summary.headline({"captions": {"runs": runs}}, "test").splitlines()
    assert len(short) == 3
    assert short[2] == (
        "| drawings with captions | 50% | 50% | +2.0 [+2.0, +2.0], 10 seeds | +10.0 [+10.0, +10.0], 10 seeds | "
        "25%, 10 of 10 got there |"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.02] * 10, "better than dense"),
        ([-0.02] * 10, "worse than dense"),
        ([-0.004] * 10, "worse than dense, by no more than a point"),
        ([-0.005, 0.006] * 5, "not worse than dense by more than a point"),
        ([-0.05, 0.05] * 5, "not told apart from dense"),
        ([0.02] * 4, "so far better than dense"),
        ([0.02] * 2, "too few seeds to compare with dense"),
    ],
)
def test_verdicts(values: list[float], expected: str) -> None:
    found = analysis.Difference(dict(enumerate(values)), *analysis.interval(values))
    assert findings.verdict(found) == expected


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
        "exact", "random", "student", "few-random", "cycled-random", "paper-random",
        "paper-student",
    ]  # fmt: skip
