"""The adapters for the three systems that the paper trained, on stand-ins of their call structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from model_adapters import AdapterError, find_adapter
from model_adapters.embedded import ids_of
from regate_patch import reference
from tests.model_adapters import stand_ins
from tests.model_adapters.stand_ins import FEATURES, FRAMES, IMAGE_ID, VIDEO_ID
from tests.zoo.common import IMAGE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0, logits="all")
Row = tuple[list[int], list[int], list[bool]]
PROMPT, ANSWERS = [11, 12, 13], [[21, 22, 23, 24, 25, 26], [31, 32, 33, 34]]


@dataclass(frozen=True)
class System:
    """A stand-in, its batch, and each row as (ids, labels, visual) at the decoder."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    rows: list[Row]
    language_model: str
    tolerance: float = 1e-10


def _features(seed: int = 0) -> Tensor:
    return torch.randn(2, FRAMES, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def _pad(rows: list[list[Any]], value: Any) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _videollama2_batch() -> dict[str, Any]:
    ids = [[*PROMPT, place, 14, *answer] for place, answer in zip((VIDEO_ID, IMAGE_ID), ANSWERS, strict=True)]
    return {
        "input_ids": _pad(ids, 0), "attention_mask": _pad([[1] * len(r) for r in ids], 0).bool(),
        "labels": _pad([[-100] * 5 + answer for answer in ANSWERS], -100), "images": _features(),
    }  # fmt: skip


def _videochat2_batch() -> dict[str, Any]:
    return {
        "image": _features(), "text_input": [" ".join(map(str, a)) for a in ANSWERS],
        "instruction": [" ".join(map(str, PROMPT))] * 2,
    }  # fmt: skip


def _hd_batch() -> dict[str, Any]:
    """One tile in the first row, two in the second."""
    first, second = _features()
    return _videochat2_batch() | {"image": [first[None], torch.stack([second, first])]}


def _hd_rows() -> list[Row]:
    ids, labels, visual = _rows([1, *PROMPT], [])[1]
    at = 1 + len(PROMPT)
    wider = (
        ids[:at] + [0] * FRAMES + ids[at:],
        labels[:at] + [-100] * FRAMES + labels[at:],
        visual[:at] + [True] * FRAMES + visual[at:],
    )
    return [_rows([1, *PROMPT], [])[0], wider]


def _text_batch() -> dict[str, Any]:
    """Without images."""
    return _videochat2_batch() | {"image": [torch.zeros(1)] * 2, "instruction": [""] * 2}


def _turns_batch() -> dict[str, Any]:
    """Two turns in each row."""
    return _videochat2_batch() | {"text_input": [" ".join(map(str, a)) + " ? 41 42 ! 43 44 45" for a in ANSWERS]}


def _turns_rows() -> list[Row]:
    turn = [41, 42, 43, 44, 45]
    return [
        (ids + turn, [*labels, -100, -100, 43, 44, 45], visual + [False] * 5)
        for ids, labels, visual in _rows([1, *PROMPT], [])
    ]


def _internvl() -> nn.Module:
    model = stand_ins.InternVLChatModel()
    model.img_context_token_id = IMAGE
    return model


def _internvl_batch() -> dict[str, Any]:
    ids = [[*PROMPT, *[IMAGE] * FRAMES, 14, *answer] for answer in ANSWERS]
    labels = [[-100] * (4 + FRAMES) + answer for answer in ANSWERS]
    weights = [
        [0.0 if x == -100 else len(answer) ** -0.5 for x in row] for row, answer in zip(labels, ANSWERS, strict=True)
    ]
    return {
        "input_ids": _pad(ids, 0), "attention_mask": _pad([[1] * len(r) for r in ids], 0),
        "labels": _pad(labels, -100), "pixel_values": _features(), "loss_weight": _pad(weights, 0.0).tolist(),
    }  # fmt: skip


def _rows(before: list[int], after: list[int]) -> list[Row]:
    start, end = len(before), len(after)
    return [
        (
            [*before, *[0] * FRAMES, *after, *answer],
            [-100] * (start + FRAMES + end) + answer,
            [False] * start + [True] * FRAMES + [False] * (end + len(answer)),
        )
        for answer in ANSWERS
    ]


SYSTEMS = {
    "videollama2": System(
        stand_ins.Videollama2Qwen2ForCausalLM, _videollama2_batch, _rows(PROMPT, [14]), "model"
    ),
    "videollama2 on Mixtral": System(
        stand_ins.Videollama2MixtralForCausalLM, _videollama2_batch, _rows(PROMPT, [14]), "model", 1e-6
    ),
    "videollama2 on Gemma 2": System(
        stand_ins.Videollama2Gemma2ForCausalLM, _videollama2_batch, _rows(PROMPT, [14]), "model", 1e-5
    ),
    "videollama2 on Llama": System(
        stand_ins.Videollama2LlamaForCausalLM, _videollama2_batch, _rows(PROMPT, [14]), "model"
    ),
    "videollama2 on Phi 3": System(
        stand_ins.Videollama2Phi3ForCausalLM, _videollama2_batch, _rows(PROMPT, [14]), "model"
    ),
    "videochat2": System(
        stand_ins.VideoChat2_it_mistral, _videochat2_batch, _rows([1, *PROMPT], []), "mistral_model.model"
    ),
    "videochat2 with LoRA": System(
        lambda: stand_ins.VideoChat2_it_mistral(lora=True), _videochat2_batch, _rows([1, *PROMPT], []),
        "mistral_model.base_model.model.model",
    ),
    "videochat2 in high definition": System(
        stand_ins.VideoChat2_it_hd_mistral, _hd_batch, _hd_rows(), "mistral_model.model"
    ),
    "videochat2 on Phi": System(
        stand_ins.VideoChat2_it_phi, _videochat2_batch, _rows([1, *PROMPT], []), "phi_model.model"
    ),
    "videochat2 on Phi with LoRA": System(
        lambda: stand_ins.VideoChat2_it_phi(lora=True), _videochat2_batch, _rows([1, *PROMPT], []),
        "phi_model.base_model.model.model",
    ),
    "videochat2 on Vicuna": System(
        stand_ins.VideoChat2_it_vicuna, _turns_batch, _turns_rows(), "llama_model.model"
    ),
    "internvl_chat": System(_internvl, _internvl_batch, _rows(PROMPT, [14]), "language_model.model"),
}  # fmt: skip


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> System:
    return SYSTEMS[request.param]


def _make(system: System) -> nn.Module:
    torch.manual_seed(0)
    return system.make().double().train()


def _step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    loss = output["loss"] if isinstance(output, dict) else output.loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same(
    got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    """Some models' norms and routers compute in float32 whatever they are given."""
    loss = max(tolerance, 1e-6)  # which transformers takes in float32
    torch.testing.assert_close(got[0], expected[0], atol=loss, rtol=0)
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_layout(system: System) -> None:
    """What the adapter reads off the call that reaches the language model."""
    model = _make(system)
    adapter, seen = find_adapter(model), []
    hook = adapter.causal_lm(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(adapter.layout(model, kwargs)), with_kwargs=True
    )
    model(**system.batch())
    hook.remove()
    for row, (ids, labels, visual) in enumerate(system.rows):
        valid = seen[0].valid[row]
        assert int(valid.sum()) == len(ids)
        assert seen[0].visual[row][valid].tolist() == visual
        assert torch.where(seen[0].visual[row], 0, seen[0].input_ids[row])[valid].tolist() == ids
        assert seen[0].labels[row][valid].tolist() == labels


@pytest.mark.few(3)
def test_full_step_is_the_unpatched_model(system: System) -> None:
    model = _make(system)
    expected = _step(model, system.batch())
    regate.apply(model, FULL, teacher=None)
    _assert_same(_step(model, system.batch()), expected, system.tolerance)


@pytest.mark.few(4)
def test_sparse_step_is_the_oracles(system: System) -> None:
    model, batch = _make(system), system.batch()
    gate = regate.apply(model, SPARSE)
    got = _step(model, batch)
    assert gate.last is not None
    assert gate.report()["positions_computed"] < gate.report()["positions_seen"]
    assert gate.report()["attention_blocks"] == 2
    regate.remove(model)
    adapter, last = find_adapter(model), gate.last

    def with_kept_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = dict(adapter.layout(model, kwargs).call or kwargs)
        labels = torch.where(last.kept, last.labels, -100)
        return args, call | adapter.with_labels(model, call, labels)

    adapter.causal_lm(model).register_forward_pre_hook(with_kept_labels, with_kwargs=True)
    with reference.masked(model.get_submodule(system.language_model).layers, last.active):
        _assert_same(got, _step(model, batch), system.tolerance)


@pytest.mark.few(3)
def test_teacher_sees_pads_where_the_image_stood(system: System) -> None:
    model, seen = _make(system), []
    gate = regate.apply(model, SPARSE)
    assert gate._teacher is not None
    gate._teacher.embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        scores = []
        for seed in (0, 1):  # other pixels, the same text
            batch = system.batch()
            name = next(name for name in ("image", "images", "pixel_values") if name in batch)
            shift = 0.1 * seed
            batch[name] = [x + shift for x in batch[name]] if isinstance(batch[name], list) else batch[name] + shift
            with torch.enable_grad():
                model(**batch)
            scores.append(dict(gate.store.items("reference")))
    taught = next(ids for ids in seen if len(ids) == 2)
    pad = gate._teacher.placeholder()
    for row, (ids, _, visual) in enumerate(system.rows):
        expected = [pad if is_visual else i for i, is_visual in zip(ids, visual, strict=True)]
        assert taught[row][: len(ids)].tolist() == expected
    assert scores[0].keys() == scores[1].keys()


def test_videochat2_in_high_definition_on_text_alone() -> None:
    model = _make(SYSTEMS["videochat2 in high definition"])
    expected = _step(model, _text_batch())
    gate = regate.apply(model, FULL, teacher=None)
    _assert_same(_step(model, _text_batch()), expected, 1e-10)
    assert not gate.report().notes
    gate.flush()
    assert gate.store.count("difficulty") == 2


def test_videochat2_without_its_language_model() -> None:
    model = _make(SYSTEMS["videochat2"])
    del model.mistral_model
    with pytest.raises(regate.RegateError, match="none of mistral_model, phi_model, llama_model"):
        regate.apply(model)


def test_videollama2_that_cannot_be_followed() -> None:
    model, batch = _make(SYSTEMS["videollama2"]), _videollama2_batch()
    regate.apply(model, SPARSE, teacher=None)
    batch["input_ids"][0, 0] = IMAGE_ID
    batch["images"] = torch.cat([_features()] * 2)
    prepare = model.prepare_inputs_labels_for_multimodal

    def cut(*args: Any) -> Any:
        _, mask, cache, embeds, labels = prepare(*args)
        return None, mask[:, :-3], cache, embeds[:, :-3], labels[:, :-3]

    model.prepare_inputs_labels_for_multimodal = cut
    with pytest.raises(regate.RegateError, match="no whole number"):
        model(**batch)


def test_internvl_that_cannot_be_followed() -> None:
    model, batch = _make(SYSTEMS["internvl_chat"]), _internvl_batch()
    regate.apply(model, SPARSE, teacher=None)
    model.img_context_token_id = None
    with pytest.raises(regate.RegateError, match="img_context_token_id"):
        model(**batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_of_embeddings(dtype: torch.dtype) -> None:
    table = torch.randn(5000, 24).to(dtype)
    ids = torch.randint(0, 5000, (3, 40))
    embeds = table[ids]
    embeds[1, 7] += 0.5
    found = ids_of(embeds, lambda ids: table[ids], len(table))
    assert found[1, 7] == -1
    found[1, 7] = ids[1, 7]
    assert torch.equal(found, ids)


def test_the_language_model_is_called_as_expected() -> None:
    model = stand_ins.VideoChat2_it_mistral()
    with pytest.raises(AdapterError, match="inputs_embeds"):
        find_adapter(model).layout(model, {"labels": torch.zeros(1, 2)})
