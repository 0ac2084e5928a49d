"""Pictures of a task: accuracy over cost, and paired differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.quality import analysis
from benchmarks.quality.analysis import Part, Record
from benchmarks.quality.arms import ARMS
from benchmarks.quality.summary import ENOUGH

# Arms whose curves are drawn, over the seeds that all of them ran: means over others say nothing beside.
CURVES = {
    "dense": "#4a4a4a", "exact": "#9aa5b8", "regate": "#0b7a75", "sample": "#6cc3bd", "random": "#d1495b",
    "reweighted": "#edae49", "visual25-visible": "#6a4c93",
}  # fmt: skip
_OTHER = "#b08968"
_FEW = 5  # seeds, below which an arm's differences are in the tables alone
_LABELS = {
    "answer_tokens": "answer tokens learnt from, thousands",
    "all_seconds": "seconds in dense steps, teacher included",
}


def draw(result: dict[str, Any], path: Path, part: Part) -> None:
    """Mean curves by answer tokens and by seconds, and differences to dense by seed."""
    runs: list[Record] = result["runs"]
    style = {"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False, "font.size": 8}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), dpi=100, layout="constrained")
        for panel, cost in zip(axes, _LABELS, strict=False):
            _curves(panel, runs, cost)
        axes[0].set_ylabel("validation accuracy on words that need the image, %")
        axes[1].legend(frameon=False, loc="lower right")
        _differences(axes[2], runs, part)
        figure.savefig(path)
        plt.close(figure)


def _curves(panel: Any, runs: list[Record], cost: str) -> None:
    ran = {arm: {run["seed"] for run in runs if run["arm"] == arm} for arm in CURVES}
    ours = ran["regate"] or ran["dense"]
    drawn = {arm: seeds for arm, seeds in ran.items() if ours and len(seeds & ours) >= min(ENOUGH, len(ours))}
    shared = set.intersection(*drawn.values()) if drawn else set()
    for arm in drawn if shared else ():
        colour = CURVES[arm]
        curves = [analysis.curve(run, cost) for run in runs if run["arm"] == arm and run["seed"] in shared]
        x, y = (np.mean([c[i] for c in curves], 0) for i in (0, 1))
        first = arm == "regate"
        panel.plot(
            x / (1000 if cost == "answer_tokens" else 1), 100 * y, color=colour, lw=2.4 if first else 1.4, marker="o",
            ms=2.5, label=arm, zorder=3 if first else 2, ls="--" if arm == "exact" else "-",
        )  # fmt: skip
    panel.set_xlabel(_LABELS[cost])
    panel.grid(alpha=0.25)


def _differences(panel: Any, runs: list[Record], part: Part) -> None:
    """A dot per seed, a bar from end to end of the interval."""
    grounded = analysis.final("grounded", part)
    found = {arm: analysis.paired(runs, arm, grounded) for arm in ARMS if arm != "dense"}
    shown = [(arm, difference) for arm, difference in found.items() if difference and len(difference.by_seed) >= _FEW]
    for place, (arm, difference) in enumerate(reversed(shown)):
        colour, points = CURVES.get(arm, _OTHER), [100 * x for x in difference.by_seed.values()]
        panel.plot([100 * difference.low, 100 * difference.high], [place] * 2, color=colour, lw=5, alpha=0.3)
        panel.plot(points, [place] * len(points), "o", color=colour, ms=3)
        panel.plot([100 * difference.mean], [place], "|", color=colour, ms=9, mew=2)
    panel.axvline(0, color="#999999", lw=1)
    panel.set_yticks(range(len(shown)), [arm for arm, _ in reversed(shown)])
    panel.set_xlabel(f"points minus dense ({part}); a dot is a seed")
