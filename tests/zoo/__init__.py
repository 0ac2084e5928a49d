"""A tiny random instance of every type in transformers' image-text-to-text mapping."""

from __future__ import annotations

import importlib
import pkgutil

from tests.zoo import core
from tests.zoo.common import Specimen

CORE: dict[str, Specimen] = core.MEMBERS


def members() -> dict[str, Specimen]:
    """Every specimen, from all files of this folder, by model type."""
    found: dict[str, Specimen] = {}
    for info in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{info.name}"), "MEMBERS", {})
    return dict(sorted(found.items()))
