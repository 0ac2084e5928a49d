"""Digests of images, and keys made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import regate
from model_adapters import Layout, ModelAdapter, find_adapter
from regate.memory import keys
from regate.memory.keys import digest
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
MODULUS = 1 << 64


def _mix(number: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        number = (number ^ number >> shift) * factor % MODULUS
    return number ^ number >> 31


def _reference(values: Any, axis: int) -> int:
    """The digest of nested lists of integers, by Python's own numbers."""
    if isinstance(values, int):
        return values
    sums = sum(_reference(v, axis + 1) * (_mix(i + 1 + (axis << 40)) | 1) for i, v in enumerate(values))
    return _mix(sums % MODULUS)


@pytest.mark.parametrize("shape", [(2, 7), (3, 4, 5), (1, 3, 2, 6), (2, 2, 3, 2, 4)])
def test_digests_against_pythons_numbers(shape: tuple[int, ...]) -> None:
    values = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0))
    expected = [
        _reference([int(x) % MODULUS if isinstance(x, int) else x for x in entry], 1) for entry in values.tolist()
    ]
    assert [int(x) % MODULUS for x in digest(values, axes=1)] == expected
    assert torch.equal(digest(values.float().int().float(), axes=1), digest(values.float(), axes=1))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]
)
def test_any_change_of_any_value_changes_the_digest(dtype: torch.dtype) -> None:
    image = (torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(0)) * 100 + 1).to(dtype)
    found = {int(digest(image, axes=1))}
    for i in range(image.numel()):
        other = image.clone()
        other.view(-1)[i] += 1
        found.add(int(digest(other, axes=1)))
    swapped = image.clone()
    swapped[0, 0, 0, :2] = image[0, 0, 0, :2].flip(0)
    found |= {int(digest(swapped, axes=1)), int(digest(image.flip(1), axes=1)), int(digest(image.mT, axes=1))}
    assert len(found) == image.numel() + 4


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=4, max_size=4), st.integers(1, 3), st.permutations(range(5)))
def test_padding_order_and_batch_size_change_nothing(padding: list[int], alone: int, order: list[int]) -> None:
    images = torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = digest(images, axes=1)
    right, below, channels, tiles = padding
    padded = F.pad(images, (0, right, 0, below, 0, channels, 0, tiles))
    assert torch.equal(digest(padded[order], axes=1), expected[list(order)])
    assert torch.equal(digest(images[:alone], axes=1), expected[:alone])
    strided = torch.stack([images, images], -1)[..., 0]  # not contiguous
    assert torch.equal(digest(strided, axes=1), expected)
    assert torch.equal(digest(padded, axes=2)[:, :2], digest(images, axes=2))
    assert not digest(padded, axes=2)[:, 2:].any()


def test_images_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(7, 3, 8, 8)
    whole = digest(images, axes=1)
    for chunk in (1, 192, 500):
        monkeypatch.setattr(keys, "_CHUNK", chunk)
        assert torch.equal(digest(images, axes=1), whole)


def test_nothing_has_a_digest_too() -> None:
    assert digest(torch.zeros(0, 3, 4), axes=1).shape == (0,)
    assert digest(torch.zeros(2, 0, 4), axes=1).tolist() == [0, 0]
    assert digest(torch.tensor([3, 4]), axes=1).tolist() == [3, 4]


def _layout(rows: int) -> Layout:
    ids = torch.arange(rows * 4).view(rows, 4)
    return Layout(ids, ids, torch.ones(rows, 4, dtype=torch.bool), torch.zeros(rows, 4, dtype=torch.bool))


def _visual(batch: dict[str, Any], rows: int) -> list[bytes] | None:
    return keys.visual_keys(nn.Module(), ModelAdapter(serves=("x",)), batch, _layout(rows))


def test_sound_is_padded_with_silence_that_is_not_zero() -> None:
    sound = torch.randn(1, 8, 5)
    silence = torch.full((1, 8, 3), -1.5)
    longer = torch.cat([sound, silence], -1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    alone = _visual({"input_features": sound, "feature_attention_mask": mask[:, :5]}, 1)
    assert alone == _visual({"input_features": longer, "feature_attention_mask": mask}, 1)
    assert alone != _visual({"input_features": longer}, 1)
    turned = {"input_features": longer.mT, "input_features_mask": mask}
    assert _visual(turned, 1) == _visual({"input_features": sound.mT, "input_features_mask": mask[:, :5]}, 1)


def test_lists_of_any_nesting() -> None:
    a, b, c = torch.randn(3, 4, 4), torch.randn(3, 2, 6), torch.randn(3, 4, 4)
    nested = _visual({"pixel_values": [[a, b], [], [c]]}, 3)
    assert nested is not None
    assert nested[1] == b""
    assert nested[0] == _visual({"pixel_values": [[a, b]]}, 1)[0]  # type: ignore[index]
    assert nested[2] == _visual({"pixel_values": ([c],)}, 1)[0]  # type: ignore[index]
    assert len({nested[0], _visual({"pixel_values": [[b, a]]}, 1)[0]}) == 2  # type: ignore[index]
    assert _visual({"pixel_values": [a, b, c]}, 3) is not None
    assert _visual({"pixel_values": [a, b]}, 3) is None


def test_names_that_nobody_told_of() -> None:
    """In a call with none of the known names, floating-point tensors are taken for what is seen."""
    photo = torch.randn(1, 3, 4, 4)
    keyed = _visual({"photo": photo, "weights": torch.rand(1, 4), "attention_mask": torch.rand(1, 4)}, 1)
    assert keyed == _visual({"photo": photo, "ids": torch.ones(1, 4).long()}, 1)
    assert keyed != _visual({"photo": photo + 1}, 1)
    assert _visual({"weights": torch.rand(1, 4)}, 1) == [b""]


def test_sizes_as_lists() -> None:
    model = CORE["qwen2_5_vl"].build()
    batch: dict[str, Any] = dict(CORE["qwen2_5_vl"].batch())
    layout = find_adapter(model).layout(model, batch)
    expected = keys.visual_keys(model, find_adapter(model), batch, layout)
    batch["image_grid_thw"] = batch["image_grid_thw"].tolist()
    assert expected == keys.visual_keys(model, find_adapter(model), batch, layout)
    batch["image_grid_thw"] = [[1], [1, 2]]  # no table
    assert keys.visual_keys(model, find_adapter(model), batch, layout) is not None


class _Counted(Tensor):
    """Stands for values on a device: counts how often they are fetched."""

    fetched = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.__bool__, Tensor.__int__, Tensor.numpy)
        assert function not in waits, function
        if function is Tensor.cpu:
            _Counted.fetched += 1
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("meta")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_one_wait_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_weights", lambda n, axis, device, own=keys._weights: own(n, axis, torch.device("cpu")))
    model = CORE["qwen2_5_vl"].build()
    batch = CORE["qwen2_5_vl"].batch(rows=3)
    layout = find_adapter(model).layout(model, batch)
    expected = keys.visual_keys(model, find_adapter(model), batch, layout)
    away = {name: value.as_subclass(_Counted) for name, value in batch.items()}
    _Counted.fetched = 0
    assert keys.visual_keys(model, find_adapter(model), away, layout) == expected
    assert _Counted.fetched == 1


# -- in the gate ------------------------------------------------------------------------------------------


def _difficulties(gate: regate.Gate) -> set[bytes]:
    gate.flush()
    return {key for key, _ in gate.store.items("difficulty")}


def _three_images_in_three_rows(order: list[int]) -> dict[str, Tensor]:
    """LLaVA: row 0 has two images, row 1 one, row 2 none."""
    image, text = [93] * 4, list(range(11, 20))
    texts = [[1, *image, *image, *text], [1, *image, *text], [1, *text]]
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = [pixels[:2], pixels[2:], pixels[:0]]
    length = max(len(texts[i]) for i in order)
    padded = [texts[i] + [0] * (length - len(texts[i])) for i in order]
    ids = torch.tensor(padded)
    mask = torch.tensor([[1] * len(texts[i]) + [0] * (length - len(texts[i])) for i in order])
    batch = {
        "input_ids": ids, "attention_mask": mask,
        "labels": torch.where((ids > 12) & (ids < 20), ids, -100),
    }  # fmt: skip
    found = torch.cat([images[i] for i in order])
    return batch | ({"pixel_values": found} if len(found) else {})


def test_as_many_images_as_rows() -> None:
    model = CORE["llava"].build()
    gate = regate.apply(model, FULL, teacher=None)
    for order in ([0], [1], [2]):
        model(**_three_images_in_three_rows(order))
    alone = _difficulties(gate)
    assert len(alone) == 3
    for order in ([0, 1, 2], [2, 1, 0]):
        model(**_three_images_in_three_rows(order))
        assert _difficulties(gate) == alone
    assert not gate.report().notes


@pytest.mark.parametrize("masked", [True, False])
def test_a_sample_is_itself_whatever_its_padding_be_it_masked_or_not(masked: bool) -> None:
    model = CORE["llava"].build()
    batch = {name: x[:1] for name, x in CORE["llava"].batch("none", rows=1).items()}
    length = batch["input_ids"].shape[1]
    gate = regate.apply(model, FULL, teacher=None)
    for extra in (0, 2, 5):
        fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        padded = batch | {name: F.pad(batch[name], (0, extra), value=fill) for name, fill in fills.items()}
        if not masked:
            del padded["attention_mask"]
        model(**padded)
    assert len(_difficulties(gate)) == 1
    batch["input_ids"][0, length - 1] = 0  # a token that is learnt, be it that of padding, too
    batch["labels"][0, length - 1] = 0
    model(**batch)
    assert len(_difficulties(gate)) == 2


def test_an_end_that_is_the_token_of_padding() -> None:
    """It counts where it is learnt, or where more follows."""
    pad, ids = 2, torch.tensor([[1, 5, 6, 2, 2, 2], [1, 5, 6, 2, 2, 2], [1, 5, 6, 2, 7, 2], [1, 5, 6, 2, 2, 2]])
    labels = torch.tensor([[-100, -100, 6, -100, -100, -100]] * 4)
    labels[1, 3] = 2
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[3, 4:] = False
    layout = Layout(ids, labels, valid, torch.zeros_like(valid))
    alone = keys.text_keys(Layout(*(x[:1, :3] for x in (ids, labels, valid, layout.visual))))
    plain, learnt, longer, hidden = keys.text_keys(layout, pad=pad)
    assert plain == hidden == alone[0]
    assert len({plain, learnt, longer}) == 3
    assert len(set(keys.text_keys(layout))) == 4


def test_equal_text_with_another_image_has_its_own_difficulty() -> None:
    """Where the patches of all images are in one list; see tests/zoo/test_keys.py for all other layouts."""
    model, batch = CORE["qwen2_5_vl"].build(), CORE["qwen2_5_vl"].batch("none", rows=2, seed=1)
    other = batch["pixel_values"].clone()
    other.view(-1)[-1] += 1  # the last value of the last image
    gate = regate.apply(model, FULL, teacher=None)
    model(**batch)
    before = _difficulties(gate)
    model(**batch | {"pixel_values": other})
    assert len(_difficulties(gate)) == len(before) + 1 == 3
    assert not gate.report().notes


def test_what_cannot_be_told_is_noted() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    layout = find_adapter(model).layout(model, batch)
    strange = {"pixel_values": torch.randn(5, 3, 16, 16)}
    assert keys.visual_keys(model, find_adapter(model), strange, layout) is None
    gate = regate.apply(model, FULL, teacher=None)
    gate.choose(batch | strange)
    assert "cannot be told" in str(gate.report())
    assert not regate.apply(model, FULL, teacher=None).report().notes


def test_samples_found_again_are_in_the_report() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    gate = regate.apply(model, SPARSE, teacher=None)
    model(**batch)
    gate.flush()
    gate.scorer.recurrence.epoch_ended()
    assert gate.report()["samples_found_again"] == 0.0
    assert "seen before" not in str(gate.report())
    model(**batch)
    gate.flush()
    assert gate.report()["samples_found_again"] == 0.5
    assert "50% of the latest samples had been seen before" in str(gate.report())


def test_images_that_are_augmented_anew_are_named() -> None:
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=2)
    gate = regate.apply(model, FULL, teacher=None)
    for epoch in range(2):
        model(**batch | {"pixel_values": batch["pixel_values"] + epoch})
        gate.flush()
        gate.scorer.recurrence.epoch_ended()
        assert ("augmented anew each epoch" in str(gate.report())) == (epoch == 1)
    for _ in range(2):  # told who is who, they are found
        model(**batch | {"pixel_values": batch["pixel_values"] + 5}, sample_ids=[0, 1])
    gate.flush()
    assert not gate.report().notes
