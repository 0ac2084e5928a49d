"""The house's one-way doors: regate imports regate_patch and model_adapters, and no import runs back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"regate": {"regate_patch", "model_adapters"}, "regate_patch": set(), "model_adapters": set()}
MODELS = ("llama", "llava", "qwen", "gemma", "mistral", "intern", "idefics")


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_import_direction(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        foreign = (_imports(file) & set(ALLOWED)) - {package} - ALLOWED[package]
        assert not foreign, f"{file} imports {foreign}"


def test_the_engine_names_no_model() -> None:
    for file in (ROOT / "regate_patch").rglob("*.py"):
        text = file.read_text().lower()
        assert not [m for m in MODELS if m in text], file
