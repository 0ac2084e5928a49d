"""Three relations that hold whatever the model, the batch, who reads the output and who trains.

    keep=1 is dense                   a step that keeps every label has the unpatched model's loss and gradients
    sparse is the masked reference    a sparse step has those of the per-layer eager reference, labels masked
    a sample is itself in any batch   what is learnt of it, alone or among others, packed or not

Batches are drawn at random: rows, lengths, padding, which positions are labelled, samples laid end to end. A few cases
run by default, hundreds in `make matrix`, every exact type of the zoo with `-m slow`. How many ran is told at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import regate
from model_adapters import conventional
from regate_patch import reference
from tests import oracle
from tests.packing import packed
from tests.zoo import CORE, members

TABLE = json.loads((Path(__file__).parents[1] / "docs" / "models.json").read_text())
# Types that the engine takes; recurrences are defined by the order of active positions, which no mask says.
EXACT = [name for name, row in TABLE.items() if not (row["refused"] or row["failed"] or row["recurrences"])]
PACKABLE = {"llava", "qwen2_5_vl", "internvl"}
EXAMPLES = 12  # of each case
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Drawn:
    """How a batch is drawn."""

    rows: int
    seed: int
    padding: Any
    labelled: float
    in_one_row: bool

    def batch(self, name: str, model: nn.Module) -> dict[str, Any]:
        specimen = CORE.get(name) or members()[name]
        batch = oracle.double(specimen.batch(self.padding, rows=self.rows, seed=self.seed))
        random = torch.Generator().manual_seed(self.seed)
        dropped = torch.rand(batch["labels"].shape, generator=random) >= self.labelled
        some = batch["labels"] != -100
        dropped &= some.cumsum(1) != 2  # each row keeps a label
        batch["labels"] = batch["labels"].masked_fill(dropped, -100)
        batch["labels"][:, 0] = -100
        if self.in_one_row and name in PACKABLE and self.padding != "left":
            return packed(model, batch)
        return batch


drawn = st.builds(
    Drawn,
    rows=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    padding=st.sampled_from(["none", "left", "right"]),
    labelled=st.sampled_from([1.0, 0.7, 0.3]),
    in_one_row=st.booleans(),
)


# -- who reads, and who trains --------------------------------------------------------------------------


def _loss(batch: dict[str, Any], output: Any) -> Tensor:
    return output.loss


def _and_hidden(batch: dict[str, Any], output: Any) -> Tensor:
    """Of each layer's output the mean, each with a weight of its own, and what stands at the end."""
    holder = output if "hidden_states" in output else output.language_model_outputs  # BLIP-2 hands out its parts
    states = holder.hidden_states
    return (
        output.loss
        + sum((i + 1) * x.pow(2).mean() for i, x in enumerate(states)) / len(states)
        + states[-1][..., -1, :].pow(2).mean()
    )


def _and_logits(batch: dict[str, Any], output: Any) -> Tensor:
    predict = batch["labels"][:, 1:] != -100  # a sparse step leaves padding out
    return output.loss + output.logits[:, :-1][predict].pow(2).mean()


READERS: dict[str, tuple[Callable[[Any, Any], Tensor], dict[str, Any], dict[str, Any]]] = {
    "loss": (_loss, {}, {}),
    "hidden states": (_and_hidden, {"output_hidden_states": True}, {}),
    "logits": (_and_logits, {}, {"logits": "all"}),
}


def _plain(model: Any) -> Any:
    return model


def _checkpointing(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    # dropout in the adapters would draw other numbers for other positions
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0)
    return get_peft_model(model, config).double()


WAYS = {"plain": _plain, "checkpointing": _checkpointing, "lora": _lora}


def _model(name: str, way: str) -> Any:
    specimen = CORE.get(name) or members()[name]
    return WAYS[way](specimen.double())


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


def _step(model: Any, batch: dict[str, Any], reader: str) -> tuple[Tensor, dict[str, Tensor]]:
    objective, call, _ = READERS[reader]
    model.zero_grad(set_to_none=True)
    loss = objective(batch, model(**batch, **call, use_cache=False))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same(got: Any, expected: Any, tolerance: float) -> None:
    """Up to float32's rounding of the loss, and `tolerance` times the largest gradient."""
    torch.testing.assert_close(got[0], expected[0], atol=3e-6, rtol=1e-6)
    largest = max(1.0, *(float(g.abs().max()) for g in expected[1].values()))
    for name, gradient in expected[1].items():
        own = got[1].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            own, gradient, atol=tolerance * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}", check_dtype=False
        )


def _tolerance(name: str) -> float:
    """Some models' norms or routers compute in float32 whatever they are given."""
    return 1e-8 if name in {"llava", "qwen2_vl", "qwen2_5_vl", "internvl"} else 1e-5


def cases(*ways: tuple[str, str, str], mark: Any = ()) -> list[Any]:
    return [pytest.param(*way, marks=mark, id="-".join(way)) for way in ways]


DEFAULT = [("llava", "plain", "loss"), ("llava", "plain", "hidden states"), ("qwen2_5_vl", "lora", "loss")]
HUNDREDS = [
    *((name, "plain", "loss") for name in CORE),
    *((name, way, reader) for name in ("llava", "qwen2_5_vl") for way in WAYS for reader in READERS),
]
THOUSANDS = [(name, "plain", reader) for name in EXACT for reader in ("loss", "hidden states")]
CASES = [
    *cases(*DEFAULT),
    *cases(*[c for c in dict.fromkeys(HUNDREDS) if c not in DEFAULT], mark=pytest.mark.matrix),
    *cases(*[c for c in THOUSANDS if c not in HUNDREDS], mark=pytest.mark.slow),
]


WITHOUT_READER = [
    pytest.param(c.values[0], c.values[1], marks=c.marks, id=f"{c.values[0]}-{c.values[1]}")
    for c in CASES
    if c.values[2] == "loss"
]


def _explore(relation: str, record: Record, check: Callable[[Drawn], None]) -> None:
    """Check cases drawn at random; `tests/conftest.py` adds up what is recorded, whichever process ran it."""
    ran = 0

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn)
    def explore(case: Drawn) -> None:
        nonlocal ran
        ran += 1
        check(case)

    explore()
    record(f"cases of: {relation}", ran)


@pytest.mark.parametrize(("name", "way", "reader"), CASES)
def test_keep_1_is_dense(name: str, way: str, reader: str, record_property: Record) -> None:
    plain, model = _model(name, way), _model(name, way)
    config = regate.Config(warmup=0, cycle=1, full_steps=0, keep=1.0, **READERS[reader][2])
    regate.apply(model, config, teacher=None)

    def check(case: Drawn) -> None:
        batch = case.batch(name, plain)
        expected = _step(plain, batch, reader)
        # Gemma 3n takes roots at zero on padding in front: the model's own gradients are no numbers then
        assume(all(bool(gradient.isfinite().all()) for gradient in expected[1].values()))
        _assert_same(_step(model, batch, reader), expected, _tolerance(name))

    _explore("keep=1 is dense", record_property, check)


@pytest.mark.parametrize(("name", "way"), WITHOUT_READER)
def test_sparse_is_the_masked_reference(name: str, way: str, record_property: Record) -> None:
    plain, model = _model(name, way), _model(name, way)
    if way == "checkpointing":  # recomputes the same, but outside of the reference
        plain.gradient_checkpointing_disable()
    gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0, selection="random"), teacher=None)
    layers = oracle.layers_of(conventional.decoder(plain))

    def check(case: Drawn) -> None:
        batch = case.batch(name, plain)
        got = _step(model, batch, "loss")
        assert gate.last is not None
        masked = batch | gate.adapter.with_labels(plain, batch, gate.last.labels_left)
        with reference.masked(layers, gate.last.active):
            expected = _step(plain, masked, "loss")
        _assert_same(got, expected, _tolerance(name))

    _explore("sparse is the masked reference", record_property, check)


@pytest.mark.parametrize(("name", "way"), WITHOUT_READER)
def test_a_sample_is_itself_in_any_batch(name: str, way: str, record_property: Record) -> None:
    model = _model(name, way)
    gate = regate.apply(model, regate.Config(warmup=10**6), teacher=None)

    def learnt(batches: list[dict[str, Any]]) -> dict[bytes, list[float]]:
        gate.store.clear("difficulty")
        for batch in batches:
            model(**batch, use_cache=False)
        gate.flush()
        return {key: losses.tolist() for key, losses in gate.store.items("difficulty")}

    def check(case: Drawn) -> None:
        apart = replace(case, in_one_row=False).batch(name, model)
        rows = (CORE.get(name) or members()[name]).split(apart, case.rows)
        alone = learnt(list(reversed(rows)))
        assert len(alone) == case.rows
        together = learnt([case.batch(name, model)])
        assert together.keys() == alone.keys()
        for key, losses in alone.items():
            assert together[key] == pytest.approx(losses, abs=1e-2)  # 16 bits

    _explore("a sample is itself in any batch", record_property, check)
