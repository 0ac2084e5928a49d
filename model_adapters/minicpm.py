"""MiniCPM-V (transformers: `models/minicpmv4_6` and its kin): the patches of all images side by side in one picture."""

from __future__ import annotations

from model_adapters.base import ModelAdapter

MINICPM = ModelAdapter(serves=("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), visual_axis=-1)
