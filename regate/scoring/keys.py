"""Content keys of samples. A trainer may drop sample ids; a row's own tokens always arrive."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from model_adapters import Batch, Layout
from regate.labels import IGNORED

_PIXELS = 256  # values of a row's visual input that enter its fingerprint


def text_keys(layout: Layout) -> list[bytes]:
    """16 bytes per row from its valid tokens, where they are visual, and which are labels.

    Padding does not count: the same sample padded otherwise has the same key. Visual tokens count by place only, as
    the text-only teacher sees them.
    """
    ids = torch.where(layout.visual, -1, layout.input_ids)
    ids_labels = torch.stack([ids, torch.where(layout.labels == IGNORED, -1, layout.labels)], -1)
    rows, valid = ids_labels.to("cpu", torch.int64).numpy(), layout.valid.cpu().numpy()
    return [blake2b(row[mask].tobytes(), digest_size=16).digest() for row, mask in zip(rows, valid, strict=True)]


def sample_keys(text: Sequence[bytes], pixels: Sequence[bytes] | None, sample_ids: object = None) -> list[bytes]:
    """Keys under which difficulties are kept: explicit ids where given, else text and pixels."""
    if sample_ids is not None:
        ids = sample_ids.tolist() if isinstance(sample_ids, Tensor) else list(sample_ids)  # type: ignore[call-overload]
        return [blake2b(repr(i).encode(), digest_size=16, person=b"sample").digest() for i in ids]
    if pixels is None:
        return list(text)
    return [blake2b(t + p, digest_size=16).digest() for t, p in zip(text, pixels, strict=True)]


def pixel_fingerprints(batch: Batch, names: Sequence[str], rows: int) -> list[bytes] | None:
    """A few evenly spaced values of each row's visual input; None where the batch has no row for each sample.

    Families that concatenate the patches of all images (Qwen-VL) give no such row: equal text with different
    images then shares its difficulty, unless `sample_ids` are passed.
    """
    for name in names:
        pixels = batch.get(name)
        if isinstance(pixels, Tensor) and pixels.dim() > 1 and pixels.shape[0] == rows:
            flat = pixels.detach().reshape(rows, -1)
            step = max(flat.shape[1] // _PIXELS, 1)
            values: np.ndarray = flat[:, ::step].float().cpu().numpy()
            return [row.tobytes() for row in values]
    return None
