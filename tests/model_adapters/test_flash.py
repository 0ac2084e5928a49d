"""Models whose own code calls flash attention's functions: InternVL's packed rows, and decoders of several kinds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import regate
from model_adapters.flash import called_by
from regate.proof import readers
from regate_patch import UnsupportedGraphError
from tests import flash
from tests.model_adapters import flash_decoders
from tests.model_adapters.flash_decoders import (
    Attention,
    CausalLM,
    Decoder,
    Flattened,
    Packed,
    Plain,
    PlainWindowed,
    Unpadding,
    Windowed,
)
from tests.model_adapters.stand_ins import FEATURES, FRAMES, InternVLChatModel
from tests.zoo.common import IMAGE, TEXT

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[str]]:
    with flash.installed() as calls:
        yield calls


# -- InternVL's packed rows -----------------------------------------------------------------------------


def _internvl(told: str, *, packed: bool, checkpointing: bool = False) -> nn.Module:
    """Its model as it is trained on packed rows, or the same that takes rows of a sample each."""
    torch.manual_seed(0)
    if told == "cu_seqlens":
        language_model: Any = Qwen3ForCausalLM(Qwen3Config(**TEXT))
        for part in list(language_model.modules()):  # transformers' norms compute in float32
            for name, norm in part.named_children():
                if isinstance(norm, Qwen3RMSNorm):
                    setattr(part, name, nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))
        if packed:
            language_model.set_attn_implementation("flash_attention_2")
            flash_decoders.patch_qwen(language_model)
    else:
        language_model = CausalLM(Packed if packed else Plain)
    model = InternVLChatModel(language_model)
    model.img_context_token_id = IMAGE
    if checkpointing and told == "cu_seqlens":
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
    elif checkpointing:
        language_model.model.gradient_checkpointing = True
    return model.double().train()


def _samples(seed: int) -> list[tuple[list[int], list[int], Tensor | None]]:
    """Ids, labels and an image: some of a single token, without an answer, or of text alone."""
    rng, generator, found = random.Random(seed), torch.Generator().manual_seed(seed), []
    for kind in ["whole", *rng.choices(["whole", "text", "asks", "token"], k=rng.randint(2, 4)), "whole"]:
        if kind == "token":
            found.append(([rng.randrange(1, 90)], [-100], None))
            continue
        before = [rng.randrange(1, 90) for _ in range(rng.randint(1, 4))]
        image = None
        if kind != "text":
            before += [IMAGE] * FRAMES
            image = torch.randn(FRAMES, FEATURES, generator=generator, dtype=torch.double)
        answer = [rng.randrange(1, 90) for _ in range(rng.randint(1, 7))]
        found.append(
            (before + answer, [-100] * len(before) + ([-100] * len(answer) if kind == "asks" else answer), image)
        )
    return found


def _visual(samples: Any) -> dict[str, Tensor]:
    images = [image for _, _, image in samples if image is not None]
    return {"pixel_values": torch.stack(images), "image_flags": torch.ones(len(images), 1, dtype=torch.int64)}


def _weights(labels: list[int]) -> list[float]:
    answer = sum(label != -100 for label in labels)
    return [0.0 if label == -100 else answer**-0.5 for label in labels]


def _in_rows(samples: Any) -> dict[str, Any]:
    length = max(len(ids) for ids, _, _ in samples)
    ids, labels = (
        torch.tensor([sample[i] + [fill] * (length - len(sample[i])) for sample in samples])
        for i, fill in enumerate((0, -100))
    )
    mask = torch.arange(length) < torch.tensor([len(ids) for ids, _, _ in samples])[:, None]
    weights = [_weights(row) + [0.0] * (length - len(row)) for _, row, _ in samples]
    return {
        "input_ids": ids, "labels": labels, "attention_mask": mask.long(), "loss_weight": weights, **_visual(samples),
    }  # fmt: skip


def _in_one(samples: Any, told: str, *, padding: int) -> dict[str, Any]:
    """As InternVL's collators lay them: padding is one more sample for the kernel."""
    ids, labels, weights, places, first = [], [], [], [], [0]
    for own_ids, own_labels, _ in samples:
        ids += own_ids
        labels += own_labels
        weights += _weights(own_labels)
        places += range(len(own_ids))
        first.append(len(ids))
    valid = torch.tensor([[True] * len(ids) + [False] * padding])
    if padding:
        first.append(len(ids) + padding)
    batch = {
        "input_ids": torch.tensor([ids + [0] * padding]), "labels": torch.tensor([labels + [-100] * padding]),
        "position_ids": torch.tensor([places + list(range(padding))]), "loss_weight": [weights + [0.0] * padding],
        **_visual(samples),
    }  # fmt: skip
    boundaries = torch.tensor([first], dtype=torch.int32)
    if told == "cu_seqlens":
        return batch | {"cu_seqlens": boundaries, "attention_mask": valid}
    return batch | {"attention_mask": boundaries}


def _learn(model: nn.Module, batches: list[dict[str, Any]], config: regate.Config | None, **options: Any) -> Any:
    """Losses, gradients and kept labels of each step, and the gate."""
    torch._dynamo.reset()
    gate = regate.apply(model, config, **options) if config else None
    if gate is not None and options["teacher"] is not None:
        gate.precompute(batches, progress=False)
    found = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        kept = None if gate is None or gate.last is None else gate.last.labels_left[gate.last.kept].tolist()
        found.append((loss.detach(), grads, kept))
    if gate is None:
        return found, None
    gate.flush()
    return found, gate


def _assert_same(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for (loss, grads, kept), (its_loss, its_grads, its_kept) in zip(got, expected, strict=True):
        torch.testing.assert_close(loss, its_loss, atol=tolerance, rtol=0)
        assert kept == its_kept or its_kept is None
        assert grads.keys() == its_grads.keys()
        for n, gradient in its_grads.items():
            torch.testing.assert_close(grads[n], gradient, atol=tolerance, rtol=0, msg=lambda m, n=n: f"{n}: {m}")


TOLD = ["cu_seqlens", "attention_mask"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("told", TOLD)
def test_full_steps_are_internvls_own_on_packed_rows(told: str, checkpointing: bool) -> None:
    batches = [_in_one(_samples(seed), told, padding=3 * (seed % 2)) for seed in range(3)]
    expected, _ = _learn(_internvl(told, packed=True, checkpointing=checkpointing), batches, None)
    got, gate = _learn(_internvl(told, packed=True, checkpointing=checkpointing), batches, FULL, teacher=None)
    _assert_same(got, expected)
    report = gate.report()
    assert not report.notes
    assert report["recompiles"] == 0  # though each has other boundaries, and another number of them
    assert report["positions_computed"] < report["positions_seen"]
    (graph,) = gate._parts.handle.statistics.last
    assert graph.apart  # no [K, K] mask


@pytest.mark.few(1)
@pytest.mark.parametrize(("teacher", "seed", "elided"), [("copy", 0, "hidden"), ("first", 1, "visible")])
@pytest.mark.parametrize("told", TOLD)
def test_internvls_packed_samples_are_those_of_rows_of_their_own(
    told: str, teacher: str, seed: int, elided: Any
) -> None:
    """Losses, gradients, choices, difficulties and the teacher's losses."""
    samples, config = [_samples(seed + 10 * step) for step in range(2)], replace(SPARSE, elided=elided)
    together, packed = _learn(
        _internvl(told, packed=True), [_in_one(some, told, padding=seed) for some in samples], config, teacher=teacher
    )
    alone, rows = _learn(_internvl(told, packed=False), [_in_rows(some) for some in samples], config, teacher=teacher)
    _assert_same(together, alone)
    for table in ("reference", "difficulty"):
        mine, expected = (
            {key: list(losses) for key, losses in gate.store.items(table) if len(losses)} for gate in (packed, rows)
        )
        assert mine.keys() == expected.keys()
        for key, losses in expected.items():
            assert mine[key] == pytest.approx(losses, abs=2e-2)  # stored in 16 bits


def test_internvls_ranks_prove_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward averages over ranks, which so must run it equally often: here one is not ready."""
    asked: list[bool] = []

    def any_rank(here: bool) -> bool:
        asked.append(here)
        return True

    monkeypatch.setattr(readers, "any_rank", any_rank)
    monkeypatch.setattr(readers, "ranks", lambda: 2)
    model = _internvl("attention_mask", packed=False)
    gate = regate.apply(model, FULL, teacher=None)
    model(**_in_rows(_samples(0)))
    assert asked == [False]
    assert gate._parts.readers.proven is None


# -- decoders that call the functions -------------------------------------------------------------------


def _batch(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 14:] = mask[2, 17:] = 0
    elif padding == "left":
        mask[0, :5] = mask[2, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill((torch.arange(20) < 8) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": labels}


def _causal_lm(attention: Any, *, checkpointing: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = CausalLM(attention).double().train()
    model.model.gradient_checkpointing = checkpointing
    return model


DECODERS = [
    (Unpadding, "right", False),
    (Unpadding, "left", True),
    (Flattened, "none", True),
    (Windowed, "none", False),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("attention", "padding", "checkpointing"), DECODERS)
def test_functions_that_a_decoder_calls(attention: Any, padding: str, checkpointing: bool, calls: list[str]) -> None:
    """Full steps against the untouched model and its kernels, sparse ones against the same in plain products."""
    batch = _batch(padding)
    expected, _ = _learn(_causal_lm(attention, checkpointing=checkpointing), [batch], None)
    assert calls
    model = _causal_lm(attention, checkpointing=checkpointing)
    got, gate = _learn(model, [batch] * 2, FULL, teacher=None)
    _assert_same(got, expected * 2)
    assert not gate.report().notes
    calls.clear()
    model(**batch)
    assert not calls
    with torch.no_grad():
        model(**batch)
    assert calls  # what was put in their place is gone
    plain = {Unpadding: Plain, Flattened: Plain, Windowed: PlainWindowed}[attention]
    of_plain = batch if plain is Plain else batch | {"attention_mask": None}
    sparse, _ = _learn(_causal_lm(attention, checkpointing=checkpointing), [batch] * 2, SPARSE, teacher="copy")
    expected, _ = _learn(_causal_lm(plain), [of_plain] * 2, SPARSE, teacher="copy")
    _assert_same(sparse, expected)


def test_what_a_function_is_told_beside_causal_order_is_refused_by_name() -> None:
    class Sloped(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
            return flash.flash_attn_func(q, k, v, causal=True, alibi_slopes=torch.ones(4))

    with pytest.raises(UnsupportedGraphError, match="flash_attn_func is called with `alibi_slopes`"):
        _learn(_causal_lm(Sloped), [_batch("none")], FULL, teacher=None)


def _of_a_later_release() -> Any:
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        qv: Tensor | None = None, q_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, mask_mod: Any = None,
        return_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        assert (qv, q_descale, attention_chunk, mask_mod, return_lse) == (None, None, 0, None, False)
        return flash.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)

    return flash_attn_func


later = _of_a_later_release()


class _Told(Attention):
    """Calls a function with more arguments than today's have."""

    options: ClassVar[dict[str, Any]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int) -> Tensor:
        return later(q, k, v, causal=True, **self.options)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("qv", torch.ones(3, 20, 4, 8)),
        ("q_descale", torch.ones(3, 4)),
        ("attention_chunk", 8),
        ("mask_mod", max),
        ("return_lse", True),
        ("of_tomorrow", 1),
    ],
)
def test_what_a_later_release_can_be_told_is_refused(name: str, argument: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Told, "options", {name: argument})
    with pytest.raises(UnsupportedGraphError, match=f"flash_attn_func is called with `{name}`"):
        _learn(_causal_lm(_Told), [_batch("none")], FULL, teacher=None)


def test_what_a_later_release_is_told_in_vain_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"qv": None, "attention_chunk": 0, "mask_mod": None, "return_lse": False, "num_splits": 3}
    monkeypatch.setattr(_Told, "options", told)
    expected, _ = _learn(_causal_lm(_Told), [_batch("none")], None)
    got, gate = _learn(_causal_lm(_Told), [_batch("none")], FULL, teacher=None)
    _assert_same(got, expected)
    assert not gate.report().notes


def test_encoders_keep_their_kernels(calls: list[str]) -> None:
    """Those that call the same functions as the decoder, from the same file."""

    class Seeing(CausalLM):
        def __init__(self) -> None:
            super().__init__(Unpadding)
            self.encoder = Unpadding()

        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **call: Any) -> Any:  # type: ignore[override]
            x = self.model.tok_embeddings(input_ids)
            x = x + self.encoder(x, None, torch.arange(x.shape[1])[None])
            return super().forward(inputs_embeds=x, labels=labels, **call)

    torch.manual_seed(0)
    model = Seeing().double().train()
    expected, _ = _learn(model, [_batch("right")], None)
    got, _ = _learn(model, [_batch("right")] * 2, FULL, teacher=None)
    _assert_same(got, expected * 2)
    calls.clear()
    model(**_batch("right"))
    assert calls == ["varlen"]


def test_a_padding_mask_that_says_more_than_what_is_padding_is_refused() -> None:
    class Numbering(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, *args: Any, **call: Any) -> Any:
            x = self.tok_embeddings(input_ids)
            if attention_mask is not None:
                x = x + attention_mask.cumsum(1).sin()[..., None]
            return super().forward(None, attention_mask, inputs_embeds=x, use_cache=call.get("use_cache"))

    model = _causal_lm(Unpadding)
    model.model.__class__ = Numbering
    with pytest.raises(UnsupportedGraphError, match=r"calls flash_attn_func, flash_attn_varlen_func by itself"):
        _learn(model, [_batch("left")], FULL, teacher=None)


def test_functions_that_are_called_later_are_found() -> None:
    decoder = Decoder(Plain)
    assert not called_by(decoder)
    attention = decoder.layers[0].attention
    attention.__class__ = Unpadding
    assert {name for _, name in called_by(decoder)} == {"flash_attn_func", "flash_attn_varlen_func"}
    attention.__class__ = Plain
    assert not called_by(decoder)
    attention.forward = MethodType(Windowed.attend, attention)
    assert {name for _, name in called_by(decoder)} == {"flash_attn_func"}
