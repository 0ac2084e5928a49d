"""Content keys of samples. A trainer may drop sample ids; a row's own tokens and images always arrive.

A sample's key is the same in any batch, in any order, with any padding. So images are told apart one by one, by every
value that they have: a digest is a sum of integers, which no order of summation changes, and to which zeros, with which
images are padded to a batch's largest, add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_adapters import Batch, Layout, ModelAdapter
from model_adapters.visual import TABLES, Seen
from regate.errors import StoreError
from regate.labels import IGNORED, up_to_last

UNKNOWN_IMAGES = (
    "which image belongs to which row of the batch cannot be told: equal texts share one difficulty; pass sample_ids, "
    "or give regate.apply the model that is called with the images"
)
NO_IDS: tuple[object, ...] = ()  # in place of `sample_ids`, where samples are read for their texts alone
_CHUNK = 1 << 22  # values that are digested at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Inputs that are not padded with zeros: which of their values count, and along which axis.
_MASKS = {
    "feature_attention_mask": -1, "input_features_mask": 1, "input_values_mask": 1, "audio_input_ids_mask": 1,
    "protein_attention_mask": 1,
}  # fmt: skip
_MASKED = {
    "input_features": ("feature_attention_mask", "input_features_mask"), "input_values": ("input_values_mask",),
    "audio_input_ids": ("audio_input_ids_mask",), "protein_input_ids": ("protein_attention_mask",),
}  # fmt: skip

# Parts of the names of floating-point arguments that are neither seen nor heard.
_NEVER_SEEN = ("embeds", "mask", "label", "weight", "position", "loss", "bias", "past", "noise", "cos", "sin", "num_")


def text_keys(layout: Layout, *, pad: int | None = None) -> list[bytes]:
    """16 bytes per row from its valid tokens, where they are visual, and which are labels.

    Padding does not count: the same sample padded otherwise has the same key. Calls may not say what is padding, where
    decoders are causal and need not know: so tokens `pad` at a row's end, behind its last label, do not count either.
    Visual tokens count by place only, as the text-only teacher sees them.
    """
    ids = torch.where(layout.visual, -1, layout.input_ids)
    counts = layout.valid
    if pad is not None:
        told = counts & ((ids != pad) | (layout.labels != IGNORED))
        counts = counts & up_to_last(told)
    ids_labels = torch.stack([ids, torch.where(layout.labels == IGNORED, -1, layout.labels)], -1)
    rows, counted = ids_labels.to("cpu", torch.int64).numpy(), counts.cpu().numpy()
    return [blake2b(row[mask].tobytes(), digest_size=16).digest() for row, mask in zip(rows, counted, strict=True)]


def sample_keys(text: Sequence[bytes], visual: Sequence[bytes] | None, sample_ids: object = None) -> list[bytes]:
    """Keys under which difficulties are kept: explicit ids where given, else text and visual input.

    Raises:
        StoreError: there are not as many ids as samples.
    """
    if sample_ids is not None:
        listed = getattr(sample_ids, "tolist", None)  # of a tensor or an array: plain numbers in any run
        ids: list[Any] = listed() if listed is not None else list(map(_plain, sample_ids))  # type: ignore[call-overload]
        if len(ids) != len(text) and sample_ids is not NO_IDS:
            raise StoreError(
                f"the call brings {len(ids)} `sample_ids` and {len(text)} samples; give one id per sample, in the "
                "order in which they stand: one per row, or, where rows are packed, one for each sample of each row"
            )
        return [blake2b(repr(i).encode(), digest_size=16, person=b"sample").digest() for i in ids]
    if visual is None:
        return list(text)
    return [blake2b(t + v, digest_size=16).digest() if v else t for t, v in zip(text, visual, strict=True)]


def _plain(sample_id: Any) -> Any:
    """As Python has it, wherever it lies."""
    return sample_id.tolist() if isinstance(sample_id, Tensor | np.generic | np.ndarray) else sample_id


def visual_keys(model: nn.Module, adapter: ModelAdapter, batch: Batch, layout: Layout) -> list[bytes] | None:
    """A fingerprint of each row's visual input, empty for a row without; None where it cannot be told whose it is.

    Every value of every image enters it. Waits once for the device.

    Args:
        model: that of `adapter`.
        batch: the arguments of the model's call.
        layout: of the batch, on the CPU.
    """
    seen = _on_host(batch, adapter, len(layout.labels))
    if not any(isinstance(value, Seen) for value in seen.values()):
        return [b""] * len(layout.labels) if not bool(layout.visual.any()) else None
    rows, length = layout.labels.shape
    found: list[list[bytes]] = [[] for _ in range(rows)]
    for name, places in sorted(adapter.visual_rows(model, seen, layout).items()):
        if places is None:
            return None
        value = seen[name]
        digests = value.digests if isinstance(value, Seen) else value
        places = places.view(*places.shape, *[1] * (digests.dim() - places.dim())).expand_as(digests)
        there = (places >= 0) & ((digests != 0) if isinstance(value, Seen) else True)
        of_row, order = (places[there] // length).sort(stable=True)
        own = digests[there].long()[order].split(of_row.bincount(minlength=rows).tolist())
        for parts, numbers in zip(found, own, strict=True):
            if len(numbers):
                parts.append(name.encode() + numbers.numpy().tobytes())
    return [blake2b(b"".join(parts), digest_size=16).digest() if parts else b"" for parts in found]


def _on_host(batch: Batch, adapter: ModelAdapter, rows: int) -> dict[str, Any]:
    """The batch's visual inputs as `Seen`, its tables, fetched in one piece, and its options."""
    parts: dict[str, list[Tensor]] = {}
    leaves = {name: list(_leaves(batch[name])) for name in _names(batch, adapter)}
    for name, tensors in leaves.items():
        if isinstance(value := batch[name], Tensor):
            entries = value.detach().movedim(adapter.visual_axis, 0)
            parts[name] = [digest(_masked(name, entries, batch), axes=2 if entries.dim() > 4 else 1)]
        else:
            parts[name] = [digest(leaf.detach()[None], axes=1) for leaf in tensors]
    tables = {name: table for name in TABLES if (table := _table(batch.get(name))) is not None}
    fetched = iter(_fetch([x for of_name in parts.values() for x in of_name] + list(tables.values())))
    seen: dict[str, Any] = {name: value for name, value in batch.items() if isinstance(value, str | int | float)}
    for name, of_name in parts.items():
        digests = [next(fetched) for _ in of_name]
        if not digests:
            continue
        tensors = leaves[name]
        sizes = torch.tensor([leaf.numel() for leaf in tensors])
        if isinstance(batch[name], Tensor):
            sizes = torch.ones(len(digests[0]), dtype=torch.int64)
        seen[name] = Seen(torch.cat(digests), sizes, _nested_rows(batch[name], rows))
    return seen | {name: next(fetched) for name in tables}


def _names(batch: Batch, adapter: ModelAdapter) -> list[str]:
    """The entries that are visual inputs: the adapter's, or, in a call that has none of them, what may be one."""
    named = [name for name in adapter.visual_inputs if batch.get(name) is not None]
    if named:
        return named
    other = [name for name in batch if not any(part in name for part in _NEVER_SEEN)]
    leaves = {name: list(_leaves(batch[name])) for name in other}
    return [name for name, found in leaves.items() if found and all(map(_may_be_seen, found))]


def _may_be_seen(x: Tensor) -> bool:
    """Features or pixels, or pixels that are still bytes."""
    return x.dim() > 1 if x.is_floating_point() else x.dtype == torch.uint8 and x.dim() > 2


def _table(value: Any) -> Tensor | None:
    """Sizes as a tensor, if they have one shape."""
    if isinstance(value, list | tuple):
        shapes = {len(row) if isinstance(row, list | tuple) else 0 for row in value}
        nested = [x for row in value for x in (row if isinstance(row, list | tuple) else [row])]
        return torch.tensor(value) if len(shapes) == 1 and all(isinstance(x, int) for x in nested) else None
    return value if isinstance(value, Tensor) else None


def _leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in a list of any nesting."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)


def _nested_rows(value: Any, rows: int) -> Tensor | None:
    """The row of each leaf, where there is a list for each row; a pair of a tensor and its kind is no such list."""
    if not isinstance(value, list | tuple) or len(value) != rows:
        return None
    if not all(isinstance(part, list | tuple) and not any(isinstance(x, str) for x in part) for part in value):
        return None
    return torch.tensor([row for row, part in enumerate(value) for _ in _leaves(part)], dtype=torch.int64)


def _masked(name: str, values: Tensor, batch: Batch) -> Tensor:
    """Values [N, ...] with zeros where they are padding."""
    for mask_name in _MASKED.get(name, ()):
        mask = batch.get(mask_name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and values.dim() > 1:
            axis = _MASKS[mask_name] % values.dim()
            shape = [len(mask), *[1] * (values.dim() - 1)]
            shape[axis] = mask.shape[1]
            if mask.shape[1] == values.shape[axis]:
                return torch.where(mask.bool().view(shape), values, 0)
    return values


@torch.no_grad()
def digest(values: Tensor, *, axes: int) -> Tensor:
    """int64, of the first `axes` axes of `values`: a number for the values that an entry has, 0 if all are 0.

    Each axis is summed with weights of its own, wrapping around, and mixed, so that zeros at the end of any axis change
    nothing.

    Example:
        >>> image = torch.rand(1, 3, 8, 8)
        >>> padded = torch.nn.functional.pad(image, (0, 4, 0, 2))
        >>> torch.equal(digest(image, axes=1), digest(padded, axes=1))
        True
    """
    shape = values.shape[:axes]
    if values.is_floating_point():
        values = values.contiguous().view(_INTEGERS[values.element_size()])
    entries = values.reshape(-1, *values.shape[axes:]) if values.numel() else values.new_zeros(shape.numel(), 1)
    each = max(_CHUNK // max(entries[:1].numel(), 1), 1)
    return torch.cat([_digest(part) for part in entries.split(each)]).view(shape)


def _digest(entries: Tensor) -> Tensor:
    """[N, ...] -> int64 [N]."""
    numbers = entries.long() if entries.dim() == 1 else entries
    while numbers.dim() > 1:
        axis = numbers.dim() - 1
        numbers = _mix((numbers * _weights(numbers.shape[-1], axis, numbers.device)).sum(-1))
    return numbers


def _weights(n: int, axis: int, device: torch.device) -> Tensor:
    """Odd, [n] int64; the first of them are the same for any n."""
    return _mix(torch.arange(1, n + 1, device=device) + (axis << 40)) | 1


def _mix(numbers: Tensor) -> Tensor:
    """Each bit of a number moves half of its bits; 0 stays 0 (as in SplitMix64)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


def _fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integer tensors on the CPU, after one wait at most."""
    away = [x for x in tensors if x.device.type != "cpu"]
    if away:
        flat = torch.cat([x.long().flatten() for x in away]).cpu()
        home = iter(flat.split([x.numel() for x in away]))
        return [x if x.device.type == "cpu" else next(home).view(x.shape) for x in tensors]
    return list(tensors)
