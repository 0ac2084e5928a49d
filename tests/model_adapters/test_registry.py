"""Finding adapters, and writing one for an unknown model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regate
from model_adapters import AdapterError, find_adapter, registry
from tests.plain import Decoder
from tests.zoo import CORE


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    registry._plug_ins.cache_clear()
    yield
    registry._plug_ins.cache_clear()


class MyModel(nn.Module):
    """Nobody's architecture: expands the image inside, calls its decoder, returns a dict."""

    IMAGE_TOKENS = 3

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.see = nn.Embedding(30, 16), nn.Linear(12, 3 * 16)
        self.text, self.to_logits = Decoder(), nn.Linear(16, 30, bias=False)

    def forward(self, pixels: Tensor, ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        image = self.see(pixels).view(len(pixels), 3, 16)
        logits = self.to_logits(self.text(torch.cat([image, self.embed(ids)], 1)))
        out: dict[str, Any] = {"logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out


# The README shows this adapter.
def my_layout(model: nn.Module, batch: dict[str, Any]) -> regate.Layout:
    image = batch["ids"].new_zeros(len(batch["ids"]), MyModel.IMAGE_TOKENS)
    input_ids = torch.cat([image, batch["ids"]], 1)
    visual = torch.arange(input_ids.shape[1]).expand_as(input_ids) < MyModel.IMAGE_TOKENS
    return regate.Layout(input_ids, batch["labels"], torch.ones_like(visual), visual)


MY_ADAPTER = regate.ModelAdapter(
    serves=("MyModel",),
    decoder=lambda model: model.text,
    embeddings=lambda model: model.embed,
    head=lambda model: model.to_logits,
    layout=my_layout,
    run_decoder=lambda decoder, embeddings, ids, mask, positions: decoder(embeddings(ids)),
    visual_inputs=("pixels",),
)


def test_an_adapter_for_an_unknown_model() -> None:
    regate.register_adapter(MY_ADAPTER)
    model = MyModel()
    gate = regate.apply(model, regate.Config(warmup=0, cycle=1, full_steps=0))
    ids = torch.randint(0, 30, (2, 12))
    labels = torch.cat([torch.full((2, 7), -100), ids[:, 4:]], 1)
    out = model(pixels=torch.randn(2, 12), ids=ids, labels=labels)
    out["loss"].backward()
    report = gate.report()
    assert (report["labels_seen"], report["labels_kept"]) == (16, 8)
    assert report["attention_blocks"] == 3
    assert report["teacher_samples"] == 2


def test_registration_wins_over_conventions_and_the_last_one_counts() -> None:
    model = CORE["llava"].build()
    assert find_adapter(model).serves == ("llava",)
    first = regate.register_adapter(regate.ModelAdapter(serves=("llava", "other")))
    assert find_adapter(model) is first
    by_class = regate.register_adapter(regate.ModelAdapter(serves=("LlavaForConditionalGeneration",)))
    assert find_adapter(model) is first  # the config's type is asked first
    second = regate.register_adapter(regate.ModelAdapter(serves=("llava",)))
    assert find_adapter(model) is second
    assert by_class is not second


def test_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        @staticmethod
        def load() -> regate.ModelAdapter:
            return MY_ADAPTER

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point] if group == "regate.adapters" else [])
    assert find_adapter(MyModel()) is MY_ADAPTER


def test_an_unknown_model_is_refused_with_what_was_searched() -> None:
    regate.register_adapter(regate.ModelAdapter(serves=("known",)))
    with pytest.raises(AdapterError, match=r"searched for MyModel; registered: known.*get_decoder"):
        find_adapter(MyModel())


@pytest.mark.parametrize("name", CORE)
def test_conventions_find_the_decoder_and_the_image(name: str) -> None:
    model, batch = CORE[name].build(), CORE[name].batch()
    adapter = find_adapter(model)
    called = []
    adapter.decoder(model).register_forward_pre_hook(
        lambda m, args, kwargs: called.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    model(**batch)
    layout = adapter.layout(model, batch)
    assert called == [layout.labels.shape]
    assert layout.visual.sum(1).tolist() == [4, 4]
    assert torch.equal(layout.valid, batch["attention_mask"].bool())
