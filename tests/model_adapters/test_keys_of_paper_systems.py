"""Whose images they are, on stand-ins of the paper's three systems: a sample has one difficulty, in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate
from tests.model_adapters import stand_ins
from tests.model_adapters.stand_ins import FEATURES, FRAMES, IMAGE_ID, VIDEO_ID
from tests.zoo.common import IMAGE

Sample = tuple[int, ...]  # the numbers of its images; its text is always the same
FULL = regate.Config(warmup=1000)
ANSWER = [21, 22, 23, 24, 25, 26]


def _image(number: int) -> Tensor:
    """The second differs from the first in one value."""
    image = torch.randn(FRAMES, FEATURES, generator=torch.Generator().manual_seed(number // 2))
    image[3, 2] += number % 2
    return image


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def _text(samples: Sequence[Sample], places: Callable[[int], list[int]]) -> dict[str, Tensor]:
    ids = [[11, 12, *[i for image in sample for i in places(image)], 14, *ANSWER] for sample in samples]
    labels = [[-100] * (len(row) - len(ANSWER)) + ANSWER for row in ids]
    mask = _padded([[1] * len(row) for row in ids], 0)
    return {"input_ids": _padded(ids, 0), "labels": _padded(labels, -100), "attention_mask": mask}


def _videollama2(samples: Sequence[Sample]) -> dict[str, Any]:
    """A dummy for rows without an image, as the authors' data set makes."""
    images = []
    for sample in samples:
        images += [(_image(number), "video" if number % 2 else "image") for number in sample]
        if not sample:
            images.append((torch.zeros(FRAMES, FEATURES), "image"))
    return _text(samples, lambda number: [VIDEO_ID if number % 2 else IMAGE_ID]) | {"images": images}


def _videochat2(samples: Sequence[Sample]) -> dict[str, Any]:
    words = " ".join(map(str, ANSWER))
    return {
        "image": torch.stack([_image(sample[0]) for sample in samples]), "text_input": [words] * len(samples),
        "instruction": ["11 12"] * len(samples),
    }  # fmt: skip


def _videochat2_hd(samples: Sequence[Sample]) -> dict[str, Any]:
    """A list, of as many tiles as the sample has numbers."""
    images = [torch.stack([_image(number) for number in sample]) for sample in samples]
    return _videochat2(samples) | {"image": images}


def _internvl_chat(samples: Sequence[Sample]) -> dict[str, Any]:
    """A white tile for rows without an image, which its flag keeps out."""
    tiles = [[_image(number) for number in sample] or [torch.ones(FRAMES, FEATURES)] for sample in samples]
    flags = [[1] * len(sample) or [0] for sample in samples]
    return _text(samples, lambda number: [IMAGE] * FRAMES) | {
        "pixel_values": torch.stack([tile for row in tiles for tile in row]),
        "image_flags": torch.tensor([[flag] for row in flags for flag in row]),
    }


def _internvl() -> nn.Module:
    model = stand_ins.InternVLChatModel()
    model.img_context_token_id = IMAGE
    return model


MANY = [(0,), (1,), (), (0, 2), (2, 0), (3, 3)]
SYSTEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Sequence[Sample]], dict[str, Any]], list[Sample]]] = {
    "videollama2": (stand_ins.Videollama2Qwen2ForCausalLM, _videollama2, MANY),
    "videochat2": (stand_ins.VideoChat2_it_mistral, _videochat2, [(0,), (1,), (2,), (3,)]),
    "videochat2 in high definition": (
        stand_ins.VideoChat2_it_hd_mistral, _videochat2_hd, [(0,), (1,), (0, 2), (2, 0), (3, 3)],
    ),
    "internvl_chat": (_internvl, _internvl_chat, MANY),
}  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_sample_has_one_difficulty_in_any_batch(name: str) -> None:
    make, batch, samples = SYSTEMS[name]
    model = make().train()
    gate = regate.apply(model, FULL, teacher=None)
    random = torch.Generator().manual_seed(0)
    known: set[bytes] = set()
    for sample in samples:
        model(**batch([sample]))
        gate.flush()
        keys = {key for key, _ in gate.store.items("difficulty")}
        assert len(keys) == len(known) + 1, f"{sample} is taken for another sample"
        known = keys
    for _ in range(12):
        order = torch.randperm(len(samples), generator=random)[
            : 1 + int(torch.randint(len(samples), (), generator=random))
        ]
        model(**batch([samples[i] for i in order]))
    gate.flush()
    assert {key for key, _ in gate.store.items("difficulty")} == known
    assert not gate.report().notes
