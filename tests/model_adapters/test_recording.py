"""What transformers records by hooks is recorded in gated forwards, too: every hidden state, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regate
from model_adapters.recording import followable_recording
from regate_patch import reference
from tests import oracle
from tests.zoo import CORE, members
from tests.zoo.releases import case

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0, selection="random")


def _hidden(model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(model(**batch, output_hidden_states=True, use_cache=False).hidden_states)


def _made(name: str) -> tuple[Any, Any, dict[str, Any]]:
    torch._dynamo.reset()
    specimen = CORE.get(name) or members()[name]
    return specimen.double(), specimen.double(), oracle.double(specimen.batch("right"))


# A module around the decoder collects (GIT); a part of the decoder collects for itself (Chameleon's image tokens);
# hidden states are stacks of several streams (Gemma 3n); the usual.
@pytest.mark.few(2)
@pytest.mark.parametrize("name", map(case, ["git", "chameleon", "gemma3n", "llava"]))
@pytest.mark.parametrize("before", [False, True], ids=["first asked by a gated step", "asked before"])
def test_full_steps_give_every_hidden_state_of_the_model(name: str, before: bool) -> None:
    plain, model, batch = _made(name)
    expected = _hidden(plain, batch)
    if before:
        _hidden(model, batch)
    regate.apply(model, FULL, teacher=None)
    for _ in range(2):
        got = _hidden(model, batch)
        assert len(got) == len(expected)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)  # norms in float32


@pytest.mark.parametrize("name", map(case, ["git", "chameleon", "gemma3n"]))
def test_sparse_steps_give_the_references_at_active_positions(name: str) -> None:
    plain, model, batch = _made(name)
    gate = regate.apply(model, SPARSE, teacher=None)
    got = _hidden(model, batch)
    assert gate.last is not None
    active = gate.last.active
    labels = gate.adapter.with_labels(plain, batch, gate.last.labels_left)
    with reference.masked(oracle.layers_of(gate.adapter.decoder(plain)), active):
        expected = _hidden(plain, batch | labels)
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x[..., active, :], y[..., active, :], atol=1e-6, rtol=1e-5)
    assert not active.all()


def test_a_decoder_that_was_asked_once_is_still_gated() -> None:
    """GIT's hooks stay where they are, and ask for a collector in every forward that follows."""
    _, model, batch = _made("git")
    _hidden(model, batch)
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**batch, use_cache=False).loss.backward()
    assert gate.report()["positions_computed"] < gate.report()["positions_seen"]


def test_collectors_nest() -> None:
    from transformers.utils import output_capturing as recording

    outer: dict[str, list[Any]] = {"hidden_states": []}
    own = recording._active_collector
    token = own.set(outer)
    try:
        with followable_recording(), followable_recording():
            collector = recording._active_collector
            assert collector is not own
            assert collector.get() is outer
            inner = collector.set({})
            assert collector.get() == {}
            collector.reset(inner)
            assert collector.get() is outer
        assert recording._active_collector is own
        assert own.get() is outer
    finally:
        own.reset(token)
