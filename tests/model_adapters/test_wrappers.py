"""Someone's own encoder and projector around a plain causal language model needs no adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import regate
from model_adapters import conventional, find_adapter
from model_adapters.embedded import ids_of
from regate_patch import reference
from tests.zoo.common import TEXT

FEATURES, TOKENS = 5, 4
FULL = regate.Config(warmup=1000, logits="all")
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0, logits="all")


class MyVLM(nn.Module):
    """Embeds each row itself: its image's features, then its text; calls the language model without ids."""

    def __init__(self, kind: str = "llama", *, lora: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.projector = nn.Linear(FEATURES, 16), nn.Linear(16, 32)
        llm: Any = LlamaForCausalLM(LlamaConfig(**TEXT)) if kind == "llama" else GemmaForCausalLM(GemmaConfig(**TEXT))
        if lora:
            from peft import LoraConfig, get_peft_model

            llm = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        self.llm = llm

    def forward(self, photos: Tensor, texts: list[list[int]], answers: list[int]) -> Any:
        """`answers`: how many ids at the end of each text are the answer."""
        rows, labels = [], []
        if photos.dtype == torch.uint8:
            photos = photos.double() / 255
        for photo, text, answer in zip(self.projector(self.encoder(photos).relu()), texts, answers, strict=True):
            ids = torch.tensor(text)
            rows.append(torch.cat([photo, self.llm.get_input_embeddings()(ids)]))
            labels.append(torch.cat([torch.full((TOKENS + len(ids) - answer,), -100), ids[-answer:]]))
        length = max(map(len, rows))
        return self.llm(
            inputs_embeds=torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows]),
            attention_mask=torch.stack([(torch.arange(length) < len(row)).long() for row in rows]),
            labels=torch.stack([F.pad(row, (0, length - len(row)), value=-100) for row in labels]),
        )


def _batch(*, seed: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    return {
        "photos": torch.randn(2, TOKENS, FEATURES, generator=random, dtype=torch.double),
        "texts": [[11, 12, 21, 22, 23, 24, 25, 26], [13, 31, 32, 33, 34]], "answers": [6, 4],
    }  # fmt: skip


def _step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=1e-10, rtol=0)
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lora", [False, True])
def test_a_full_step_is_the_unpatched_model(lora: bool) -> None:
    model = MyVLM(lora=lora).double().train()
    expected = _step(model, _batch())
    gate = regate.apply(model, FULL, teacher=None)
    _assert_same(_step(model, _batch()), expected)
    assert gate.last is not None
    assert not gate.report().notes


@pytest.mark.parametrize("whole", [True, False], ids=["wrapper", "language model"])
def test_a_sparse_step_is_the_references(whole: bool) -> None:
    model = MyVLM().double().train()
    gate = regate.apply(model if whole else model.llm, SPARSE)
    got = _step(model, _batch())
    last = gate.last
    assert last is not None
    assert gate.report()["positions_computed"] < gate.report()["positions_seen"]
    regate.remove(model)
    model.llm.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"labels": torch.where(last.kept, last.labels, -100)}),
        with_kwargs=True,
    )
    with reference.masked(model.llm.model.layers, last.active):
        _assert_same(got, _step(model, _batch()))


@pytest.mark.parametrize("kind", ["llama", "gemma"])  # Gemma scales its embeddings
def test_what_is_text_and_what_is_not(kind: str) -> None:
    model, seen = MyVLM(kind).train(), []
    model.llm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(find_adapter(model).layout(model, kwargs)), with_kwargs=True
    )
    batch = _batch()
    model(**batch | {"photos": batch["photos"].float()})
    for row, text in enumerate(batch["texts"]):
        ids, visual = seen[0].input_ids[row][seen[0].valid[row]], seen[0].visual[row][seen[0].valid[row]]
        assert visual.tolist() == [True] * TOKENS + [False] * len(text)
        assert ids[~visual].tolist() == text


@pytest.mark.parametrize("pixels", [torch.double, torch.uint8])
def test_images_are_told_apart_by_the_outer_call(pixels: torch.dtype) -> None:
    model = MyVLM().double().train()
    gate = regate.apply(model, FULL, teacher=None)
    for seed in (0, 1, 0):
        batch = _batch(seed=seed)
        model(**batch | {"photos": (batch["photos"].abs() * 50).to(pixels)})
    gate.flush()
    assert gate.store.stats()["difficulty"] == 4
    assert not gate.report().notes
    assert not gate._parts.outer.arguments


class OneArgument(MyVLM):
    """Takes a batch in one piece: a mapping, or a list of samples."""

    def forward(self, samples: Any) -> Any:
        if isinstance(samples, list):
            samples = {
                "photos": torch.stack([sample["photo"] for sample in samples]),
                "texts": [sample["text"] for sample in samples], "answers": [sample["answer"] for sample in samples],
            }  # fmt: skip
        return super().forward(**samples)


@pytest.mark.parametrize("listed", [False, True])
def test_images_are_found_in_a_batch_of_one_argument(listed: bool) -> None:
    model: Any = OneArgument().double()
    gate = regate.apply(model, FULL, teacher=None)
    batch = _batch()
    batch["texts"] = [batch["texts"][0]] * 2
    batch["answers"] = [6, 6]
    names = {"photos": "photo", "texts": "text", "answers": "answer"}
    samples = [{name: batch[names_][i] for names_, name in names.items()} for i in range(2)]
    model(samples if listed else batch)
    gate.flush()
    assert len(list(gate.store.items("difficulty"))) == 2
    assert "note" not in str(gate.report())


@pytest.mark.parametrize("inside", [False, True])
def test_what_learns_may_stand_around_a_frozen_model(inside: bool) -> None:
    """The gate counts its steps, also where it hangs on the language model and knows nothing of what is around it."""
    model: Any = MyVLM().double()
    model.llm.requires_grad_(False)
    config = regate.Config(warmup=2, cycle=100, full_steps=0)
    gate = regate.apply(model.llm if inside else model, config, teacher=None)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=1e-3)
    for i in range(4):
        model(**_batch()).loss.backward()
        assert gate.step == i
        optimizer.step()
        optimizer.zero_grad()
    assert gate.report()["steps_sparse"] == 2


def test_the_language_model_alone_sees_no_images() -> None:
    model = MyVLM().double().train()
    gate = regate.apply(model.llm, FULL, teacher=None)
    for seed in (0, 1):
        model(**_batch(seed=seed))
    gate.flush()
    assert gate.store.stats()["difficulty"] == 2
    assert "give regate.apply the model that is called with the images" in str(gate.report())


def test_sample_ids_of_the_outer_call() -> None:
    model = MyVLM().double().train()
    gate = regate.apply(model, FULL, teacher=None)
    for _ in range(2):
        model(**_batch(), sample_ids=["a", "b"])
    gate.flush()
    assert gate.store.stats()["difficulty"] == 2
    regate.remove(model)
    with pytest.raises(TypeError, match="sample_ids"):
        model(**_batch(), sample_ids=["a", "b"])


def test_altered_embeddings_are_refused() -> None:
    model = MyVLM().double().train()
    regate.apply(model, FULL, teacher=None)
    model.llm.get_input_embeddings().register_forward_hook(lambda module, args, out: out + torch.rand_like(out))
    with pytest.raises(regate.RegateError, match=r"10 of 10 labelled positions.*NEFTune"):
        model(**_batch())


def test_a_frozen_tables_projections_are_kept_until_it_changes() -> None:
    table, calls = nn.Embedding(50, 8), []
    table.register_forward_hook(lambda module, args, out: calls.append(args[0].numel()))
    ids = torch.randint(0, 50, (2, 6))
    for frozen, expected in ((False, [50, 12, 50, 12]), (True, [50, 12, 12])):
        table.requires_grad_(not frozen)
        with torch.no_grad():
            table.weight.add_(1.0)
        embeds = table.weight.detach()[ids]
        calls.clear()
        for _ in range(2):
            assert torch.equal(ids_of(embeds, table, 50), ids)
        assert calls == expected
    with torch.no_grad():
        table.weight.add_(1.0)
    assert torch.equal(ids_of(table.weight[ids], table, 50), ids)
    assert (ids_of(embeds, table, 50) == -1).all()


def test_several_language_models_are_not_chosen_from() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = MyVLM().llm, MyVLM().llm

    assert conventional.language_model(MyVLM()) is not None
    with pytest.raises(regate.RegateError, match="no adapter serves Two"):
        regate.apply(Two())
