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
import difflib
import functools
import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from torch import nn
from transformers import Trainer

from model_adapters.conventional import unwrap
from regate.api import apply, gate_of
from regate.config import Config
from regate.errors import ConfigError, NoTrainerError, RegateError
from regate.gate import Gate
from regate.trainer import GateCallback

FOLDER = "REGATE_RUN"  # where processes leave a file once they train
_PYTHON = ("python", "python3")
_FIELDS = {field.name: field.default for field in fields(Config) if field.name != "score"}  # a function: not for YAML
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(apply).parameters.items()
    if name not in ("model", "config", "adapter", "others")
}
_TYPES = get_type_hints(Config) | get_type_hints(apply)


# -- settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What `apply` is called with."""

    config: Config
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, object]) -> Settings:
        """From values as YAML reads them, by name; what is not given has its default.

        Raises:
            ConfigError: a name that is no setting, a value of another type or out of its range.
        """
        if unknown := sorted(given.keys() - _FIELDS.keys() - _OPTIONS.keys()):
            raise ConfigError(f"no such setting: {', '.join(unknown)}; there are {', '.join([*_FIELDS, *_OPTIONS])}")
        typed = {name: _typed(name, value) for name, value in given.items()}
        config = Config(**{name: value for name, value in typed.items() if name in _FIELDS})
        return cls(config, {name: value for name, value in typed.items() if name in _OPTIONS})

    def __str__(self) -> str:
        config = self.config
        told = {"keep", "warmup", "cycle", "full_steps", "schedule"}
        others = {name: getattr(config, name) for name in _FIELDS if name not in told}
        others = {name: value for name, value in others.items() if value != _FIELDS[name]} | self.options
        schedule = f"warm-up {config.warmup}, cycles of {config.cycle} steps with {config.full_steps} full"
        if config.schedule == "interleaved":
            schedule = f"warm-up {config.warmup}, then {config.full_steps} of {config.cycle} samples full in each step"
        return ", ".join([f"keep {config.keep}", schedule, *(f"{name} {value}" for name, value in others.items())])


def _typed(name: str, value: object) -> Any:
    hint = _TYPES[name]
    if get_origin(hint) is tuple and isinstance(value, str | list | tuple):  # names, in a list or with commas between
        names = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in names)
    for arm in get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,):
        if arm is NoneType and value in (None, "none", "None"):
            return None
        if get_origin(arm) is Literal and value in get_args(arm):
            return value
        if arm is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):  # YAML reads 1e-3 as text
                return float(value)
        if arm in (int, bool, str) and type(value) is arm:
            return value
    raise ConfigError(f"{name} must be {_plain(hint)}, got {value!r}")


def _plain(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def in_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """Settings among the environment's variables: `REGATE_KEEP` for `keep`."""
    names = {_variable(name): name for name in (*_FIELDS, *_OPTIONS)}
    return {names[key]: yaml.safe_load(text) for key, text in environment.items() if key in names}


def in_file(path: Path) -> dict[str, object]:
    """Settings of a YAML file, a mapping of names to values."""
    try:
        read = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"--config {path} must hold `name: value` lines, such as `keep: 0.5`; got {read!r}")
    return read


def _variable(name: str) -> str:
    return f"REGATE_{name.upper()}"


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
    os.environ.update({_variable(name): json.dumps(value) for name, value in settings.items()})
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


class Parser(argparse.ArgumentParser):
    """Where an option is unknown, it names the nearest one; so do those that it makes for commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            option = word.partition("=")[0]
            if near := difflib.get_close_matches(option, [x for x in self._option_string_actions if x[:2] == "--"], 1):
                self.error(f"there is no option {option}; the nearest is {near[0]}")
        return found, unknown


def flag(name: str) -> str:
    """`--full-steps` for `full_steps`."""
    return f"--{name.replace('_', '-')}"


def told(name: str) -> str:
    """What a setting means, for argparse: the first sentence that its docstring has on it, and its default."""
    default = (_FIELDS | _OPTIONS)[name]
    return f"{_SENTENCES[name]} (default: {default})".replace("%", "%%")


def _sentences(documented: Any) -> dict[str, str]:
    """By name, the first sentence on each attribute or argument in a docstring."""
    found: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}([a-z_, ]+): (.+(?:\n {8}.+)*)", inspect.getdoc(documented) or "", re.M):
        sentence = re.split(r"\.(?:\s|$)", " ".join(text.split()))[0]
        found |= dict.fromkeys(names.split(", "), sentence)
    return found


_SENTENCES = dict.fromkeys([*_FIELDS, *_OPTIONS], "") | _sentences(Config) | _sentences(apply)  # -OO leaves none


def _metavar(name: str) -> str | None:
    """The words that may stand there, if it takes some."""
    hints = (_TYPES[name], *get_args(_TYPES[name]))
    words = [word for hint in hints if get_origin(hint) is Literal for word in get_args(hint)]
    return f"{{{','.join(words)}}}" if words else None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="a YAML file of settings")
    for name in (*_FIELDS, *_OPTIONS):
        parser.add_argument(flag(name), type=yaml.safe_load, metavar=_metavar(name), help=told(name))
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="-- SCRIPT ...", help="what to run")


def from_options(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Run `command`, or the words that the options left over; 2 where nothing was gated."""
    command = command or args.script
    flags = {name: value for name in (*_FIELDS, *_OPTIONS) if (value := getattr(args, name)) is not None}
    try:
        settings = (in_file(args.config) if args.config else {}) | in_environment(os.environ) | flags
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


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options, command): what stands before and behind the first `--`."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    options, command = split(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="regate run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    return from_options(parser.parse_args(options), command)


if __name__ == "__main__":
    sys.exit(main())
