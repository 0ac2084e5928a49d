"""Figures and tables of the page as text."""

from __future__ import annotations

from benchmarks.quality.analysis import Difference


def table(rows: list[list[str]]) -> str:
    """The first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def percent(x: float) -> str:
    """0.5 is 50.0%."""
    return f"{100 * x:.1f}%"


def shown(found: Difference | None, scale: int = 100) -> str:
    """A mean difference and its interval, in points (`scale` 100) or as it is (1)."""
    if found is None:
        return ""
    digits = 1 if scale > 1 else 4
    mean, low, high = (f"{scale * x:+.{digits}f}" for x in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]" if len(found.by_seed) > 1 else mean
