"""Errors of the method. Each says what was wrong, where, and what to do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from model_adapters import AdapterError
from regate_patch.errors import RegateError


class ConfigError(RegateError, ValueError):
    """A setting is out of its range."""


class UnknownArchitectureError(RegateError):
    """No adapter serves the model, or the adapter cannot read its batch."""


@contextlib.contextmanager
def served(what: str = "") -> Iterator[None]:
    """Inside, what adapters say of a model that they do not know is an `UnknownArchitectureError`."""
    try:
        yield
    except AdapterError as error:
        raise UnknownArchitectureError(f"{what}{error}") from error


class LabelsError(RegateError, ValueError):
    """Labels do not fit the decoder's positions or the vocabulary."""


class LogitsError(RegateError):
    """Logits were read that a gated training forward did not make; or the model's do not fit its labels."""


class HiddenStatesError(RegateError):
    """Hidden states were read that a gated training forward did not make."""


class PackedRowsError(RegateError, ValueError):
    """Where samples begin within rows is told in a way that does not fit the batch, or cannot be told the decoder."""


class NonFiniteLossError(RegateError):
    """The teacher's loss is NaN or infinite."""


class GateNotAppliedError(RegateError):
    """The model has no gate, or the gate lacks what the call needs."""


class NotGatedError(RegateError):
    """The model's parameters were stepped on a sparse step that no gated forward had prepared."""


class NoTrainerError(RegateError):
    """A command of `regate run` trained with no Hugging Face Trainer."""


class CheckpointError(RegateError):
    """A checkpoint lacks the gate's state, or it cannot be read."""


class UnsupportedShardingError(RegateError):
    """The model is split over ranks in a way that the gate cannot see through."""


class RankError(RegateError):
    """Ranks could not tell each other what they learnt."""


class StoreError(RegateError):
    """The store cannot be opened, or lacks what was asked of it."""


class StoreInUseError(StoreError):
    """A run of another process learns into the store at the moment."""


class StoreMismatchError(StoreError):
    """The stored reference losses were made by another teacher, tokenizer or padding rule."""


class StoreCorruptError(StoreError):
    """The files at the store's path are damaged or are not a store."""


class StoreFullError(StoreError):
    """The disk is full. What was stored before stays readable."""


__all__ = [
    "CheckpointError",
    "ConfigError",
    "GateNotAppliedError",
    "HiddenStatesError",
    "LabelsError",
    "LogitsError",
    "NoTrainerError",
    "NonFiniteLossError",
    "NotGatedError",
    "PackedRowsError",
    "RankError",
    "RegateError",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
    "StoreInUseError",
    "StoreMismatchError",
    "UnknownArchitectureError",
    "UnsupportedShardingError",
]
