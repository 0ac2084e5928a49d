"""Which image belongs to which row, in layouts that the zoo's equal images do not show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_adapters import Layout, ModelAdapter, find_adapter
from model_adapters.visual import NOWHERE, Placeholders, Seen, visual_rows
from tests.zoo import members
from tests.zoo.releases import case

IMAGE, VIDEO, AUDIO, BREAK = 50, 51, 52, 49
WITHOUT_IDS = nn.Module()


class _Model(nn.Module):
    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO)


def _layout(*rows: list[int], padding: int = 0) -> Layout:
    length = max(map(len, rows)) + padding
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    valid = torch.arange(length) >= length - torch.tensor([[len(row)] for row in rows])
    visual = torch.isin(ids, torch.tensor([IMAGE, VIDEO, AUDIO]))
    return Layout(input_ids=ids, labels=ids, valid=valid, visual=visual)


def _seen(n: int, *more: int, zeros: tuple[Any, ...] = ()) -> Seen:
    digests = torch.arange(1, 1 + torch.Size((n, *more)).numel()).view(n, *more)
    for place in zeros:
        digests[place] = 0
    return Seen(digests, torch.ones(n, dtype=torch.int64))


def _rows(
    layout: Layout, batch: dict[str, Any], name: str = "pixel_values", model: nn.Module | None = None
) -> list[Any]:
    places = visual_rows(_Model() if model is None else model, batch, layout)[name]
    assert places is not None
    return torch.where(places < 0, NOWHERE, places // layout.valid.shape[1]).tolist()


def _i(n: int) -> list[int]:
    return [IMAGE] * n


def test_patches_of_images_of_any_size() -> None:
    """Qwen-VL: a token is four patches; two images side by side in a row, none in another."""
    layout = _layout([1, *_i(2), *_i(6), 1], [1, 1], [1, *_i(3), 1])
    batch = {"pixel_values": _seen(44), "image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 6], [1, 2, 6]])}
    assert _rows(layout, batch) == [0] * 32 + [2] * 12
    assert _rows(layout, batch, "image_grid_thw") == [0, 0, 2]


def test_the_place_is_the_first_placeholder() -> None:
    layout = _layout([1, *_i(2), *_i(6), 1], [1, 1, *_i(3), 1])
    batch = {"pixel_values": _seen(3), "image_sizes": torch.tensor([[2, 4], [4, 6], [2, 6]])}
    places = visual_rows(_Model(), batch, layout)["pixel_values"]
    assert places is not None
    assert places.tolist() == [1, 3, 10 + 4 + 2]  # the second row is padded to the length of the first, at the left


def test_frames_with_time_stamps_between_them() -> None:
    """Qwen3-VL, and Video-LLaMA 3, which leaves out tokens of frames that do not change."""
    layout = _layout([1, VIDEO, 2, VIDEO, VIDEO, 3], [VIDEO, VIDEO, 4, VIDEO, 5, VIDEO])
    grid = torch.tensor([[2, 2, 4], [1, 2, 4], [2, 2, 4]])
    assert _rows(layout, {"pixel_values_videos": _seen(40), "video_grid_thw": grid}, "pixel_values_videos") == (
        [0] * 16 + [1] * 24
    )


def test_images_and_videos_in_one_row() -> None:
    layout = _layout([VIDEO, *_i(2), VIDEO, VIDEO, VIDEO], [*_i(2), 1, *_i(2)], [VIDEO, VIDEO])
    batch = {"pixel_values": _seen(3), "pixel_values_videos": _seen(3, 2)}
    assert _rows(layout, batch) == [0, 1, 1]
    assert _rows(layout, batch, "pixel_values_videos") == [[0, 0], [0, 0], [2, 2]]


def test_rows_of_patches_end_with_a_break() -> None:
    """Pixtral: as many runs as rows of patches."""

    def image(height: int, width: int) -> list[int]:
        return [*_i(width), BREAK] * height

    layout = _layout([*image(2, 3), *image(1, 4)], [*image(3, 2)])
    sizes = 14 * torch.tensor([[2, 3], [1, 4], [3, 2]])
    assert _rows(layout, {"pixel_values": _seen(3), "image_sizes": sizes}) == [0, 0, 1]


def test_tiles_of_several_images() -> None:
    """InternVL: an image is one to three tiles of two tokens each, in one run; a tile for show has flag 0."""
    layout = _layout([1, *_i(6), 2, *_i(2)], [1, 2], [1, *_i(4)])
    assert _rows(layout, {"pixel_values": _seen(6)}) == [0, 0, 0, 0, 2, 2]
    flags = torch.tensor([[1], [1], [1], [1], [0], [1], [1]])
    assert _rows(layout, {"pixel_values": _seen(7), "image_flags": flags}) == [0, 0, 0, 0, NOWHERE, 2, 2]


def test_images_by_rows_filled_up_with_zeros() -> None:
    """Idefics: as many rows as runs, but not one run each."""
    layout = _layout([*_i(2), 1, *_i(2)], [*_i(2), 1], [1, 1])
    seen = _seen(3, 2, zeros=((1, 1), (2, 0), (2, 1)))
    assert _rows(layout, {"pixel_values": seen}) == [[0, 0], [1, NOWHERE], [NOWHERE, NOWHERE]]


def test_tiles_by_images_filled_up_with_zeros() -> None:
    """LLaVA-NeXT: whole image, one or two crops, and newlines."""
    layout = _layout([*_i(7), 1, *_i(9)], [1], [*_i(7)])
    batch = {
        "pixel_values": _seen(3, 3, zeros=((0, 2), (2, 2))),
        "image_sizes": torch.tensor([[9, 9], [9, 20], [9, 9]]),
    }
    assert _rows(layout, batch) == [0, 0, 2]


def test_crops_counted_for_each_image() -> None:
    """DeepSeek-OCR: the whole images, and the crops of those that have any; Molmo: all crops in one list."""
    layout = _layout([*_i(3), 1, *_i(7)], [*_i(5)])
    batch = {"pixel_values": _seen(3), "pixel_values_local": _seen(3), "num_local_patches": torch.tensor([0, 2, 1])}
    assert _rows(layout, batch) == [0, 0, 1]
    assert _rows(layout, batch, "pixel_values_local") == [0, 0, 1]
    layout = _layout([*_i(1), 1, *_i(4), 1, *_i(1), 1, *_i(2)], [*_i(1), 1, *_i(4)])
    grids = torch.tensor([[1, 1, 2, 2], [1, 1, 1, 2], [1, 1, 2, 2]])
    batch = {"pixel_values": _seen(7), "image_grids": grids, "image_num_crops": torch.tensor([3, 2, 2])}
    assert _rows(layout, batch) == [0] * 5 + [1] * 2


def test_counts_for_each_row() -> None:
    layout = _layout([*_i(7)], [1], [*_i(4)])
    batch = {"pixel_values": _seen(3), "image_sizes": torch.tensor([[9, 9], [9, 20], [5, 9]])}
    assert visual_rows(_Model(), batch, layout)["pixel_values"] is None  # 7 tokens are one image or two
    assert _rows(layout, batch | {"batch_num_images": torch.tensor([2, 0, 1])}) == [0, 0, 2]


def test_lists() -> None:
    """Of lists, row by row; and of tensors of any size."""
    layout = _layout([*_i(3), *_i(6)], [1], [*_i(3)])
    sizes = torch.tensor([3, 6, 3]) * 10
    nested = Seen(torch.tensor([5, 6, 7]), torch.ones(3, dtype=torch.int64), rows=torch.tensor([0, 0, 2]))
    assert _rows(layout, {"pixel_values": nested}) == [0, 0, 2]
    assert _rows(layout, {"pixel_values": Seen(torch.tensor([5, 6, 7]), sizes)}) == [0, 0, 2]


def test_models_without_placeholders_have_a_row_each() -> None:
    layout = _layout([1, 2], [3])
    assert _rows(layout, {"pixel_values": _seen(2, 3)}, model=WITHOUT_IDS) == [0, 1]
    assert visual_rows(WITHOUT_IDS, {"pixel_values": _seen(3)}, layout)["pixel_values"] is None


def test_an_image_that_nobody_sees() -> None:
    """Some batches of text bring one, to keep the tower in the graph."""
    assert _rows(_layout([1, 2], [3]), {"pixel_values": _seen(1)}) == [NOWHERE]


def test_what_cannot_be_told_is_said() -> None:
    layout = _layout([*_i(5)], [*_i(4)])
    assert visual_rows(_Model(), {"pixel_values": _seen(4)}, layout)["pixel_values"] is None
    assert _rows(_layout([*_i(5)]), {"pixel_values": _seen(4)}) == [0] * 4  # but to one row


_PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]


@pytest.mark.parametrize("name", map(case, ["llava_next", "llava_next_video", "llava_onevision", "granite4_vision"]))
def test_images_of_any_proportions_side_by_side(name: str) -> None:
    """How many tokens each takes is the model's own affair: it is asked for their features here, and not there."""
    model = members()[name].build(image_grid_pinpoints=_PINPOINTS).eval()
    sizes, counts, tiles = [[16, 32], [31, 31], [32, 20], [16, 16]], [], []
    for size in sizes:
        tiles.append(1 + {(16, 32): 2, (31, 31): 4, (32, 20): 4, (16, 16): 1}[tuple(size)])
        with torch.no_grad():
            out = model.model.get_image_features(torch.randn(1, tiles[-1], 3, 16, 16), torch.tensor([size]))
        features = out.pooler_output if name != "granite4_vision" else out.deepstack_features[0][1]
        counts.append(len(features[0]))
    assert len(set(counts)) > 2
    layout = _layout([1, *_i(counts[0] + counts[1]), 2], [3], [*_i(counts[2]), *_i(counts[3])])
    zeros = tuple((i, slice(n, None)) for i, n in enumerate(tiles))
    batch = {"pixel_values": _seen(4, 5, zeros=zeros), "image_sizes": torch.tensor(sizes)}
    places = find_adapter(model).visual_rows(model, batch, layout)["pixel_values"]
    assert places is not None
    assert (places // layout.valid.shape[1]).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_any_sizes_against_a_walk(seed: int) -> None:
    """Images of random sizes, with and without text between them, against placing them one at a time."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    rows, grids, expected = [], [], []
    for row in range(4):
        ids = [1]
        for _ in range(draw(0, 4)):
            height, width = draw(1, 4), draw(1, 4)
            ids += [*_i(height * width), *([2] if draw(0, 2) else [])]
            grids.append([1, 2 * height, 2 * width])
            expected += [row] * (4 * height * width)
        rows.append(ids)
    if not grids:
        return
    batch: dict[str, Any] = {"pixel_values": _seen(len(expected)), "image_grid_thw": torch.tensor(grids)}
    assert _rows(_layout(*rows, padding=seed % 3), batch) == expected


def test_runs_end_with_rows() -> None:
    mask: Tensor = torch.tensor([[False, True, True], [True, False, True]])
    placeholders = Placeholders.of(mask)
    assert placeholders.places.tolist() == [1, 2, 3, 5]
    assert placeholders.runs.tolist() == [0, 2, 3]


def test_the_conventions_are_the_default() -> None:
    assert ModelAdapter(serves=("x",)).visual_rows is visual_rows
