"""`regate run`: settings, the moment of gating, and the script as Python itself would run it."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import regate
from regate import cli, run
from regate.errors import ConfigError
from regate.options import _SENTENCES
from regate.options import told as meaning
from tests.zoo import CORE

STARTUP = Path(run.__file__).with_name("startup")
MODEL = CORE["llava"]
SCRIPT = """
from tests.regate import test_run
test_run.{call}
"""


def rows() -> list[dict[str, torch.Tensor]]:
    return [{k: v[0] for k, v in MODEL.batch("none", rows=1, seed=seed, answer=9).items()} for seed in range(4)]


def make(folder: str, model: Any = None, **options: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = MODEL.build() if model is None and "model_init" not in options else model
    return Trainer(model, args, train_dataset=rows(), **options)


MADE: dict[str, Trainer] = {}  # what scripts leave for the tests: they run in this process


def plain(folder: str) -> None:
    MADE["plain"] = make(folder)
    MADE["plain"].train()


def with_a_gate(folder: str) -> None:
    model = MODEL.build()
    regate.apply(model, regate.Config(keep=0.75), teacher=None)
    make(folder, model).train()


def with_model_init(folder: str) -> None:
    MADE["init"] = make(folder, model_init=lambda: MODEL.build())
    MADE["init"].train()


def without_the_callback(folder: str) -> None:
    trainer = MADE["bare"] = make(folder)
    trainer.remove_callback(regate.GateCallback)
    trainer.train()


def with_llama_factorys_checkpointing(folder: str) -> None:
    """As `get_custom_gradient_checkpointing_func` of LLaMA-Factory 0.9.5 does it."""
    model = MODEL.build()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    inner = layers[0]._gradient_checkpointing_func

    @functools.wraps(inner, assigned=(*functools.WRAPPER_ASSIGNMENTS, "__self__"))
    def only_where_something_is_trained(func: Any, *args: Any, **kwargs: Any) -> Any:
        module = func.func.__self__
        if any(parameter.requires_grad for parameter in module.parameters()):
            return inner(func, *args, **kwargs)
        return func(*args, **kwargs)

    for layer in layers:
        layer._gradient_checkpointing_func = only_where_something_is_trained
    MADE["wrapped"] = make(folder, model)
    MADE["wrapped"].train()


def script(folder: Path, call: str) -> list[str]:
    """`-- PATH` of a script that calls a function of this module."""
    path = folder / "script.py"
    path.write_text(SCRIPT.format(call=f"{call}({str(folder)!r})"))
    return ["--", str(path)]


def gate_of(name: str) -> regate.Gate:
    from regate.api import gate_of

    model = MADE.pop(name).model
    gate = None if model is None else gate_of(model)
    assert gate is not None
    return gate


# -- settings -----------------------------------------------------------------------------------------


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "regate.yaml").write_text("keep: 0.25\nwarmup: 7\ncycle: 9\nfull_steps: 0\n")
    monkeypatch.setenv("REGATE_WARMUP", "1")
    monkeypatch.setenv("REGATE_CYCLE", "5")
    options = ["run", "--config", str(tmp_path / "regate.yaml"), "--cycle", "4", "--teacher", "none"]
    assert cli.main([*options, *script(tmp_path, "plain")]) == 0
    gate = gate_of("plain")
    assert gate.config == regate.Config(keep=0.25, warmup=1, cycle=4, full_steps=0)
    assert gate.report()["steps_sparse"] == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("regate: ")]
    assert said[0] == (
        "regate: gating LlavaForConditionalGeneration in Trainer: keep 0.25, warm-up 1, "
        "then 0 of 4 samples full in each step, teacher None"
    )
    assert said[1].startswith("regate: 1 full and 1 sparse steps, ")
    assert len(said) == 2


def test_every_field_of_the_config_is_a_setting() -> None:
    defaults = asdict(regate.Config())
    del defaults["score"]  # a function
    assert run.Settings.of(defaults).config == regate.Config()
    parser = argparse.ArgumentParser()
    run.add_options(parser)
    flags = vars(parser.parse_args([]))
    assert defaults.keys() | {"teacher", "store", "backend", "on_unsupported"} <= flags.keys()
    assert {value for name, value in flags.items() if name != "script"} == {None}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("keep", "1", 1.0), ("ema_decay", "9e-1", 0.9), ("total_steps", "null", None), ("total_steps", "50", 50),
     ("alignment", "both", "both"), ("disable", "causal, tail", ("causal", "tail")), ("disable", "[tail]", ("tail",))],
)  # fmt: skip
def test_values_have_the_fields_type(name: str, text: str, value: object) -> None:
    got = getattr(run.Settings.of(run.in_environment({f"REGATE_{name.upper()}": text})).config, name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(("text", "value"), [("none", None), ("4bit", "4bit"), ("a/small-one", "a/small-one")])
def test_a_teacher_is_a_word_or_a_path(text: str, value: object) -> None:
    assert run.Settings.of({"teacher": text}).options == {"teacher": value}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": "half"}, "keep must be float, got 'half'"),
        ({"cycle": 1.5}, "cycle must be int, got 1.5"),
        ({"cycle": True}, "cycle must be int, got True"),
        ({"selection": "best"}, "selection must be .*'score'.*got 'best'"),
        ({"on_unsupported": "ignore"}, "on_unsupported must be .*'warn'"),
        ({"keep": 0.0}, r"Config.keep must be in \(0, 1\]"),
        ({"kept": 0.5}, "no such setting: kept; there are cycle, full_steps, keep"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.Settings.of(given)


def test_wrong_commands_and_files_end_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("- keep")
    for options, message in [
        (["--keep", "2", "--", "x.py"], "Config.keep must be in (0, 1], got 2.0"),
        (["--keep", "0.5"], "name the script after `--`"),
        (["--", str(tmp_path / "none.py")], "there is no "),
        (["--", "no-such-command"], "there is no no-such-command"),
        (["--config", str(tmp_path / "none.yaml"), "--", "x.py"], "cannot be read"),
        (["--config", str(tmp_path / "list.yaml"), "--", "x.py"], "must hold `name: value` lines"),
    ]:
        assert run.main(options) == 2
        assert message in capsys.readouterr().err


def test_options_say_what_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    """With the first sentence of the docstrings, whichever command they are of."""
    for command in ("run", "estimate"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert "share of the labels kept on the other, sparse steps; 0 < keep <= 1 (default: 0.5)" in told
        assert "--schedule {cycled,interleaved}" in told
    assert all(_SENTENCES.values())
    assert meaning("store").startswith("where reference losses and difficulties are kept: ")


@pytest.mark.parametrize("words", [["--kepe", "0.5"], ["--kepe=0.5"], ["--warmup", "3", "--kepe", "1"]])
def test_the_nearest_option_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    estimating = ["estimate", "--model", "x", "--tokens", "1/2/3"]
    for call, options in ((run.main, []), (cli.main, ["run"]), (cli.main, estimating)):
        with pytest.raises(SystemExit, match="2"):
            call([*options, *words, "--", "train.py", "--kep"])
        assert "there is no option --kepe; the nearest is --keep\n" in capsys.readouterr().err


# -- trainers -----------------------------------------------------------------------------------------


def test_a_gate_of_the_scripts_own_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--warmup", "0", *script(tmp_path, "with_a_gate")]) == 0
    assert "LlavaForConditionalGeneration in Trainer has a gate already, which stays: keep 0.75" in (
        capsys.readouterr().err
    )


def test_a_model_made_when_training_starts_is_gated(tmp_path: Path) -> None:
    assert run.main(["--warmup", "0", "--full-steps", "0", *script(tmp_path, "with_model_init")]) == 0
    assert gate_of("init").report()["steps_sparse"] == 2


def test_a_trainer_without_the_callback_gets_it(tmp_path: Path) -> None:
    assert run.main(["--warmup", "0", "--full-steps", "0", *script(tmp_path, "without_the_callback")]) == 0
    assert sum(isinstance(c, regate.GateCallback) for c in MADE["bare"].callback_handler.callbacks) == 1
    assert gate_of("bare").report()["steps_sparse"] == 2


def test_llama_factorys_checkpointing_can_be_captured(tmp_path: Path) -> None:
    call = script(tmp_path, "with_llama_factorys_checkpointing")
    assert run.main(["--warmup", "0", "--full-steps", "0", *call]) == 0
    assert gate_of("wrapped").report()["steps_sparse"] == 2


def test_nothing_stays_behind(tmp_path: Path) -> None:
    before, argv, path = dict(os.environ), sys.argv, list(sys.path)
    assert run.main(script(tmp_path, "plain")) == 0
    gate_of("plain")
    assert (dict(os.environ), sys.argv, sys.path) == (before, argv, path)
    plain(str(tmp_path))
    with pytest.raises(AssertionError):
        gate_of("plain")


def test_no_trainer_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text("print('no trainer here')")
    assert run.main(["--", "python", str(tmp_path / "script.py")]) == 2
    assert "NoTrainerError: python " in capsys.readouterr().err
    assert run.main(["--", "true"]) == 2


# -- a script as Python runs it ------------------------------------------------------------------------

_TELL = """
import json, sys
spec = __spec__ and __spec__.name
main = sys.modules["__main__"].__dict__ is globals()
print(json.dumps([sys.argv, sys.path[0], __name__, __file__, spec, main]))
"""


@pytest.mark.parametrize(
    "words", [["folder/tell.py", "a", "--", "--keep", "b"], ["-m", "folder.tell", "--epochs", "1"]]
)
def test_a_script_finds_itself_as_under_python(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tell.py").write_text(_TELL)
    monkeypatch.chdir(tmp_path)
    expected = json.loads(subprocess.check_output([sys.executable, *words], text=True))
    expected[0][0] = os.path.abspath(expected[0][0])  # runpy's difference
    assert run.main(["--keep", "0.5", "--", "python3", *words]) == 2  # no trainer
    assert json.loads(capsys.readouterr().out) == expected


def test_exit_codes_and_exceptions_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit, match="3"):
        run.main(["--", str(path)])
    path.write_text("raise KeyError('mine')")
    with pytest.raises(KeyError, match="mine"):
        run.main(["--", str(path)])
    assert run.main(["--", "python", "-X", "utf8", "-c", "raise SystemExit(4)"]) == 4


# -- processes below ----------------------------------------------------------------------------------


def python(*words: str, path: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    names = {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    return subprocess.run([sys.executable, *words], env=os.environ | names, capture_output=True, text=True)


def test_the_package_is_the_command() -> None:
    done = python("-m", "regate", "--help", path=[])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: regate ")


def test_processes_below_import_nothing_and_run_the_environments_own_start(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the own one ran')")
    tell = "import sys; print('torch' in sys.modules, any(type(f).__name__ == '_Await' for f in sys.meta_path))"
    for environment, waits in (({"REGATE_RUN": str(tmp_path)}, "True"), ({}, "False")):
        done = python("-c", tell, path=[STARTUP, tmp_path], **environment)
        assert done.stdout.split("\n")[:2] == ["the own one ran", f"False {waits}"], done.stderr


def test_another_python_without_regate_says_so(tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "trainer.py").touch()
    ask = "import sitecustomize, transformers.trainer"
    done = python("-S", "-c", ask, path=[STARTUP, tmp_path], REGATE_RUN=str(tmp_path))
    assert done.returncode == 1
    assert f"`regate run` started {sys.executable}, which cannot import " in done.stderr
