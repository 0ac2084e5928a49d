"""What a run must know of its gate to go on: taken, put back, written beside its checkpoints and read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from regate.errors import StoreError, StoreMismatchError
from regate.memory import checkpoint
from regate.memory.files import Table
from regate.scoring.guard import Guard
from regate.scoring.scorer import Scorer
from regate.scoring.turns import Turns
from regate.training.steps import Steps
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


class RunState:
    """The schedule's position, and all that was learnt. What the methods give, take and raise is said at `Gate`'s."""

    def __init__(self, steps: Steps, scorer: Scorer, turns: Turns) -> None:
        self._steps, self._scorer, self._turns = steps, scorer, turns
        self._loaded_at: int | None = None

    @property
    def just_loaded(self) -> bool:
        """Was it loaded, and has no step been made since?"""
        return self._loaded_at == self._steps.made

    def state_dict(self, *, of_store: bool = True) -> dict[str, Any]:
        """Of now, with what earlier forwards taught; of the store's records only if so asked."""
        scorer, store, turns = self._scorer, self._scorer.store, self._turns
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
            **({"ahead": turns.ahead, "fills_rows": turns.fills_rows} if turns.interleaved else {}),
            **{table: checkpoint.pack(store.items(table)) for table in tables if of_store},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was learnt since is forgotten."""
        scorer, store = self._scorer, self._scorer.store
        if scorer.teacher is not None and is_sharded(scorer.teacher.model):
            scorer.meet_teacher(state["step"])
        had, has = state.get("teacher"), scorer.taught_by
        if scorer.lazily and had and has and had != has:
            raise StoreMismatchError(OTHER_TEACHER)
        scorer.exchange.claim()
        if "reference" in state:
            store.put("reference", dict(checkpoint.unpack(state["reference"])))
        n, now = state.get("references", 0), store.count("reference")
        if scorer.teacher is not None and not scorer.lazily and now < n:
            raise StoreError(LACKING.format(n=n, path=store.path, now=now))
        scorer.forget()
        self._steps.restart(state["step"])
        scorer.counters.load(state["counters"])
        scorer.prior.load_state_dict(state["prior"])
        scorer.guard.load_state_dict(state.get("guard") or Guard(scorer.config).state_dict())
        # At once: other ranks may share the store, load the same, and be done with it.
        store.replace("difficulty", dict(checkpoint.unpack(state["difficulty"])))
        self._turns.ahead, self._turns.fills_rows = state.get("ahead", 0), state.get("fills_rows", False)
        store.replace("owed", dict(checkpoint.unpack(state["owed"])) if "owed" in state else {})
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
        self.load_state_dict(checkpoint.load(folder))
