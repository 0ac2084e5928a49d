"""docs/engine.md shows what the engine does today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs" / "engine.py"


def test_the_page_is_what_the_command_prints() -> None:
    spec = importlib.util.spec_from_file_location("engine_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "attend(" in module.printed()
    assert module.page() == module.PAGE.read_text(), "python docs/engine.py --write"
