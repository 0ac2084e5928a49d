"""Which releases of transformers have which types, and which of them are broken there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch._inductor.exc import InductorError

# The release a type came with; the others are in the oldest that is tested.
SINCE = {
    "hyperclovax_vision_v2": "5.18", "minicpmv4_7": "5.18", "nemotron_h_omni": "5.18", "molmo2": "5.20",
    "muse_spark": "5.20", "unlimited_ocr": "5.20", "minicpm_ocr": "5.21", "mistral_large4": "5.22",
    "dots3_note": "5.23", "granite_docling": "5.23", "inkling2": "5.23", "lfm3_vl": "5.23",
    "apertus1p5": "5.24", "hy_v4_vl": "5.24", "inkling2_loop": "5.24",
}  # fmt: skip

# Models that do not run in a release, with or without a gate, and what is wrong there.
BROKEN = {
    ("aria", "transformers 5.17.0"): "its configuration sets a part up before it is made",
    ("evolla", "transformers 5.17.0"): "the type is in its mapping without its configuration",
    ("glm5_next", "transformers 5.17.0"): "its configuration refuses its own kinds of layers",
    ("granite4_vision", "transformers 5.17.0"): "its projectors are as wide as their default, whatever is asked for",
    ("vision-encoder-decoder", "transformers 5.17.0"): "its configuration takes no configurations of its parts",
    ("vipllava", "transformers 5.17.0"): "its vision tower hands no hidden states out",
    ("llama4", "transformers 5.24.0"): "its forward reads `image_outputs` of a causal model's output, which has none",
}

# Models that cannot be gated with a release, and why.
REFUSED = {
    ("blip-2", "transformers 5.17.0"): "whether a layer is dropped is asked of a random tensor, even if none may be",
    ("kosmos-2", "transformers 5.17.0"): "whether a layer is dropped is asked of a random tensor, even if none may be",
    ("hunyuan_vl", "transformers 5.17.0"): "its rotary frequencies are chosen by a branch on positions",
    ("chameleon", "torch 2.11.0"): "capturing its `masked_scatter` fails within torch",
}


def exists(name: str) -> bool:
    return Version(transformers.__version__) >= Version(SINCE.get(name, "0"))


def why_not(name: str) -> str | None:
    """Why this type cannot be examined here, or None."""
    if not exists(name):
        return f"{name} came with transformers {SINCE[name]}, and this is {transformers.__version__}"
    return _here(name, BROKEN | REFUSED)


def broken(name: str) -> bool:
    """Does this type not even run here?"""
    return _here(name, BROKEN) is not None


def _here(name: str, known: dict[tuple[str, str], str]) -> str | None:
    return next((f"{release}: {known[name, release]}" for release in installed() if (name, release) in known), None)


def installed() -> list[str]:
    """As they are written above."""
    return [f"{package.__name__} {Version(package.__version__).base_version}" for package in (transformers, torch)]


def fails_with(release: str, why: str, error: type[BaseException]) -> pytest.MarkDecorator:
    """A mark for what must fail in this way with this release, and pass with any other."""
    return pytest.mark.xfail(release in installed(), reason=f"{release}: {why}", raises=error, strict=True)


INDUCTOR_ON_CPU = fails_with("torch 2.11.0", "inductor writes C++ that does not compile", InductorError)


def case(name: str, *marks: pytest.MarkDecorator) -> Any:
    """A type as a test's parameter; left out, and why, where it cannot be examined."""
    reason = why_not(name)
    left_out = () if reason is None else (pytest.mark.skip(reason=reason),)
    return pytest.param(name, marks=[*marks, *left_out], id=name)
