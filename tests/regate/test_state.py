"""What a gate knows goes on with a run, and with its own alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regate
from regate.errors import CheckpointError, StoreInUseError, StoreMismatchError, UnsupportedShardingError
from regate.memory import checkpoint
from regate.memory.store import Store
from tests.steps import step
from tests.stores import start
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


def test_a_run_goes_on_with_its_own_teacher() -> None:
    """Where a model is built from its checkpoint, the gate's copy of it is another."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch()
    untrained = copy.deepcopy(model)
    gate = regate.apply(model, SPARSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step(model, batch)
    optimizer.step()
    trained, state = model.state_dict(), gate.state_dict()
    resumed = CORE["llava"].build()
    resumed.load_state_dict(trained)
    with pytest.raises(StoreMismatchError, match="Apply the gate to the model as it was before training"):
        regate.apply(resumed, SPARSE).load_state_dict(state)
    regate.apply(resumed, SPARSE, teacher=untrained).load_state_dict(state)
    regate.apply(resumed, SPARSE, teacher=None).load_state_dict(state)
    early = CORE["llava"].build()
    regate.apply(early, SPARSE).load_state_dict(state)
    early.load_state_dict(trained)


def test_state_survives(tmp_path: Path) -> None:
    """Stopping and resuming gives the run that never stopped, to the bit."""

    def run(model: nn.Module, gate: regate.Gate, steps: range) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for i in steps:
            loss = model(**CORE["llava"].batch(seed=i % 3)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    config = regate.Config(warmup=2, cycle=4, full_steps=1)
    model = CORE["llava"].build()
    base = copy.deepcopy(model)
    gate = regate.apply(model, config)
    whole = run(model, gate, range(10))
    model = copy.deepcopy(base)
    gate = regate.apply(model, config)
    first = run(model, gate, range(5))
    torch.save({"model": model.state_dict(), "gate": gate.state_dict()}, tmp_path / "state")
    resumed = copy.deepcopy(base)
    gate = regate.apply(resumed, config)
    state = torch.load(tmp_path / "state", weights_only=False)
    resumed.load_state_dict(state["model"])
    gate.load_state_dict(state["gate"])
    assert first + run(resumed, gate, range(5, 10)) == whole
    assert gate.report()["steps_full"] + gate.report()["steps_sparse"] == 10


def test_difficulties_of_another_run_are_not_taken_over_silently(tmp_path: Path) -> None:
    batch = CORE["llava"].batch("none", rows=2)
    for run in range(2):
        model = CORE["llava"].build()
        gate = regate.apply(model, FULL, teacher=None, store=str(tmp_path))
        model(**batch).loss.backward()
        gate.flush()
        assert ("2 samples, learnt in another run" in str(gate.report())) == (run == 1)
    state = gate.state_dict()
    gate = regate.apply(model, FULL, teacher=None, store=str(tmp_path))
    gate.load_state_dict(state)
    model(**batch)
    assert "another run" not in str(gate.report())


# Learns into a store until it is told to stop.
OTHER_RUN = """
lock = Store(sys.argv[1]).claim()
print("learns", flush=True)
sys.stdin.read()
"""
LEARNS = "learns\n"


def test_runs_at_the_same_time_share_no_difficulties(tmp_path: Path) -> None:
    """What is learnt is one run's; reference losses are anyone's."""
    batch, model = CORE["llava"].batch("none", rows=2), CORE["llava"].build()
    gate = regate.apply(model, SPARSE, store=str(tmp_path / "one"))
    other = start(OTHER_RUN, gate.store.path)
    assert other.stdout is not None
    assert other.stdout.readline() == LEARNS
    gate.precompute([batch], progress=False)
    for refused in (lambda: model(**batch), lambda: gate.load_state_dict(gate.state_dict())):
        with pytest.raises(StoreInUseError, match=r"copy_references\('ANOTHER'\)"):
            refused()
    gate.flush()
    assert gate.store.count("difficulty") == 0
    gate.store = gate.store.copy_references(tmp_path / "two")
    model(**batch).loss.backward()
    with pytest.raises(StoreInUseError):
        gate.store = Store(tmp_path / "one")
    other.communicate(timeout=60)
    gate.store = Store(tmp_path / "one")  # the other run is over
    assert start(OTHER_RUN, tmp_path / "two").communicate(timeout=60)[0] == LEARNS
    assert start(OTHER_RUN, tmp_path / "one").communicate(timeout=60)[0] == ""
    gate.remove()
    assert start(OTHER_RUN, tmp_path / "one").communicate(timeout=60)[0] == LEARNS


def test_a_store_is_never_empty_while_a_state_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks share it, and may be further already; or the process may be killed."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    gate = regate.apply(model, FULL, teacher=None, store=str(tmp_path))
    model(**batch).loss.backward()
    state, seen = gate.state_dict(), []
    unpack = checkpoint.unpack

    def slowly(packed: Any) -> Iterator[Any]:
        for record in unpack(packed):
            seen.append(len(list(gate.store.items("difficulty"))))
            yield record

    monkeypatch.setattr(checkpoint, "unpack", slowly)
    gate.load_state_dict(state)
    assert seen == [2, 2]
    assert gate.store.count("difficulty") == 2


def test_a_resumed_run_is_looked_at_as_any_other(tmp_path: Path) -> None:
    batch = CORE["llava"].batch("none", rows=2)
    model = CORE["llava"].build()
    gate = regate.apply(model, FULL, teacher=None)
    model(**batch).loss.backward()
    gate.save(tmp_path)
    resumed = CORE["llava"].build()
    gate = regate.apply(resumed, FULL, teacher=None)
    gate.load(tmp_path)
    resumed._is_replica = True
    with pytest.raises(UnsupportedShardingError, match="DataParallel"):
        resumed(**batch)


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name} | {"step": 77}


def _of_one(lengths: Any, losses: Any) -> dict[str, Any]:
    keys = torch.zeros(1, 16, dtype=torch.uint8)
    return {"difficulty": {"keys": keys, "lengths": torch.tensor(lengths), "losses": torch.tensor(losses)}}


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: None, "it is a NoneType"),
        (lambda state: [state], "it is a list"),
        (lambda state: {"model.weight": torch.zeros(2)}, "it has no 'step'"),
        (_without("prior"), "it has no 'prior'"),
        (_without("difficulty"), "it has no 'difficulty'"),
        (lambda state: state | {"step": -3}, "'step' must be a number of optimizer steps"),
        (lambda state: state | {"step": "3"}, "'step' must be"),
        (lambda state: state | {"counters": {}}, "'counters' must be"),
        (lambda state: state | {"counters": state["counters"] | {"labels_seen": None}}, "'counters' must be"),
        (lambda state: state | {"prior": {"mean": torch.full((3,), torch.nan)}}, "'prior' must be a finite mean"),
        (lambda state: state | {"guard": {"mean": 1.0}}, "'guard' must be"),
        (lambda state: state | _of_one([5], [0.0, 0.0]), "'difficulty' must be keys, lengths and losses that fit"),
        (lambda state: state | _of_one([-1], [0.0]), "'difficulty' must be"),
        (lambda state: state | _of_one(1, [0.0]), "'difficulty' must be"),
        (lambda state: state | _of_one([1], [torch.inf]), "'difficulty' must be"),
        (lambda state: state | {"owed": {}}, "'owed' must be"),
    ],
)
def test_what_is_no_state_changes_nothing(spoil: Callable[[dict[str, Any]], Any], said: str) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    gate = regate.apply(model, FULL, teacher=None)
    gate.step = 2
    model(**batch).loss.backward()
    state = gate.state_dict()
    with pytest.raises(CheckpointError, match=f"is no state of a gate.*{said}.*Nothing was changed"):
        gate.load_state_dict(spoil(state))
    now = gate.state_dict()
    assert now["step"] == gate.step == 2
    assert now["counters"] == state["counters"]
    assert torch.equal(now["prior"]["mean"], state["prior"]["mean"])
    assert all(torch.equal(now["difficulty"][name], x) for name, x in state["difficulty"].items())
    gate.load_state_dict(state)


def test_a_checkpoint_that_holds_something_else(tmp_path: Path) -> None:
    gate = regate.apply(CORE["llava"].build(), FULL, teacher=None)
    for holds, said in (([1], r"regate\.pt holds a list"), ({"a": 1}, rf"regate\.pt in {tmp_path} is no state")):
        torch.save(holds, tmp_path / "regate.pt")
        with pytest.raises(CheckpointError, match=said):
            gate.load(tmp_path)


def test_a_checkpoint_of_before_settings_were_told(tmp_path: Path) -> None:
    """Its teacher's fingerprint has none."""
    gate = regate.apply(CORE["llava"].build(), SPARSE)
    gate.save(tmp_path)
    state = checkpoint.load(tmp_path)
    assert state["teacher"].pop("settings") != "{}"
    gate.load_state_dict(state)
