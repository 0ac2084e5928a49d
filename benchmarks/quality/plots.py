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

COLOURS = {
    "dense": "#4a4a4a", "exact": "#8d99ae", "regate": "#0b7a75", "paper": "#5fb3ae", "random": "#d1495b",
    "student": "#6a4c93", "reweighted": "#edae49", "cycled": "#c97b9a",
}  # fmt: skip
_OTHER = "#b08968"


def draw(result: dict[str, Any], path: Path, part: Part) -> None:
    """Mean curves by answer tokens and by seconds, and differences to dense by seed."""
    runs: list[Record] = result["runs"]
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]
    style = {"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False, "font.size": 8}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), dpi=90, layout="constrained")
        for panel, cost, label in zip(axes, ("answer_tokens", "all_seconds"), _LABELS, strict=False):
            for arm in arms:
                curves = [analysis.curve(run, cost) for run in runs if run["arm"] == arm]
                x, y = (np.mean([c[i] for c in curves], 0) for i in (0, 1))
                panel.plot(x, 100 * y, color=COLOURS.get(arm, _OTHER), lw=1.6, marker="o", ms=2.5, label=arm)
            panel.set_xlabel(label)
            panel.grid(alpha=0.25)
        axes[0].set_ylabel("validation accuracy on grounded words, %")
        axes[0].legend(frameon=False)
        _differences(axes[2], runs, [arm for arm in arms if arm != "dense"], part)
        figure.savefig(path)
        plt.close(figure)


_LABELS = ("answer tokens computed", "processor seconds, teacher included")


def _differences(panel: Any, runs: list[Record], arms: list[str], part: Part) -> None:
    """A dot per seed, a bar from end to end of the interval."""
    grounded = analysis.final("grounded", part)
    shown = [(arm, found) for arm in arms if (found := analysis.paired(runs, arm, grounded))]
    for place, (arm, found) in enumerate(reversed(shown)):
        colour = COLOURS.get(arm, _OTHER)
        panel.plot([100 * found.low, 100 * found.high], [place] * 2, color=colour, lw=5, alpha=0.3)
        panel.plot([100 * x for x in found.by_seed.values()], [place] * len(found.by_seed), "o", color=colour, ms=4)
    panel.axvline(0, color="#999999", lw=1)
    panel.set_yticks(range(len(shown)), [arm for arm, _ in reversed(shown)])
    panel.set_xlabel(f"grounded words ({part}) minus dense, points; dots are seeds")
