"""Settings as commands take them: from flags, the environment and YAML files.

They are the fields of `regate.Config`, but for the function `score`, and the options of `regate.apply`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from regate.api import apply
from regate.config import Config
from regate.errors import ConfigError

_FIELDS = {field.name: field.default for field in fields(Config) if field.name != "score"}  # a function: not for YAML
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(apply).parameters.items()
    if name not in ("model", "config", "adapter", "others")
}
FIELDS = tuple(_FIELDS)
NAMES = (*_FIELDS, *_OPTIONS)
_TYPES = get_type_hints(Config) | get_type_hints(apply)


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
            raise ConfigError(f"no such setting: {', '.join(unknown)}; there are {', '.join(NAMES)}")
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
    if value in (None, "none", "None") and NoneType in get_args(hint):
        return None
    for arm in get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,):
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
    names = {variable(name): name for name in NAMES}
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


def variable(name: str) -> str:
    """Of the environment: `REGATE_KEEP` for `keep`."""
    return f"REGATE_{name.upper()}"


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


_SENTENCES = dict.fromkeys(NAMES, "") | _sentences(Config) | _sentences(apply)  # -OO leaves none


def _metavar(name: str) -> str | None:
    """The words that may stand there, if it takes some."""
    hints = (_TYPES[name], *get_args(_TYPES[name]))
    words = [word for hint in hints if get_origin(hint) is Literal for word in get_args(hint)]
    words += ["PATH"] if words and str in hints else []
    return f"{{{','.join(words)}}}" if words else None


def _value(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no value that YAML reads") from error


def add_options(parser: argparse.ArgumentParser, names: Iterable[str] = NAMES) -> None:
    """A flag for each of these settings; what is not given is None."""
    for name in names:
        parser.add_argument(flag(name), type=_value, metavar=_metavar(name), help=told(name))


def given(args: argparse.Namespace, names: Iterable[str] = NAMES) -> dict[str, object]:
    """Those that were given, by name."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options, command): what stands before and behind the first `--`."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])
