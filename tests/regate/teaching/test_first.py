"""The model as its own teacher, until its first optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from model_adapters import find_adapter
from regate.errors import StoreError, StoreMismatchError, UnsupportedShardingError
from regate.ranks import in_step
from regate.teaching import choice as choosing
from regate.teaching.teacher import Teacher
from regate.teaching.weights import is_tight
from regate.training import calls
from tests import oracle
from tests.model_adapters import test_paper_systems, test_wrappers
from tests.zoo import CORE

CONFIG = regate.Config(warmup=1, cycle=4, full_steps=1, schedule="cycled")
BATCHES = [CORE["llava"].batch("right", seed=seed) for seed in range(3)]


def references(gate: regate.Gate) -> dict[bytes, list[float]]:
    return {key: losses.tolist() for key, losses in gate.store.items("reference")}


def train(model: nn.Module, steps: int = 4) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        model(**BATCHES[step % len(BATCHES)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_its_losses_are_a_copys(name: str) -> None:
    model, batch = CORE[name].build().double(), oracle.double(CORE[name].batch("right"))
    adapter = find_adapter(model)
    layout = adapter.layout(model, batch)
    copied = Teacher(model, adapter, backend="eager", source="copy").losses(batch, layout)
    regate.apply(model, CONFIG, teacher="first")
    first = Teacher(model, adapter, backend="eager", source="live").losses(batch, layout)
    assert all(torch.equal(a, b) for a, b in zip(first, copied, strict=True))


def test_it_trains_as_with_a_copy() -> None:
    found = []
    for choice in ("copy", "first"):
        model = CORE["llava"].build()
        gate = regate.apply(model, CONFIG, teacher=choice)
        gate.precompute(BATCHES, progress=False)
        found.append((train(model), references(gate)))
        assert gate.report()["steps_sparse"] == 2
    (copied, expected), (first, got) = found
    assert got == expected
    assert all(torch.equal(first[name], weight) for name, weight in copied.items())


def test_the_model_is_left_as_it_was() -> None:
    """In training mode but for what was not, with its gradients and hooks, and no number was drawn."""
    model: Any = CORE["llava"].build()
    plain = CORE["llava"].build()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.model.vision_tower.eval()
    gate = regate.apply(model, CONFIG, teacher="first")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def state() -> Any:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [m.training for m in model.modules()], hooks, torch.get_rng_state().tolist()

    before = state()
    gate.precompute(BATCHES, progress=False)
    assert state() == before
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    other = regate.apply(plain, CONFIG, teacher="copy")
    other.precompute(BATCHES, progress=False)
    assert references(gate) == references(other)  # dropout was off


def test_a_sample_without_a_reference_is_found_out_at_once() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, regate.Config(), teacher="first")  # the first 100 steps are full
    with pytest.raises(StoreError, match=r"2 of 2 samples.*before the first optimizer step"):
        model(**BATCHES[0])
    gate.precompute(BATCHES[:1], progress=False)
    model(**BATCHES[0]).loss.backward()
    with pytest.raises(StoreError, match=r"gate\.precompute"):
        model(**BATCHES[1])


def test_a_trained_model_is_no_teacher() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, CONFIG, teacher="first")
    gate.precompute(BATCHES, progress=False)
    train(model, 1)
    gate.precompute(BATCHES, progress=False)  # nothing is missing
    with pytest.raises(StoreError, match="has made 1 optimizer steps"):
        gate.precompute([CORE["llava"].batch("right", seed=9)], progress=False)
    other = CORE["llava"].build()
    gate = regate.apply(other, CONFIG, teacher="first")
    with torch.no_grad():
        other.lm_head.weight.add_(1)  # by other hands
    with pytest.raises(StoreMismatchError, match="changed since"):
        gate.precompute(BATCHES, progress=False)


def test_interrupted_it_goes_on() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, CONFIG, teacher="first")

    def interrupted() -> Iterator[dict[str, Tensor]]:
        yield from BATCHES[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gate.precompute(interrupted(), progress=False)
    assert gate.store.count("reference") == 4
    assert all(m.training for m in model.modules())
    gate.precompute(BATCHES, progress=False)
    assert gate.report()["teacher_samples"] == gate.store.count("reference") == 6


def test_adapters_leave_a_teacher_that_lasts() -> None:
    peft = pytest.importorskip("peft")
    model = CORE["llava"].build()
    expected = regate.apply(model, CONFIG, teacher="copy")
    expected.precompute(BATCHES, progress=False)
    regate.remove(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    gate = regate.apply(wrapped, CONFIG, teacher="first")
    assert gate.first
    gate.precompute(BATCHES[:1], progress=False)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        wrapped(**BATCHES[step % 3]).loss.backward()
        optimizer.step()
    assert gate.report()["steps_sparse"] == 2
    gate.precompute(BATCHES, progress=False)
    assert references(gate) == references(expected)


def test_auto_keeps_no_copy_where_memory_is_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CORE["llava"].build()
    monkeypatch.setattr(choosing, "is_tight", lambda model, adapter: True)
    gate = regate.apply(model, CONFIG)
    assert gate.first
    assert "keeps no copy" in str(gate.report())
    assert not regate.apply(model, CONFIG, teacher="copy").first


def test_memory_is_tight_where_a_copy_leaves_no_room_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = CORE["llava"].build()
    adapter = find_adapter(model)
    assert not is_tight(model, adapter)  # no GPU
    copied = sum(p.numel() for p in {*model.lm_head.parameters(), *model.model.language_model.parameters()})
    everything = sum(p.numel() for p in model.parameters())
    needed = 2 * copied + 4 * everything * 4  # bfloat16; weights, gradients and two moments in float32
    free = needed + 100
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 1000))
    assert not is_tight(model, adapter)
    free -= 1
    assert is_tight(model, adapter)
    model.model.vision_tower.requires_grad_(False)
    assert not is_tight(model, adapter)


def test_a_checkpoint_holds_what_cannot_be_computed_again(tmp_path: Path) -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, CONFIG, teacher="first")  # its store goes with the process
    gate.precompute(BATCHES, progress=False)
    train(model, 2)
    gate.save(tmp_path / "checkpoint")
    resumed = CORE["llava"].build()
    again = regate.apply(resumed, CONFIG, teacher="first")
    again.load(tmp_path / "checkpoint")
    assert references(again) == references(gate)
    resumed.load_state_dict(model.state_dict())
    train(resumed, 2)
    assert again.report()["teacher_samples"] == 6

    kept = CORE["llava"].build()
    gate = regate.apply(kept, CONFIG, teacher="first", store=str(tmp_path / "store"))
    gate.precompute(BATCHES, progress=False)
    state = gate.state_dict()
    assert "reference" not in state
    elsewhere = regate.apply(CORE["llava"].build(), CONFIG, teacher="first", store=str(tmp_path / "other"))
    with pytest.raises(StoreError, match=r"losses of 6 texts, and the store at .* has 0"):
        elsewhere.load_state_dict(state)


def test_no_teacher_where_every_label_is_kept() -> None:
    gate = regate.apply(CORE["llava"].build(), regate.Config.exact(), teacher="first")
    assert not gate.first
    with pytest.raises(regate.RegateError, match="keep=1"):
        gate.precompute(BATCHES, progress=False)


WRAPPERS = ("videochat2", "videochat2 in high definition", "videochat2 with LoRA", "own")


def _wrapper(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model that embeds its batch by itself for a language model inside; and a batch."""
    torch.manual_seed(0)
    if name == "own":
        return test_wrappers.MyVLM().double().train(), test_wrappers._batch()
    system = test_paper_systems.SYSTEMS[name]
    return system.make().double().train(), system.batch()


@pytest.mark.few(1)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_around_a_language_model(name: str) -> None:
    """Their batches are none of its calls: references and trained weights of a run with a copy."""
    found = []
    for choice in ("copy", "first"):
        torch._dynamo.reset()
        model, batch = _wrapper(name)
        gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0), teacher=choice)
        if choice == "first":
            hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
            gate.precompute([batch | {"sample_ids": [1, 2]}], progress=False)
            assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
            assert all(m.training for m in model.modules())
            assert not any(p.grad is not None for p in model.parameters())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            output = model(**batch)
            (output["loss"] if isinstance(output, dict) else output.loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert gate.report()["steps_sparse"] == 2
        assert gate.report()["teacher_samples"] == 2
        found.append((references(gate), {n: p.detach() for n, p in model.named_parameters()}))
    (expected, copied), (got, first) = found
    assert got == expected
    assert all(torch.equal(first[name], weight) for name, weight in copied.items())


def test_wrappers_keep_their_statistics_and_are_refused_when_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _wrapper("own")
    norm = nn.BatchNorm1d(test_wrappers.TOKENS).double()
    model.encoder = nn.Sequential(model.encoder, norm)  # type: ignore[arg-type]
    gate = regate.apply(model, CONFIG, teacher="first")
    gate.precompute([batch], progress=False)
    assert int(norm.num_batches_tracked) == 0
    assert norm.training
    monkeypatch.setattr(calls, "is_sharded", lambda model: True)
    with pytest.raises(UnsupportedShardingError, match="MyVLM gives its language model"):
        gate.precompute([batch], progress=False)


def test_a_process_alone_is_in_step() -> None:
    assert list(in_step([1, 2, 3])) == [1, 2, 3]
