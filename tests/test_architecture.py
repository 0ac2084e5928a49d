"""The house's one-way doors: between the packages, and between the rooms of each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"regate": {"regate_patch", "model_adapters"}, "regate_patch": set(), "model_adapters": set()}
MODELS = ("llama", "llava", "qwen", "gemma", "mistral", "internvl", "internlm", "idefics")

# From the ground up: a room imports from those before it, and the last ones, which users touch, from all.
ROOMS = {
    "regate": [
        "version",
        "errors",
        "config",
        "labels",
        "names",
        "ranks",
        "undisturbed",
        "memory",
        "training",
        "output",
        "pace",
        "proof",
        "teaching",
        "scoring",
        "parts",
        "state",
        "insight",
    ],
    "regate_patch": [
        "errors",
        "transfer",
        "compiling",
        "sharding",
        "ops",
        "attention",
        "attention_visible",
        "context",
        "analysis",
        "passes",
    ],
}
MOST = 8  # files in a room


def _imports(file: Path) -> set[str]:
    """The modules that a file imports, `a.b` for `from a import b` where b is one."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (alias.name for alias in node.names)
            found |= {f"{node.module}.{name}" if _is_module(node.module, name) else node.module for name in names}
    return found


def _is_module(package: str, name: str) -> bool:
    place = ROOT / package.replace(".", "/") / name
    return place.is_dir() or place.with_suffix(".py").exists()


def _room(module: str) -> str | None:
    """`memory` for `regate.memory.keys`; None for the package itself."""
    return module.partition(".")[2].split(".")[0] or None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        packages = {module.split(".")[0] for module in _imports(file)}
        foreign = (packages & set(PACKAGES)) - {package} - PACKAGES[package]
        assert not foreign, f"{file} imports {foreign}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_one_way(package: str) -> None:
    order = {room: i for i, room in enumerate(ROOMS[package])}
    for room, place in order.items():
        folder = ROOT / package / room
        files = list(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        for file in files:
            for module in _imports(file):
                if module.split(".")[0] != package or _room(module) in (None, room):
                    assert module != package, f"{file} imports from the package's front: {module}"
                    continue
                assert order.get(_room(module), len(order)) < place, f"{file} imports {module}, which stands above it"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_small(package: str) -> None:
    for folder in [f for f in (ROOT / package).rglob("*") if f.is_dir() and f.name != "__pycache__"]:
        files = [f.name for f in folder.glob("*.py") if f.name != "__init__.py"]
        assert files, folder
        assert len(files) <= MOST, f"{folder.name} holds {len(files)} files: {files}"


def test_the_engine_names_no_model() -> None:
    for file in (ROOT / "regate_patch").rglob("*.py"):
        text = file.read_text().lower()
        assert not [m for m in MODELS if m in text], file


def test_behaviour_has_one_place() -> None:
    """The table of CONTRIBUTING.md: each name is defined in the file that it says, and in no other."""
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| `([^`]+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(rows) == 10
    for name, place in rows:
        home = {
            str(f.relative_to(ROOT))
            for package in PACKAGES
            for f in (ROOT / package).rglob("*.py")
            if _defines(f, name)
        }
        assert home == {place}, (name, home)


def _defines(file: Path, name: str) -> bool:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return True
    return False
