"""Whose visual input is it: which entries of a batch's visual tensors stand at which placeholders.

Terms:
    entry        an index of a visual tensor's first axis, or of its first two: a patch, tile, crop, frame, image, video
    item         what a size table (`image_grid_thw`, `image_sizes`, ...) has a row for; without a table, an entry
    placeholder  a position of the decoder that stands for a visual feature
    run          placeholders without a break
    group        a row of the batch

Items stand in the order of their placeholders, whatever the model. How many placeholders an item takes is the model's
own affair and need not be known. One of these fits, and is taken only if every group gets whole items:
    1. as many runs as items (between images there is a marker or text): one each; or as many runs as they have frames
    2. placeholders in proportion to the items' sizes: by the table (Qwen-VL, Pixtral), or equally many for equal items
       (LLaVA, tiles of InternVL, frames), or by the number of values where images of any size come in a list
    3. all placeholders are in one group, and so are all items
A model without placeholders, which reads images by cross-attention, is given one entry for each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model_adapters import conventional

if TYPE_CHECKING:
    from model_adapters.base import Layout

NOWHERE = -1
# What tensors that are seen or heard are called. The first of a kind has an entry per item, if any has.
INPUTS = (
    "pixel_values", "pixel_values_images", "high_res_pixel_values", "pixel_values_local", "pixel_values_videos",
    "images", "image_patches", "flattened_patches", "input_features", "input_values", "audio_input_ids",
    "protein_input_ids",
)  # fmt: skip
# Sizes of items, a row each.
_TABLES = {
    "image": ("image_grid_thw", "image_grid_hw", "image_grids", "target_sizes", "spatial_shapes", "image_sizes"),
    "video": ("video_grid_thw", "video_grids", "target_sizes_videos", "image_sizes_videos"),
}
_COUNTS = ("image_num_crops", "num_local_patches")  # entries per item
_FLAGS = ("image_flags",)  # 0 for entries that are no one's
_PER_ROW = ("batch_num_images",)  # items per row
TABLES = (*_TABLES["image"], *_TABLES["video"], *_COUNTS, *_FLAGS, *_PER_ROW)


@dataclass(frozen=True)
class Seen:
    """A visual input on the host, each of its entries reduced to one number.

    Attributes:
        digests: int64 [N], or [N, M] where the tensor has five axes or more; 0 where every value is 0, as in padding.
        sizes: int64 [N], how many values an entry has; they differ in lists of tensors only.
        rows: int64 [N], the rows of the batch, where a list holds a list for each row; else None.
    """

    digests: Tensor
    sizes: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True)
class Placeholders:
    """Placeholders in reading order.

    Attributes:
        places: int64 [T], `row * S + position`.
        groups: int64 [T], the group of each, never falling.
        runs: int64 [R], indices into `places` at which runs begin.
    """

    places: Tensor
    groups: Tensor
    runs: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Placeholders:
        """Where `mask`, bool [B, S], is True."""
        rows, positions = mask.nonzero().unbind(1)
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[1:] = (rows.diff() != 0) | (positions.diff() != 1)
        return cls(rows * mask.shape[1] + positions, rows, begins.nonzero().squeeze(1))

    def one_each(self, runs_of_items: Tensor) -> Tensor | None:
        """The places [M] of items that take so many runs each, if that is how many there are."""
        if int(runs_of_items.sum()) != len(self.runs):
            return None
        return self.places[self.runs[runs_of_items.cumsum(0) - runs_of_items]]

    def in_proportion(self, sizes: Tensor) -> Tensor | None:
        """The places [M] of items that take placeholders in proportion to `sizes` [M], if whole ones fill each group.

        An item takes whole placeholders, or a placeholder whole items (patches).
        """
        places, total = len(self.places), int(sizes.sum())
        ends = sizes.cumsum(0) * places
        if not total or (bool((ends % total).any()) and total % places):
            return None
        borders = self.groups.diff().nonzero().squeeze(1) + 1
        if not bool(torch.isin(borders * total, ends).all()):
            return None
        return self.places[((ends - sizes * places) // total).clamp(max=places - 1)]

    def in_groups(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        """The places [M] of items whose groups [M] are known: the first placeholder, or the row's first position."""
        first = torch.arange(shape[0]) * shape[1]
        begins = torch.ones_like(self.groups, dtype=torch.bool)
        begins[1:] = self.groups.diff() != 0
        first[self.groups[begins]] = self.places[begins]
        return first[groups]


def visual_rows(model: nn.Module, batch: Mapping[str, Any], layout: Layout) -> dict[str, Tensor | None]:
    """The default of `ModelAdapter.visual_rows`; how, is said at the top of this module."""
    seen = {name: value for name, value in batch.items() if isinstance(value, Seen)}
    kinds = {name: kind_of(name) for name in seen}
    ids, found = conventional.visual_ids(model), dict[str, Tensor | None]()
    if layout.items is not None:
        counts = torch.tensor(layout.items)
        return {name: _counted(len(value.digests), counts, layout.visual) for name, value in seen.items()}
    if not ids and not bool(layout.visual.any()):
        return row_by_row(model, batch, layout)
    for kind, mask in _masks(ids, layout, set(kinds.values())).items():
        inputs = {name: value for name, value in seen.items() if kinds[name] == kind}
        if not bool(mask.any()):
            found |= {name: torch.full((len(value.digests),), NOWHERE) for name, value in inputs.items()}
        else:
            found |= _stand(inputs, batch, Placeholders.of(mask), _table(kind, batch), mask.shape)
    return found


def kind_of(name: str) -> str:
    """Image, video or audio, by the name of the batch's entry."""
    if "video" in name:
        return "video"
    return "audio" if "audio" in name or name.startswith(("input_features", "input_values")) else "image"


def _masks(ids: Mapping[str, Sequence[int]], layout: Layout, kinds: set[str]) -> dict[str, Tensor]:
    """The placeholders of each kind, bool [B, S].

    All are of the one kind that the batch has, whatever their ids: frames of videos come as images in some models.
    """
    if len(kinds) == 1:
        return dict.fromkeys(kinds, layout.visual)
    own = {k: layout.visual & torch.isin(layout.input_ids, torch.tensor(ids[k])) for k in kinds & ids.keys()}
    rest = layout.visual.clone()
    for mask in own.values():
        rest &= ~mask
    return {kind: own.get(kind, rest) for kind in kinds}


def _table(kind: str, batch: Mapping[str, Any]) -> str | None:
    return next((n for n in _TABLES.get(kind, ()) if isinstance(batch.get(n), Tensor) and batch[n].dim() == 2), None)


def row_by_row(model: nn.Module, batch: Mapping[str, Any], layout: Layout) -> dict[str, Tensor | None]:
    """For models that have an entry for each row of the batch, and no placeholders by which to tell."""
    rows, length = layout.visual.shape
    each = torch.arange(rows) * length
    found: dict[str, Tensor | None] = {}
    for name, seen in batch.items():
        if isinstance(seen, Seen):
            found[name] = seen.rows * length if seen.rows is not None else each if len(seen.digests) == rows else None
    return found


def _stand(
    inputs: Mapping[str, Seen],
    batch: Mapping[str, Any],
    placeholders: Placeholders,
    table: str | None,
    shape: Sequence[int],
) -> dict[str, Tensor | None]:
    """The places of the inputs of one kind, and of the rows of their table."""
    if table is None:
        return _without_table(inputs, batch, placeholders, shape)
    sizes = batch[table].long()
    areas = _areas(sizes)
    each = sizes[:, 0] if sizes.shape[1] == 3 else torch.ones_like(areas)
    counts = next((batch[name] for name in _PER_ROW if isinstance(batch.get(name), Tensor)), None)
    at = None
    if counts is not None and len(counts) == shape[0] and int(counts.sum()) == len(areas):
        at = placeholders.in_groups(torch.arange(len(counts)).repeat_interleave(counts), shape)
    if at is None:
        at = _fitting(placeholders, [areas], [torch.ones_like(areas), each])
    found: dict[str, Tensor | None] = {table: at}
    for name, seen in inputs.items():
        items = _items(len(seen.digests), areas, batch)
        if at is None or items is None:
            found |= _without_table({name: seen}, batch, placeholders, shape)
        else:
            found[name] = at[items]
    return found


def _areas(sizes: Tensor) -> Tensor:
    """How large the items are whose sizes are [M, k]; of four sizes, two are another view's of the same item."""
    return sizes.prod(1) if sizes.shape[1] < 4 else sizes.unflatten(1, (-1, 2)).prod(-1).sum(1)


def _fitting(placeholders: Placeholders, sizes: list[Tensor], runs: list[Tensor]) -> Tensor | None:
    """The places of items by the first rule that fits."""
    tried = [placeholders.one_each(each) for each in runs] + [placeholders.in_proportion(each) for each in sizes]
    fitting = next((places for places in tried if places is not None), None)
    if fitting is None and not bool(placeholders.groups.diff().any()):
        return placeholders.places[:1].expand(len(sizes[0]))
    return fitting


def _counted(items: int, counts: Tensor, mask: Tensor) -> Tensor | None:
    """The places of items of which each row has `counts` [B]; in LLaVA's line a row that has none brings a dummy."""
    dummies = counts.clamp(min=1)
    for brought in (counts, dummies):
        if int(brought.sum()) == items:
            rows = torch.arange(len(counts)).repeat_interleave(brought)
            return torch.where(counts[rows] > 0, Placeholders.of(mask).in_groups(rows, mask.shape), NOWHERE)
    return None


def _items(entries: int, areas: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """[N] the item of each entry; None if it cannot be told."""
    items, total = torch.arange(len(areas)), int(areas.sum())
    if entries == len(items):
        return items
    for name in _COUNTS:
        counts = batch.get(name)
        if isinstance(counts, Tensor) and len(counts) == len(items) and int(counts.sum()) == entries:
            return items.repeat_interleave(counts.long())
    if total and not bool((areas * entries % total).any()):
        return items.repeat_interleave(areas * entries // total)
    return None


def _without_table(
    inputs: Mapping[str, Seen], batch: Mapping[str, Any], placeholders: Placeholders, shape: Sequence[int]
) -> dict[str, Tensor | None]:
    """The places of entries; inputs of as many entries show the same images twice."""
    found: dict[str, Tensor | None] = {}
    for name, seen in inputs.items():
        twin = next((known for known in found.values() if known is not None and len(known) == len(seen.digests)), None)
        counts = next((batch[n] for n in _COUNTS if isinstance(batch.get(n), Tensor)), None)
        first = next(iter(found.values()), None)
        if seen.rows is not None:
            found[name] = placeholders.in_groups(seen.rows, shape)
        elif twin is not None:
            found[name] = twin if seen.digests.dim() >= twin.dim() else twin.amax(1)
        elif counts is not None and first is not None and int(counts.sum()) == len(seen.digests):
            found[name] = first.repeat_interleave(counts.long(), dim=0)
        else:
            found[name] = _entries(seen, batch, placeholders)
    return found


def _entries(seen: Seen, batch: Mapping[str, Any], placeholders: Placeholders) -> Tensor | None:
    """The places of entries [N] or [N, M], each of which is an item; padding, all zeros, stands nowhere."""
    counted = (seen.digests != 0).flatten(1).any(1) if seen.digests.dim() > 1 else seen.digests != 0
    for name in _FLAGS:
        if isinstance(batch.get(name), Tensor) and batch[name].numel() == len(counted):
            counted = counted & batch[name].reshape(-1).bool()
    several = (seen.digests != 0) & counted[:, None] if seen.digests.dim() > 1 else None
    for among in (several, counted, torch.ones_like(counted)):
        if among is None or not bool(among.any()):
            continue
        ones = torch.ones(int(among.sum()), dtype=torch.int64)
        sizes = [ones] if among.dim() > 1 else [seen.sizes[among], ones]
        places = _fitting(placeholders, sizes, [ones])
        if places is not None:
            return torch.full(among.shape, NOWHERE).masked_scatter(among, places)
    return None
