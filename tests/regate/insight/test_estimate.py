"""What gating can gain, from token counts; and the commands."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from transformers import Lfm2Config, LlamaConfig, LlavaConfig, MistralConfig, Qwen2_5_VLConfig

import regate
import regate.insight.estimate as counted
from benchmarks.workloads import WORKLOADS, label
from regate import cli
from regate.errors import ConfigError
from regate.insight.estimate import Sample
from tests.packing import packed, rows_of
from tests.zoo import CORE

SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 4096,
}  # fmt: skip
LLAMA = LlamaConfig(**SIZES)
_FOUND: dict[tuple[str, bool], Any] = {}


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each configuration's decoder, for all tests here: what they are about is arithmetic."""
    inspect = counted.inspect

    def remembered(model: Any, *, visible: bool = False) -> Any:
        of = model.config.to_json_string(), visible
        return _FOUND[of] if of in _FOUND else _FOUND.setdefault(of, inspect(model, visible=visible))

    monkeypatch.setattr(counted, "inspect", remembered)


@pytest.mark.few(2)
@pytest.mark.parametrize("alignment", ["predictor", "both"])
@pytest.mark.parametrize("w", list(WORKLOADS.values())[::3], ids=label)
def test_arithmetic(w: Sample, alignment: Any) -> None:
    """Against FLOPs counted by hand: weights twice per position, half of two attention products, the head; and in the
    last layer output projection and MLP only where the head reads."""
    d, layers = 512, 3
    k = -(-w.answer // 2)
    computed = w.total - w.answer + (k if alignment == "predictor" else ceil(w.answer - (w.answer - k) ** 2 / w.answer))

    def flops(n: int, m: int) -> float:
        unread = 2 * max(n - m, 0) * (d * d + 3 * d * 1536)
        return layers * (2 * n * (4 * d * d + 3 * d * 1536) + 2 * d * n * n) - unread + 2 * m * d * 4096

    found = regate.estimate(LLAMA, [w] * 3, regate.Config(logits="kept", alignment=alignment))
    dense = flops(w.total, w.total)
    assert found.sparse == pytest.approx(dense / flops(computed, k), rel=1e-6)
    assert found.full == pytest.approx(dense / flops(w.total, w.answer), rel=1e-6)
    assert found.teacher == pytest.approx(flops(w.prompt + w.answer, w.answer) / (3 * dense), rel=1e-6)
    assert found.schedule == found.full  # three steps are all warm-up
    everywhere = regate.estimate(LLAMA, [w] * 3, regate.Config(logits="all", alignment=alignment))
    assert everywhere.full == 1
    assert everywhere.sparse == pytest.approx(dense / flops(computed, w.total), rel=1e-6)
    assert found.dense_flops == pytest.approx(3 * 3 * dense, rel=1e-6)


def test_arithmetic_of_what_stays_visible() -> None:
    """Keys and values of all positions, the first layer's once; every query against all keys."""
    d, layers, v, p, a = 512, 3, 576, 60, 300
    n, s, k = v // 4 + p + 225, v + p + a, 150
    products = layers * 2 * n * (4 * d * d + 3 * d * 1536) - 2 * n * 2 * d * d + layers * 2 * s * 2 * d * d
    unread = 2 * (n - k) * (d * d + 3 * d * 1536)
    sparse = products + layers * 4 * n * s * d - unread + 2 * k * d * 4096
    found = regate.estimate(LLAMA, [(v, p, a)], regate.Config(visual_keep=0.25, elided="visible"))
    dense = found.dense_flops / 3
    assert found.sparse == pytest.approx(dense / sparse, rel=1e-6)


def test_verdicts() -> None:
    schedule = {"steps": 10_000}
    assert regate.estimate(LLAMA, [(0, 100, 900)], epochs=3, **schedule).verdict.startswith("worth it")
    deep = LlamaConfig(**SIZES | {"vocab_size": 256, "intermediate_size": 8, "num_hidden_layers": 6})
    poor = regate.estimate(deep, [(1352, 60, 20)], regate.Config(keep=0.9), **schedule)
    assert poor.verdict.startswith("not worth it here")
    assert "answers are 1%" in str(poor)
    whole = regate.Config.paper(warmup=0, cycle=100, full_steps=25)
    mixed = regate.estimate(LLAMA, [(0, 100, 900)], whole, steps=100)
    assert mixed.schedule == pytest.approx(1 / (0.25 / mixed.full + 0.75 / mixed.sparse))
    assert mixed.run < mixed.schedule < mixed.sparse
    assert 0 < mixed.break_even_epochs < 1


def test_the_verdict_names_the_teacher_where_it_is_the_cause() -> None:
    found = regate.estimate(LLAMA, [(0, 100, 900)], steps=10_000)
    assert found.run < 1.05 < found.schedule
    told = f"The teacher costs {found.teacher:.0%} of a dense epoch, once, and is regained after "
    assert found.verdict.endswith(
        f"{told}{found.break_even_epochs:.2f} epochs. A smaller one costs less (--teacher); without one "
        f"(reference_weight=0) the run is {found.schedule:.2f}x, and in exact mode (keep=1) {found.full:.2f}x"
    )
    without = regate.estimate(LLAMA, [(0, 100, 900)], regate.Config(reference_weight=0), steps=10_000)
    assert without.run == pytest.approx(found.schedule)


def test_a_smaller_teacher_costs_its_own_passes() -> None:
    small = LlamaConfig(**SIZES | {"hidden_size": SIZES["hidden_size"] // 2, "intermediate_size": 32})
    own, other = (regate.estimate(LLAMA, [(0, 100, 900)], steps=10_000, teacher=teacher) for teacher in (LLAMA, small))
    assert own == regate.estimate(LLAMA, [(0, 100, 900)], steps=10_000)
    alone = regate.estimate(small, [(0, 100, 900)], steps=10_000)
    assert other.teacher == pytest.approx(alone.teacher * alone.dense_flops / own.dense_flops)
    assert other.run > own.run
    assert other.schedule == own.schedule


def test_exact_mode_is_a_run_of_full_steps() -> None:
    for sample in ((1352, 60, 110), (0, 100, 900)):
        exact = regate.estimate(LLAMA, [sample], regate.Config.exact(), epochs=3)
        assert exact.run == exact.full == regate.estimate(LLAMA, [sample]).full


def test_a_run_that_is_all_warm_up_is_said_to_be_one() -> None:
    """Unless the warm-up is nothing else than what follows."""
    short = regate.estimate(LLAMA, [(1352, 60, 20)], steps=30)
    assert short.verdict.endswith("All 30 steps are full, and nothing is left out: the first sparse one would be step "
                                  "100 (--warmup)")  # fmt: skip
    assert short.run == short.schedule == short.full  # and the teacher is not asked
    assert "All 100 steps are full" in str(regate.estimate(LLAMA, [(0, 100, 900)], steps=100))
    for config, steps in ((None, 101), (regate.Config.exact(), 30)):
        assert "steps are full" not in regate.estimate(LLAMA, [(0, 100, 900)], config, steps=steps).verdict
    ending = regate.Config(total_steps=200, final_full_steps=150)
    assert "--final-full-steps, begin before" in regate.estimate(LLAMA, [(0, 100, 900)], ending, steps=200).verdict
    cycled = regate.estimate(LLAMA, [(0, 100, 900)], regate.Config.paper(), steps=110)
    assert "the first sparse one would be step 116" in cycled.verdict


def test_what_needs_no_teacher_pays_for_none() -> None:
    for config in (regate.Config.exact(), regate.Config(reference_weight=0), regate.Config(selection="random")):
        assert regate.estimate(LLAMA, [(96, 60, 400)], config).teacher == 0
    assert regate.estimate(LLAMA, [(96, 60, 400)]).teacher > 0


@pytest.mark.matrix
def test_interleaved_costs_as_much_and_peaks_lower() -> None:
    settings: dict[str, Any] = {"warmup": 0, "cycle": 128, "full_steps": 16, "alignment": "predictor"}
    sample = (96, 60, 400)
    cycled = regate.estimate(LLAMA, [sample], regate.Config(schedule="cycled", **settings), steps=128, rows=8)
    config = regate.Config(**settings)
    peaks = {rows: regate.estimate(LLAMA, [sample], config, steps=128, rows=rows) for rows in (None, 8, 4, 1)}
    assert all(found.schedule == pytest.approx(cycled.schedule) for found in peaks.values())
    sparse = (96 + 60 + 200) / 556
    assert cycled.peak_activations == peaks[1].peak_activations == 1
    assert peaks[None].peak_activations == peaks[8].peak_activations == pytest.approx(1 / 8 + 7 / 8 * sparse)
    assert peaks[4].peak_activations == pytest.approx(1 / 4 + 3 / 4 * sparse)
    assert "69% in the largest step after warm-up" in str(peaks[8])
    always = regate.Config(final_full_steps=1, total_steps=128, **settings)
    assert regate.estimate(LLAMA, [sample], always, steps=128, rows=8).peak_activations == 1
    never = regate.Config.paper(warmup=0, full_steps=0)
    assert regate.estimate(LLAMA, [sample], never, steps=128).peak_activations == pytest.approx(sparse)
    windows = MistralConfig(**SIZES, sliding_window=64)
    assert regate.estimate(windows, [sample], config, steps=128, rows=8).peak_activations == 1  # full at once


def test_hours() -> None:
    found = regate.estimate(LLAMA, [(576, 60, 300)], epochs=2, copies=1000, flops_per_second=1e12)
    alone = regate.estimate(LLAMA, [(576, 60, 300)], epochs=2, steps=2000)
    assert found.dense_flops == pytest.approx(1000 * alone.dense_flops)
    assert found.run == alone.run > 1
    assert found.hours_dense == pytest.approx(2 * found.dense_flops / 1e12 / 3600)
    assert found.hours == pytest.approx(found.hours_dense / found.run)
    assert alone.hours is None
    assert "hours dense" in str(found)
    assert "hours" not in str(alone)


@pytest.mark.parametrize("samples", [[], [(1, 2, 0)], [(-1, 2, 3)]])
def test_samples_of_no_use(samples: Any) -> None:
    with pytest.raises(ConfigError, match="visual, prompt, answer"):
        regate.estimate(LLAMA, samples)


def test_counts_of_a_data_loader() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    found = regate.count_tokens(model, [batch])
    assert [s.total for s in found] == batch["attention_mask"].sum(1).tolist()
    assert [s.answer for s in found] == (batch["labels"] != -100).sum(1).tolist()
    assert all(s.visual > 0 for s in found)
    assert regate.estimate(model, found).sparse > 1


def test_counts_of_several_samples_in_a_row() -> None:
    model = CORE["llava"].build()
    rows = rows_of("llava", 2, 0)
    apart = regate.count_tokens(model, [rows])
    assert len(apart) == 2
    assert regate.count_tokens(model, [packed(model, rows)]) == apart


TWO_LAYERS = {"num_hidden_layers": 2}
CONFIGS = [LlavaConfig(text_config={"model_type": "llama", **TWO_LAYERS}), Qwen2_5_VLConfig(text_config=TWO_LAYERS)]


@pytest.mark.parametrize("config", CONFIGS, ids=["llava", "qwen2_5_vl"])
def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any) -> None:
    config.save_pretrained(tmp_path)
    assert cli.main(["estimate", "--model", str(tmp_path), "--tokens", "1352/60/110", "0/100/900"]) == 0
    assert "verdict" in capsys.readouterr().out
    thinned = ["--visual-keep", "0.5", "--tflops", "400", "--schedule", "interleaved", "--rows", "8"]
    assert cli.main(["estimate", "--model", str(tmp_path), "--tokens", "1352/60/110", *thinned]) == 0
    assert "hours dense" in capsys.readouterr().out
    counts = tmp_path / "counts.jsonl"
    counts.write_text("[576, 60, 300]\n[0, 10, 30]\n")
    assert cli.main(["estimate", "--model", str(tmp_path), "--counts", str(counts), "--reference-weight", "0"]) == 0
    told = capsys.readouterr().out
    assert "All 1 steps are full" in told
    assert "teacher    0.0% of a dense epoch" in told
    whole = ["--counts", str(counts), "--samples", "64000"]
    assert cli.main(["estimate", "--model", str(tmp_path), *whole]) == 0
    told = capsys.readouterr().out
    assert "steps are full" not in told
    small, others = tmp_path / "small", ["--budget", "sample", "--keep", "1", "--total-steps", "2000"]
    LlamaConfig(**SIZES).save_pretrained(small)
    assert cli.main(["estimate", "--model", str(tmp_path), *whole, "--teacher", str(small)]) == 0
    cost = [float(re.findall(r"teacher +([\d.]+)%", text)[0]) for text in (told, capsys.readouterr().out)]
    assert cost[0] > cost[1]
    assert cli.main(["estimate", "--model", str(tmp_path), *whole, *others]) == 0
    assert "teacher    0.0%" in capsys.readouterr().out
    assert cli.main(["inspect", "--model", str(tmp_path)]) == 0
    assert "2 attention and 2 MLP blocks in 1 graph(s)\n" in capsys.readouterr().out


def test_what_runs_along_the_sequence_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Attention is not among it, though it is called otherwise where rows are laid end to end."""
    config = Lfm2Config(
        **SIZES | {"num_hidden_layers": 2}, num_key_value_heads=8, layer_types=["conv", "full_attention"]
    )
    config.save_pretrained(tmp_path)
    assert cli.main(["inspect", "--model", str(tmp_path)]) == 0
    assert "2 attention and 2 MLP blocks in 1 graph(s), 1 operations that run along" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            '{"model_type": "bert", "num_hidden_layers": 2}',
            "the BertEncoder of BertLMHeadModel is no decoder",
        ),
        (
            '{"model_type": "llama", "hidden_size": "x"}',
            "StrictDataclassFieldValidationError: Validation",
        ),
        ('{"model_type": "llama", "num_attention_heads": 0}', "ZeroDivisionError"),
        ('{"model_type": "llama", "rope_scaling": {"type": "zz"}}', "KeyError: 'zz'"),
        ('{"model_type": "none"}', "ValueError: The checkpoint you are trying to load"),
        ("{}", "ValueError: Unrecognized model in"),
        ("{", "OSError"),
    ],
)
def test_a_config_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, says: str) -> None:
    (tmp_path / "config.json").write_text(config)
    for command in (["inspect"], ["estimate", "--tokens", "1/2/3"]):
        assert cli.main([*command, "--model", str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"regate {command[0]}: ")
        assert says in told
        assert told.count("\n") == 1


def test_commands_explain_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLAMA.save_pretrained(tmp_path)
    assert cli.main(["estimate", "--model", str(tmp_path), "--tokens", "12/3"]) == 2
    assert "visual/prompt/answer" in capsys.readouterr().err
    assert cli.main(["inspect", "--model", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("line", ["[1, 2]", "[1, 2, 3", "{}", "[1, 2, 3.5]", "[1, 2, true]"])
def test_a_line_of_no_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    LLAMA.save_pretrained(tmp_path)
    counts = tmp_path / "counts.jsonl"
    counts.write_text(f"[1, 2, 3]\n\n{line}\n")
    assert cli.main(["estimate", "--model", str(tmp_path), "--counts", str(counts)]) == 2
    told = capsys.readouterr().err
    assert f"{counts}, line 3: each line is one [visual, prompt, answer] of whole numbers" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("option", ["--samples", "--batch-size", "--epochs", "--rows", "--tflops"])
def test_numbers_that_must_be_positive(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["estimate", "--model", "x", "--tokens", "1/2/3", option, "0"])
    assert f"argument {option}: invalid positive " in capsys.readouterr().err
