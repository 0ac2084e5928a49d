"""Which releases of transformers have which types, and which of them are broken there."""

from __future__ import annotations

import transformers
from packaging.version import Version

# The release a type came with; the others are in the oldest that is tested.
SINCE = {
    "hyperclovax_vision_v2": "5.18", "minicpmv4_7": "5.18", "nemotron_h_omni": "5.18", "molmo2": "5.20",
    "muse_spark": "5.20", "unlimited_ocr": "5.20", "minicpm_ocr": "5.21", "mistral_large4": "5.22",
    "dots3_note": "5.23", "granite_docling": "5.23", "inkling2": "5.23", "lfm3_vl": "5.23",
    "apertus1p5": "5.24", "hy_v4_vl": "5.24", "inkling2_loop": "5.24",
}  # fmt: skip

# Models that do not run, with or without a gate: (type, release) and what transformers does wrong there.
BROKEN = {
    ("llama4", "5.24.0"): "its forward reads `image_outputs` of a causal model's output, which has none",
}


def exists(name: str) -> bool:
    return Version(transformers.__version__) >= Version(SINCE.get(name, "0"))


def why_not(name: str) -> str | None:
    """Why this type cannot be examined here, or None."""
    if not exists(name):
        return f"{name} came with transformers {SINCE[name]}, and this is {transformers.__version__}"
    return BROKEN.get((name, transformers.__version__))
