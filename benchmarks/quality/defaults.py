"""The defaults that follow: each setting of `regate.Config`, what was tried in its place, and why it is as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import regate
from benchmarks.quality import analysis
from benchmarks.quality.analysis import Part
from benchmarks.quality.markdown import shown, table
from benchmarks.quality.summary import FEW, TASKS


@dataclass(frozen=True)
class Choice:
    """Settings of `regate.Config`, and arms that have others.

    Attributes:
        settings: their names.
        others: arms that differ from `base` by these alone.
        why: the settings are as they are, in words.
        base: the default, or what it was until the batch had a budget.
    """

    settings: tuple[str, ...]
    others: tuple[str, ...]
    why: str
    base: str = "sample"


CHOICES = (
    Choice(("selection",), ("random",), "the score is what the method is", base="regate"),
    Choice(
        ("budget",), ("sample",),
        "ahead on drawings and behind nowhere, for a few positions less; little of a batch's budget goes to samples "
        "that are learnt",
        base="regate",
    ),
    Choice(
        ("reference_weight",), ("untaught",),
        "without a teacher one stuck seed of five fell behind, and the others did not; it is the setting where the "
        "teacher's reading of each text is too dear",
        base="regate",
    ),
    Choice(
        ("schedule",), ("cycled",),
        "never behind, ahead on photographs, and no step is full: the peak of memory falls with the average",
    ),
    Choice(
        ("alignment",), ("paper-interleaved",),
        "the paper's alone fell behind dense in cycles, and makes kept words look harder than they are; with full "
        "samples in every step it is not told apart, and costs less: take it where seconds count",
    ),
    Choice(
        ("student_weight", "reference_weight"), ("student", "reference", "equal"),
        "the paper's; none is told apart from it here, where a word needs the image or not by what it is",
    ),
    Choice(("keep",), ("sample25", "sample75"), "the paper's; a quarter costs less, and has less to spare"),
    Choice(("explore",), ("explore",), "the paper's; a share at random won in one stuck seed, and nothing elsewhere"),
    Choice(("full_steps",), ("full2", "full8"), "the paper's share; more and fewer differ in one stuck seed alone"),
    Choice(("final_full_steps",), ("lastfull",), "full samples in every step leave nothing for the end to mend"),
    Choice(("elided",), ("visible",), "needs fused attention, and costs keys and values of every position"),
    Choice(("guard",), ("guarded",), "it never opened"),
    Choice(("visual_keep",), ("visual25-visible",), "not exact; a choice for those whose answers are a small share"),
)  # fmt: skip


def section(found: dict[str, dict[str, Any]], part: Part) -> str:
    """Each choice's base minus each other arm on grounded words, by task."""
    default, paper = regate.Config(), regate.Config.paper()
    tasks = [name for name in TASKS if name in found]
    rows = [["setting", "default", "the paper's", "difference", *tasks, "so"]]
    grounded = analysis.final("grounded", part)
    for choice in CHOICES:
        values = [", ".join(_said(getattr(config, name)) for name in choice.settings) for config in (default, paper)]
        head = [", ".join(f"`{name}`" for name in choice.settings), *values]
        so = choice.why
        for other in choice.others:
            cells = []
            for task in tasks:
                difference = analysis.paired(found[task]["runs"], choice.base, grounded, base=other)
                told = difference is not None and len(difference.by_seed) >= FEW
                cells.append(f"{shown(difference)}, {len(difference.by_seed)} seeds" if difference and told else "")
            if any(cells):
                rows.append([*head, f"{choice.base} - {other}", *cells, so])
                head, so = ["", "", ""], ""
    told = (
        "The default minus what was tried in its place, points of grounded words, paired by seed: positive speaks for "
        "the default. Most was tried while a share of each sample was kept (`sample`), the default of then."
    )
    return f"## The defaults that follow\n\n{told}\n\n{table(rows)}"


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
