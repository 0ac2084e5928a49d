"""Adapters: where a model's decoder is, which positions are visual, how the teacher sees them.

Models that follow the Hugging Face conventions need no file here; `registry.find_adapter` serves them with the
defaults of `ModelAdapter`.
"""

from model_adapters.base import Batch, Layout, ModelAdapter, Padding
from model_adapters.errors import AdapterError
from model_adapters.registry import find_adapter, register_adapter

__all__ = ["AdapterError", "Batch", "Layout", "ModelAdapter", "Padding", "find_adapter", "register_adapter"]
