"""`regate run`: gate a training script that never heard of ReGATE.

    regate run --keep 0.5 -- train.py --epochs 1                          a script or `-m module`, after `python` or not
    regate run --config regate.yaml -- llamafactory-cli train sft.yaml    any command that starts Python
    torchrun --nproc-per-node 8 -m regate.run --keep 0.5 -- train.py      in a launcher, on every machine alike

Whichever Hugging Face `Trainer` the script makes (TRL's, LLaMA-Factory's, ms-swift's and axolotl's are made from it):
at the start of `train()` its model is final, PEFT applied, and neither wrapped nor loaded from a checkpoint. There
`regate.apply` is called on it. A model that has a gate already keeps it.

Settings are the fields of `regate.Config` and the options of `regate.apply`. A flag (`--keep 0.5`) wins over the
environment (`REGATE_KEEP=0.5`), which wins over a YAML file (`--config`, `keep: 0.5`). All of them go into the
environment, and with them a folder on PYTHONPATH whose `sitecustomize` Python runs first (`regate/startup`): so
processes that the script starts, and launchers it calls, are gated, too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from model_adapters.conventional import unwrap
from regate import options
from regate.api import apply, gate_of
from regate.errors import ConfigError, NoTrainerError, RegateError
from regate.gate import Gate
from regate.options import Settings, in_environment, in_file
from regate.trainer import GateCallback

FOLDER = "REGATE_RUN"  # where processes leave a file once they train
_PYTHON = ("python", "python3")


# -- a trainer ----------------------------------------------------------------------------------------


def gate_trainers() -> None:
    """From now on, while the environment says so, every `Trainer` gates its model before it trains."""
    if getattr(Trainer.train, "gates", False):
        return
    train, make = Trainer.train, Trainer.call_model_init

    @functools.wraps(train)
    def gated_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if FOLDER not in os.environ:
            return train(trainer, *args, **kwargs)
        if trainer.model_init is None:
            _gate(trainer, trainer.model)
        result = train(trainer, *args, **kwargs)
        if (gate := gate_of(trainer.model)) is not None:
            _say(_summary(gate))
        return result

    @functools.wraps(make)
    def gated_make(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        model = make(trainer, *args, **kwargs)
        if FOLDER in os.environ and getattr(trainer, "is_in_train", False):  # `train` makes its model anew
            _gate(trainer, model)
        return model

    gated_train.gates = True  # type: ignore[attr-defined]
    Trainer.train = gated_train  # type: ignore[assignment, method-assign]
    Trainer.call_model_init = gated_make  # type: ignore[assignment, method-assign]


def _gate(trainer: Trainer, model: Any) -> None:
    if not any(isinstance(callback, GateCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(GateCallback)
    where = f"{type(unwrap(model)).__name__} in {type(trainer).__name__}"
    if (gate := gate_of(model)) is not None:
        _say(f"{where} has a gate already, which stays: {Settings(gate.config)}")
    else:
        settings = Settings.of(in_environment(os.environ))
        _unwrap_checkpointing(model)
        apply(model, settings.config, **settings.options)
        _say(f"gating {where}: {settings}")
    folder = Path(os.environ[FOLDER])
    if folder.is_dir():  # not on a launcher's other machines
        (folder / str(os.getpid())).touch()


def _unwrap_checkpointing(model: nn.Module) -> None:
    """Give layers the checkpoint function inside LLaMA-Factory's, which looks at the bound method that it is given.

    It skips layers that train nothing, which recomputing does not change; Dynamo cannot follow how it finds them.
    """
    for module in model.modules():
        inner = getattr(module, "_gradient_checkpointing_func", None)
        if callable(inner) and hasattr(inner, "__wrapped__"):
            module._gradient_checkpointing_func = inspect.unwrap(inner)


def _summary(gate: Gate) -> str:
    report = gate.report()
    labels = report["labels_kept"] / max(report["labels_seen"], 1)
    positions = report["positions_computed"] / max(report["positions_seen"], 1)
    return (
        f"{report['steps_full']:.0f} full and {report['steps_sparse']:.0f} sparse steps, {labels:.0%} of labels kept, "
        f"{positions:.0%} of positions computed"
    )


def _say(text: str) -> None:
    """One line, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"regate: {text}", file=sys.stderr, flush=True)


# -- a command ----------------------------------------------------------------------------------------


def run(command: Sequence[str], settings: Mapping[str, object]) -> int:
    """Run a command with its trainers gated; its exit code. What a script in this process raises passes through.

    Args:
        command: a script or `-m module` with its arguments, run in this process, or any other command.
        settings: by name; see `Settings`.

    Raises:
        NoTrainerError: the command ended well, but no trainer trained.
    """
    with tempfile.TemporaryDirectory(prefix="regate-run-") as folder, _environment(folder, settings):
        words = command[1:] if command[0] in _PYTHON else command
        if _is_python(words):
            code = _in_process(words)
        else:
            code = subprocess.call([sys.executable, *words] if command[0] in _PYTHON else command)
        if code == 0 and not os.listdir(folder):
            raise NoTrainerError(
                f"{' '.join(command)} ended without training by a Hugging Face Trainer, so nothing was gated. Trainers "
                "are seen in this process and in Python processes that it starts with its environment. A loop of "
                "your own takes one line: gate = regate.apply(model)"
            )
        return code


def _is_python(words: Sequence[str]) -> bool:
    """A script or a module, and no options of the interpreter before it?"""
    return (len(words) > 1 and words[0] == "-m") or (bool(words) and words[0].endswith(".py"))


def check(command: Sequence[str], settings: Mapping[str, object]) -> None:
    """Raises `ConfigError` where `run` could not begin."""
    Settings.of(settings)
    if not command:
        raise ConfigError("name the script after `--`: regate run --keep 0.5 -- train.py --epochs 1")
    words = command[1:] if command[0] in _PYTHON else command
    if _is_python(words):
        found = words[0] == "-m" or Path(words[0]).is_file()
    else:
        found = command[0] in _PYTHON or shutil.which(command[0]) is not None
    if not found:
        raise ConfigError(f"there is no {words[0]}: a script's path ends in .py, a module comes after -m")


@contextlib.contextmanager
def _environment(folder: str, settings: Mapping[str, object]) -> Iterator[None]:
    before = dict(os.environ)
    startup = str(Path(__file__).with_name("startup"))
    os.environ[FOLDER] = folder
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (startup, before.get("PYTHONPATH"))))
    os.environ.update({options.variable(name): json.dumps(value) for name, value in settings.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _in_process(words: Sequence[str]) -> int:
    """A script or module as `__main__`, with arguments and path as Python sets them (but `argv[0]` is absolute)."""
    gate_trainers()
    argv, path = sys.argv, sys.path[:]
    is_module = words[0] == "-m"
    sys.argv = list(words[1:] if is_module else words)
    sys.path[0] = os.getcwd() if is_module else str(Path(words[0]).resolve().parent)
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(os.path.abspath(words[0]), run_name="__main__")
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="a YAML file of settings")
    options.add_options(parser)
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="-- SCRIPT ...", help="what to run")


def from_options(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Run `command`, or the words that the options left over; 2 where nothing was gated."""
    command = command or args.script
    try:
        settings = (in_file(args.config) if args.config else {}) | in_environment(os.environ) | options.given(args)
        check(command, settings)
    except ConfigError as error:
        return _refuse(error)
    try:
        return run(command, settings)
    except NoTrainerError as error:
        return _refuse(error)


def _refuse(error: RegateError) -> int:
    print(f"regate run: {type(error).__name__}: {error}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    words, command = options.split(sys.argv[1:] if argv is None else argv)
    parser = options.Parser(
        prog="regate run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    return from_options(parser.parse_args(words), command)


if __name__ == "__main__":
    sys.exit(main())
