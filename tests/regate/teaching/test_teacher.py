"""The teacher: equal numbers for a fraction of the work, computed once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regate
import regate_patch
from model_adapters import find_adapter
from regate.errors import NonFiniteLossError, StoreError, StoreMismatchError
from regate.teaching.teacher import Teacher
from tests.zoo import CORE

SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


@pytest.mark.few(2)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_elided_placeholders_give_the_padded_numbers(name: str, padding: Any) -> None:
    """Against a plain eager pass over the padded sequence, placeholders masked out of attention."""
    model, batch = CORE[name].build().double(), CORE[name].batch(padding)
    adapter = find_adapter(model)
    layout = adapter.layout(model, batch)
    teacher = Teacher(model, adapter, backend="eager", source="copy")
    losses = teacher.losses(batch, layout)
    ids = layout.input_ids.masked_fill(layout.visual, teacher.placeholder())
    with torch.no_grad():
        hidden = adapter.decoder(model).eval()(
            inputs_embeds=adapter.embeddings(model)(ids), attention_mask=(layout.valid & ~layout.visual).long(),
            position_ids=adapter.position_ids(model, batch), use_cache=False,
        )[0]  # fmt: skip
        logits = adapter.head(model)(hidden)
    for row, got in enumerate(losses):
        at = (layout.labels[row] != -100).nonzero()[:, 0]
        expected = F.cross_entropy(logits[row, at - 1], layout.labels[row, at], reduction="none")
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)


def test_the_teacher_computes_text_only() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none")
    adapter = find_adapter(model)
    teacher = Teacher(model, adapter, backend="eager", source="copy")
    computed = set()

    def note(module: nn.Module, args: Any) -> None:
        active = regate_patch.current()
        assert active is not None
        computed.add(active.index.shape[1])

    teacher.decoder.register_forward_pre_hook(note)
    layout = adapter.layout(model, batch)
    first = teacher.losses(batch, layout)
    other = batch | {"pixel_values": batch["pixel_values"] + 1}
    assert all(torch.equal(a, b) for a, b in zip(first, teacher.losses(other, layout), strict=True))
    assert computed == {int((~layout.visual).sum(1)[0]) - 1}  # no image, nor the last position, which predicts nothing


def test_precompute_computes_each_text_once(tmp_path: Path) -> None:
    model = CORE["llava"].build()
    batches = [CORE["llava"].batch(seed=s) for s in range(3)]
    gate = regate.apply(model, store=str(tmp_path / "store"))
    gate.precompute(batches, progress=False)
    assert gate.report()["teacher_samples"] == 6
    gate.precompute(batches, progress=False)
    assert gate.report()["teacher_samples"] == 6
    regate.remove(model)
    again = regate.apply(model, store=str(tmp_path / "store"))
    again.precompute([*batches, CORE["llava"].batch("left", seed=0)], progress=False)  # padding is not content
    assert again.report()["teacher_samples"] == 0


KILLED = """
import sys, torch, regate
from tests.zoo import CORE
gate = regate.apply(CORE["llava"].build(), store=sys.argv[1])
def batches():
    for s in range(1000):
        print(s, flush=True)
        yield CORE["llava"].batch(seed=s)
gate.precompute(batches(), progress=False)
"""


def test_precompute_resumes_after_a_kill(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    process = subprocess.Popen([sys.executable, "-c", KILLED, store], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 5:
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    model = CORE["llava"].build()
    gate = regate.apply(model, store=store)
    done = gate.store.stats()["reference"]
    assert done >= 10  # five whole batches of two
    gate.precompute((CORE["llava"].batch(seed=s) for s in range(8)), progress=False)
    assert gate.store.stats()["reference"] == max(done, 16)
    assert gate.report()["teacher_samples"] == max(16 - done, 0)


def test_another_teachers_cache_is_refused(tmp_path: Path) -> None:
    model = CORE["llava"].build()
    regate.apply(model, store=str(tmp_path / "store"))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(StoreMismatchError, match="weights"):
        regate.apply(model, store=str(tmp_path / "store"))
    assert regate.api.gate_of(model) is None
    assert "forward" not in vars(model.model.language_model), "what was refused has left nothing on the model"


def test_records_go_to_the_store_of_the_gate(tmp_path: Path) -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, store=str(tmp_path / "first"))
    first, batch = gate.store, CORE["llava"].batch()
    gate.precompute([batch], progress=False)
    gate.store = regate.Store(tmp_path / "second")
    gate.choose(batch)
    model(**batch)
    gate.flush()
    assert first.stats()["difficulty"] == 0
    assert gate.store.stats()["reference"] == gate.store.stats()["difficulty"] == 2
    with regate.Store(tmp_path / "third") as third:
        third.bind({"weights": "others"})
        with pytest.raises(StoreMismatchError, match="weights"):
            gate.store = third


def test_precomputed_needs_every_sample() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, regate.Config(warmup=1, cycle=1, full_steps=0), teacher="precomputed")
    gate.precompute([CORE["llava"].batch(seed=0)], progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**CORE["llava"].batch(seed=0)).loss.backward()
        optimizer.step()
    with pytest.raises(StoreError, match=r"gate\.precompute"):
        model(**CORE["llava"].batch(seed=1))


@pytest.mark.parametrize("changed", [True, False])
def test_weights_that_are_loaded_after_the_copy_was_taken_are_told(changed: bool) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    weights = {name: x + 0.01 * changed for name, x in model.state_dict().items()}
    gate = regate.apply(model)
    model.load_state_dict(weights)
    model(**batch).loss.backward()
    assert ("Load weights first" in str(gate.report())) == changed


def test_a_broken_teacher_says_so() -> None:
    model = CORE["llava"].build()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    gate = regate.apply(model)
    with pytest.raises(NonFiniteLossError, match="row 0, position"):
        gate.precompute([CORE["llava"].batch()], progress=False)


def test_a_4bit_teacher_is_small_and_close() -> None:
    pytest.importorskip("bitsandbytes")
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    adapter = find_adapter(model)
    layout = adapter.layout(model, batch)
    full = Teacher(model, adapter, backend="eager", source="copy")
    small = Teacher(model, adapter, backend="eager", source="4bit")
    size = [sum(p.numel() * p.element_size() for p in t.decoder.layers.parameters()) for t in (full, small)]
    assert size[1] < 0.2 * size[0]
    for a, b in zip(full.losses(batch, layout), small.losses(batch, layout), strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=0.3, rtol=0)
    assert small.handle is not None
    assert small.handle.statistics.attention == small.handle.statistics.mlp == 2


def test_peft_base_is_the_teacher_without_a_copy() -> None:
    peft = pytest.importorskip("peft")
    model = CORE["llava"].build()
    batch = CORE["llava"].batch("right")
    adapter = find_adapter(model)
    expected = Teacher(model, adapter, backend="eager", source="copy").losses(batch, adapter.layout(model, batch))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    parameters = sum(p.numel() for p in wrapped.parameters())
    gate = regate.apply(wrapped, regate.Config(warmup=0, cycle=1, full_steps=0))
    wrapped(**batch).loss.backward()
    assert gate._teacher is not None
    assert gate._teacher.source == "live"
    assert sum(p.numel() for p in gate._teacher.decoder.parameters()) < parameters
    stored = {v.tobytes() for _, v in gate.store.items("reference")}
    assert stored == {x.half().float().numpy().tobytes() for x in expected}
    assert gate.report()["labels_kept"] < gate.report()["labels_seen"]
    assert all(m.training for m in wrapped.modules())


def test_adapters_that_are_frozen_stay_so() -> None:
    """Switched on again after an answer, PEFT lets all of them learn."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(CORE["llava"].build(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    gate = regate.apply(model)
    gate.precompute([CORE["llava"].batch("right")], progress=False)
    assert gate.store.count("reference") > 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learning
    assert any(learning.values())


class DistributedDataParallel(nn.Module):
    """Passes its call on, and no attributes: what is known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)


def test_peft_is_found_inside_what_wraps_it() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    batch = CORE["llava"].batch("right")
    references = []
    for wrap in (lambda model: model, DistributedDataParallel):
        torch.manual_seed(0)
        model = wrap(peft.get_peft_model(CORE["llava"].build(), config))
        gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0))
        assert gate._teacher is not None
        assert gate._teacher.source == "live"
        model(**batch)
        references.append(sorted(v.tobytes() for _, v in gate.store.items("reference")))
    assert references[0] == references[1]
    refused = peft.get_peft_model(CORE["llava"].build(), peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(regate.RegateError, match="LoHaConfig"):
        regate.apply(DistributedDataParallel(refused))


def test_one_teacher_is_the_same_in_any_precision() -> None:
    """A copy is in bfloat16 on CUDA, the model that it was taken of perhaps not."""
    model = CORE["llava"].build()
    adapter = find_adapter(model)
    found = {}
    for source, dtype in (("copy", torch.float32), ("live", torch.float32), ("copy", torch.bfloat16)):
        teacher = Teacher(model.to(dtype), adapter, backend="eager", source=source)  # type: ignore[arg-type]
        found[source, dtype] = teacher.fingerprint()
    assert len({json.dumps(x) for x in found.values()}) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert Teacher(model, adapter, backend="eager", source="copy").fingerprint() not in found.values()


def test_a_copy_does_not_call_the_student() -> None:
    """Functions that stand in for a layer's forward are not copied with it."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    layers = model.model.language_model.layers
    for layer in layers:
        layer.forward = lambda *args, own=layer.forward, **kwargs: own(*args, **kwargs)
    gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0))
    assert gate._teacher is not None
    layout = gate.adapter.layout(model, batch)
    before = gate._teacher.losses(batch, layout)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(2)
    for a, b in zip(gate._teacher.losses(batch, layout), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [0, 1])
def test_adapters_that_are_merged_under_the_gate(steps: int) -> None:
    model = peft.get_peft_model(
        CORE["llava"].build(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    gate = regate.apply(model, SPARSE)
    for seed in range(steps):
        model(**CORE["llava"].batch(seed=seed)).loss.backward()
    merged = model.merge_and_unload().requires_grad_(True)
    with pytest.raises(StoreMismatchError, match=r"were merged into the model that is gated.*regate\.apply anew"):
        merged(**CORE["llava"].batch(seed=9))
    assert gate.store.count("reference") == 2 * steps
    regate.apply(merged, SPARSE)
    merged(**CORE["llava"].batch(seed=9)).loss.backward()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rope_parameters", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("rms_norm_eps", {"rms_norm_eps": 0.3}),
        ("num_key_value_heads", {"num_key_value_heads": 1}),
        ("hidden_act", {"hidden_act": "gelu"}),
        (None, {"attention_dropout": 0.1, "use_cache": False, "initializer_range": 0.1, "max_position_embeddings": 9}),
        (None, {"pad_token_id": 0, "_attn_implementation": "eager", "rope_new": None, "new_scale": 0.0}),
    ],
)
def test_settings_of_the_architecture_make_another_teacher(name: str | None, changes: Any, tmp_path: Path) -> None:
    """With the same weights, numbers differ; not so by what is for training, or off."""
    model = CORE["llava"].build()
    regate.apply(model, store=str(tmp_path))
    regate.remove(model)
    for setting, value in changes.items():
        setattr(model.config.text_config, setting, value)
    if name is None:
        regate.apply(model, store=str(tmp_path))
    else:
        with pytest.raises(StoreMismatchError, match=rf"\({name}: stored .*, now "):
            regate.apply(model, store=str(tmp_path))
