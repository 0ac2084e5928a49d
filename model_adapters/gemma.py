"""Gemma 3n and Gemma 4: every layer reads an embedding of the token's id, so the teacher needs ids."""

from __future__ import annotations

from model_adapters import conventional
from model_adapters.base import ModelAdapter

GEMMA = ModelAdapter(serves=("gemma3n", "gemma4"), run_decoder=conventional.run_decoder_on_ids)
