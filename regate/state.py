"""What a run must know of its gate to go on: taken, put back, written beside its checkpoints and read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from torch import Tensor

from regate.errors import CheckpointError, StoreError, StoreMismatchError
from regate.memory import checkpoint
from regate.memory.files import Table
from regate.memory.store import differences
from regate.parts import Parts
from regate.scoring.guard import Guard
from regate.training.counters import Counters
from regate.training.steps import Steps
from regate.training.supervision import Numbers
from regate_patch import is_sharded

OTHER_TEACHER = (
    "the run that is continued had another teacher: by default it is the language model as it was when the gate was "
    "applied. Apply the gate to the model as it was before training, and load its trained weights after that; or pass "
    "the model of before (teacher=...); or load no state of the gate, and let the schedule go on by gate.step = ..."
)
LACKING = (
    "the run had reference losses of {n} texts, and the store at {path} has {now}; a trained model cannot make them "
    "again. Give regate.apply the store of the run (store=...)"
)
NO_STATE = (
    "{what} is no state of a gate: {why}. Nothing was changed. Give what gate.state_dict() returned, or load another "
    "checkpoint (gate.load)"
)


class RunState:
    """The schedule's position, and all that was learnt. What the methods give, take and raise is said at `Gate`'s."""

    def __init__(self, steps: Steps, parts: Parts) -> None:
        self._steps, self._parts, self._scorer = steps, parts, parts.scorer
        self._loaded_at: int | None = None

    @property
    def just_loaded(self) -> bool:
        """Was it loaded, and has no step been made since?"""
        return self._loaded_at == self._steps.made

    def state_dict(self, *, of_store: bool = True) -> dict[str, Any]:
        """Of now, with what earlier forwards taught; of the store's records only if so asked."""
        scorer, store, turns = self._scorer, self._scorer.store, self._parts.turns
        scorer.flush()
        tables: list[Table] = ["difficulty"]
        if turns.interleaved:
            tables.append("owed")
        if not scorer.lazily and store.temporary:  # these cannot be made again
            tables.append("reference")
        return {
            "step": self._steps.made,
            "counters": asdict(scorer.counters),
            "prior": scorer.prior.state_dict(),
            "guard": scorer.guard.state_dict(),
            "references": 0 if scorer.lazily else store.count("reference"),
            "teacher": dict(scorer.taught_by) if scorer.lazily else {},
            "fills_rows": self._parts.fills_rows,
            "numbers": self._parts.numbers.state_dict(),
            **({"ahead": turns.ahead} if turns.interleaved else {}),
            **{table: checkpoint.pack(store.items(table)) for table in tables if of_store},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was learnt since is forgotten."""
        self._take(state, "what load_state_dict got")

    def _take(self, state: Mapping[str, Any], what: str) -> None:
        """Whatever can be wrong with the state itself is found before anything is changed, and before ranks meet."""
        records = _records(state, what)
        parts, scorer, store = self._parts, self._scorer, self._scorer.store
        if scorer.teacher is not None and is_sharded(scorer.teacher.model):
            scorer.meet_teacher(state["step"])
        had, has = state.get("teacher"), scorer.taught_by
        if scorer.lazily and had and has and differences(had, has):
            raise StoreMismatchError(OTHER_TEACHER)
        scorer.exchange.claim()
        if "reference" in records:
            store.put("reference", records["reference"])
        n, now = state.get("references", 0), store.count("reference")
        if scorer.teacher is not None and not scorer.lazily and now < n:
            raise StoreError(LACKING.format(n=n, path=store.path, now=now))
        scorer.forget()
        self._steps.restart(state["step"])
        scorer.counters.load(state["counters"])
        scorer.prior.load_state_dict(state["prior"])
        scorer.guard.load_state_dict(state.get("guard") or Guard(scorer.config).state_dict())
        # At once: other ranks may share the store, load the same, and be done with it.
        store.replace("difficulty", records["difficulty"])
        parts.numbers.load_state_dict(state.get("numbers") or Numbers().state_dict())
        parts.turns.ahead, parts.fills_rows = state.get("ahead", 0), state.get("fills_rows", False)
        store.replace("owed", records.get("owed", {}))
        if not store.temporary:
            scorer.exchange.meet()  # nobody goes on to write into a store that another still replaces
        self._loaded_at = self._steps.made

    def save(self, folder: str | os.PathLike[str], *, on_each_node: bool = False) -> None:
        """Into a checkpoint's folder; by every rank."""
        self._scorer.flush()
        self._scorer.exchange.finish()
        state = self.state_dict(of_store=checkpoint.writes_all(on_each_node=on_each_node))
        self._scorer.exchange.meet()  # nobody goes on to write into a store while another still reads it
        checkpoint.save(folder, state, on_each_node=on_each_node)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """From there."""
        self._take(checkpoint.load(folder), f"{checkpoint.NAME} in {os.fspath(folder)}")


def _records(state: Any, what: str) -> dict[str, dict[bytes, np.ndarray]]:
    """The records of each table that a state has.

    Raises:
        CheckpointError: it is no state of a gate, or a damaged one.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(NO_STATE.format(what=what, why=f"it is a {type(state).__name__}"))
    for name, (must_be, holds) in _WANTED.items():
        if name not in state and name in _NEEDED:
            raise CheckpointError(NO_STATE.format(what=what, why=f"it has no {name!r}"))
        if name in state and not holds(state[name]):
            raise CheckpointError(NO_STATE.format(what=what, why=f"its {name!r} must be {must_be}"))
    return {table: dict(checkpoint.unpack(state[table])) for table in checkpoint.OF_ALL_RANKS if table in state}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _are_counters(value: Any) -> bool:
    """Those that there are; what is drawn at random goes by "labels_seen"."""
    if not isinstance(value, Mapping) or "labels_seen" not in value:
        return False
    return all(_is_number(value[field.name]) for field in fields(Counters) if field.name in value)


def _is_prior(value: Any) -> bool:
    mean = value.get("mean") if isinstance(value, Mapping) else None
    return isinstance(mean, Tensor) and mean.dim() == 1 and mean.is_floating_point() and bool(mean.isfinite().all())


def _is_guards(value: Any) -> bool:
    """Its lowest mean may be infinite: nothing was seen."""
    if not isinstance(value, Mapping) or not all(_is_number(value.get(name)) for name in _OF_GUARD):
        return False
    told = value.get("told")
    return isinstance(told, list | tuple) and len(told) == 3 and all(map(_is_number, told))


def _are_numbers(value: Any) -> bool:
    """Of `supervision.Numbers`."""
    if not isinstance(value, Mapping) or not isinstance(value.get("others"), list):
        return False
    if not all(isinstance(value.get(name, []), list) for name in ("small", "called")):
        return False
    seen = value.get("as_many")
    return isinstance(seen, Mapping) and all(
        isinstance(x, list) and x and all(map(_is_number, x)) for x in seen.values()
    )


_OF_GUARD = ("samples", "mean", "square", "lowest", "left")
_RECORDS = "keys, lengths and losses that fit one another"
_NEEDED = ("step", "counters", "prior", "difficulty")  # the others came later, or are of some runs alone
_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("a number of optimizer steps, from 0", _is_count),
    "counters": ("the sums of a gate's report", _are_counters),
    "prior": ("a finite mean for each token id", _is_prior),
    "guard": ("a guard's running averages", lambda value: not value or _is_guards(value)),
    "references": ("a number of texts", _is_count),
    "teacher": ("a fingerprint", lambda value: value is None or isinstance(value, Mapping)),
    "ahead": ("a whole number", lambda value: isinstance(value, int)),
    "fills_rows": ("true or false", lambda value: isinstance(value, bool)),
    "numbers": ("names of numbers, and what they were", _are_numbers),
    **dict.fromkeys(checkpoint.OF_ALL_RANKS, (_RECORDS, checkpoint.is_packed)),
}
