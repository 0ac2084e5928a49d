"""Which model the teacher is: of what can be asked for, what is refused, and one by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, LlamaConfig, modeling_utils

import regate
from model_adapters import find_adapter
from regate.errors import ConfigError, UnsupportedShardingError
from regate.teaching import choice
from regate.teaching.teacher import Teacher
from regate.training.batches import on_host
from tests.zoo import CORE

SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_rank_without_weights_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = CORE["llava"].build().to("meta")
    for asked in ("auto", "first", "copy"):  # another rank may have them, and know nothing of this one
        with pytest.raises(UnsupportedShardingError, match="fsdp_cpu_ram_efficient_loading: false"):
            regate.apply(model, teacher=asked)
    regate.apply(model, teacher=None)


def test_ranks_that_may_have_no_weights_copy_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of transformers leave zeros on all ranks but one."""
    monkeypatch.setattr(choice, "lacks_weights", lambda model: True)
    model = CORE["llava"].build()
    for asked in ("copy", "4bit"):
        with pytest.raises(UnsupportedShardingError, match="others than one another"):
            regate.apply(model, teacher=asked)
    assert regate.apply(model).first


@pytest.mark.parametrize("shared", ["the model", "its language model", "under PEFT"])
def test_a_teacher_that_is_the_student_would_be_frozen(shared: str) -> None:
    model = CORE["llava"].build()
    teacher: nn.Module = model.model.language_model if shared == "its language model" else model
    if shared == "under PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ConfigError, match="has modules of the model that is trained"):
        regate.apply(model, teacher=teacher)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == learning


def test_a_given_teacher_is_given_back() -> None:
    model, teacher = CORE["llava"].build(), CORE["llava"].build()
    teacher.lm_head.requires_grad_(False)
    before = [p.requires_grad for p in teacher.parameters()], [m.training for m in teacher.modules()]
    regate.apply(model, teacher=teacher)
    assert not any(p.requires_grad for p in teacher.model.language_model.parameters())
    regate.remove(model)
    assert ([p.requires_grad for p in teacher.parameters()], [m.training for m in teacher.modules()]) == before


def test_a_teacher_by_name_is_the_model_that_lies_there(tmp_path: Path) -> None:
    """And goes where the trained model goes, which a given one does not."""
    config = CORE["llava"].config().text_config
    other = AutoModelForCausalLM.from_config(config)
    other.save_pretrained(tmp_path)
    students, before = [CORE["llava"].build() for _ in range(2)], torch.get_rng_state()
    taught = [
        regate.apply(student, SPARSE, teacher=teacher)._teacher
        for student, teacher in zip(students, (other, str(tmp_path)), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    teachers = [teacher for teacher in taught if teacher is not None]
    batch, adapter = CORE["llava"].batch("right"), find_adapter(CORE["llava"].build())
    layout = on_host(batch, adapter.layout(CORE["llava"].build(), batch), vocabulary=10**6)[0]
    given, named = (teacher.losses(batch, layout) for teacher in teachers)
    assert all(torch.equal(a, b) for a, b in zip(given, named, strict=True))
    assert len({json.dumps(teacher.fingerprint()) for teacher in teachers}) == 1
    for student in students:
        student.to("meta")
    assert [teacher._device().type for teacher in teachers] == ["cpu", "meta"]


def test_a_teacher_by_name_is_whole_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers would read the weights of the trained model on one rank alone, for FSDP to deal them out."""
    saved = AutoModelForCausalLM.from_config(CORE["llava"].config().text_config)
    saved.save_pretrained(tmp_path)
    for asked in ("is_fsdp_enabled", "is_deepspeed_zero3_enabled"):
        monkeypatch.setattr(modeling_utils, asked, lambda: pytest.fail("asked"))
    read = choice._loaded(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), saved.parameters(), strict=True))


def test_a_teacher_by_a_name_that_stands_for_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of \('auto', .*the path or hub id of one.*frist.* loads no model"):
        regate.apply(CORE["llava"].build(), teacher=str(tmp_path / "frist"))


def test_positions_in_planes_are_not_for_a_teacher_that_has_none() -> None:
    """As some collators bring them for a student with multimodal rotary embeddings."""
    student = CORE["qwen2_5_vl"]
    model, batch = student.build(), student.batch("right")
    other = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, vocab_size=student.config().text_config.vocab_size))
    teacher = Teacher(other, find_adapter(other), backend="eager", source="given")
    layout = on_host(batch, find_adapter(model).layout(model, batch), vocabulary=10**6)[0]
    planes = torch.arange(layout.labels.shape[1]).expand(3, *layout.labels.shape)
    expected, got = (teacher.losses(call, layout) for call in (batch, batch | {"position_ids": planes}))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_process_alone_without_weights_is_told_where_they_are() -> None:
    """As accelerate's offload leaves it, or a model that was built for weights that are loaded later."""
    model = CORE["llava"].build().to("meta")
    with pytest.raises(UnsupportedShardingError, match=r"parameters .* on the 'meta' device.*cpu_offload") as told:
        regate.apply(model)
    assert "fsdp_cpu_ram_efficient_loading" not in str(told.value)


def _old_weight_norm(model: Any) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.model.language_model.layers[0].mlp.up_proj)


def _pruned(model: Any) -> None:
    prune.random_unstructured(model.model.language_model.layers[0].mlp.up_proj, "weight", 0.5)


@pytest.mark.parametrize("spoil", [_old_weight_norm, _pruned])
def test_what_cannot_be_copied_may_teach_itself(spoil: Any) -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    spoil(model)
    model(**batch).loss.backward()  # from here on its weights are no leaves
    with pytest.raises(ConfigError, match=r"LlamaModel cannot be copied .*teacher='first'.*teacher=None"):
        regate.apply(model, SPARSE)
    gate = regate.apply(model, SPARSE, teacher="first")
    gate.precompute([batch], progress=False)
    model(**batch).loss.backward()
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**batch).loss.backward()
    assert gate.last is not None
