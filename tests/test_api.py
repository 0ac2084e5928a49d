"""`docs/api.md` names everything that the packages export, as they are now."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
api = runpy.run_path(str(ROOT / "docs" / "api.py"))
PAGE = (ROOT / "docs" / "api.md").read_text()
TABLE = [line for line in PAGE.splitlines() if line.startswith("| `")]


def test_the_page_is_fresh() -> None:
    assert api["page"]() == PAGE, "run `python docs/api.py`"


@pytest.mark.parametrize("package", ["regate", "regate_patch", "model_adapters"])
def test_every_exported_name_has_a_place(package: str) -> None:
    for name in importlib.import_module(package).__all__:
        rows = [line for line in TABLE if f"`{package}.{name}`" in line.split(" | ")[0]]
        assert len(rows) == 1, name
        where = rows[0].split("`")[-2]
        assert (ROOT / where).is_file()
        assert name in (ROOT / where).read_text()


def test_it_fits_on_a_screen() -> None:
    assert len(PAGE.splitlines()) <= 50


def test_a_name_without_words_is_an_error() -> None:
    with pytest.raises(ValueError, match="no docstring"):
        api["first_sentence"]("")
    with pytest.raises(LookupError, match="no statement of it makes or imports"):
        api["defined"](importlib.import_module("regate"), "nothing")
