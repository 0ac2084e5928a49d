"""A tiny random instance of every type in transformers' image-text-to-text mapping."""

from __future__ import annotations

import importlib
import pkgutil

from tests.zoo import core, releases
from tests.zoo.common import Specimen

CORE: dict[str, Specimen] = core.MEMBERS


def members() -> dict[str, Specimen]:
    """The specimens of the types that this release of transformers has."""
    return {name: specimen for name, specimen in of_any_release().items() if releases.exists(name)}


def of_any_release() -> dict[str, Specimen]:
    """Every specimen, from all files of this folder, by model type."""
    found: dict[str, Specimen] = {}
    for info in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{info.name}"), "MEMBERS", {})
    return dict(sorted(found.items()))
