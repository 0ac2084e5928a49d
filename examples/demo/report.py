"""The demo's table and picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from PIL import Image

_COLOURS = {"dense": "#4a4a4a", "exact": "#8d99ae", "regate": "#0b7a75", "random": "#d1495b"}
_NAMES = {"dense": "dense", "exact": "exact mode", "regate": "ReGATE", "random": "random gate"}
_KEPT, _ELIDED = "#0b7a75", "#b3b3b3"

ArmResult = dict[str, Any]


def table(results: dict[str, Any]) -> str:
    """Columns: one per arm, means over the seeds. Plain text."""
    runs, steps = results["runs"], results["step_timing"]
    columns = {name: [run["arms"][name] for run in runs] for name in runs[0]["arms"]}
    dense = columns.get("dense")
    marked = not math.isnan(runs[0]["base"]["grounded_accuracy"])  # words known to need the image

    def final(key: str, show: Callable[[float], str]) -> Callable[[list[ArmResult]], str]:
        return lambda arms: _spread([a["final"][key] for a in arms], show)

    def share(key: str) -> Callable[[list[ArmResult]], str]:
        def show(arms: list[ArmResult]) -> str:
            count = mean(a["final"][key] for a in arms)
            return f"{count:,.0f}" + (f" ({count / mean(a['final'][key] for a in dense):.0%})" if dense else "")

        return show

    def seconds(kind: str) -> Callable[[list[ArmResult]], str]:
        def show(arms: list[ArmResult]) -> str:
            values = [s for a in arms for s in a["seconds"][kind]]
            return f"{median(values):.3f}" if values else "-"

        return show

    def spent(key: str) -> Callable[[list[ArmResult]], str]:
        return lambda arms: f"{mean(a['report'].get(key, 0) for a in arms):.1f}"

    rows = [
        ("test loss", final("loss", "{:.3f}".format)),
        ("test accuracy, words that need the image", final("grounded_accuracy", _percent)),
        (
            f"test accuracy, {'other words' if marked else 'answer tokens'}",
            final("template_accuracy", _percent),
        ),
        ("whole caption right, free-running", final("exact_match", _percent)),
        ("answer tokens computed", share("answer_tokens")),
        ("decoder positions computed", share("positions")),
        ("seconds of training, teacher included", share("seconds")),
        ("seconds per full step, median", seconds("full")),
        ("seconds per sparse step, median", seconds("sparse")),
        ("teacher seconds, whole run", spent("teacher_seconds")),
        ("gating seconds, whole run", spent("gate_seconds")),
    ]
    base = _spread([run["base"]["grounded_accuracy"] for run in runs], _percent)
    lines = ["", f"{'':42}" + "".join(f"{_NAMES[name]:>20}" for name in columns)]
    lines += [f"{label:42}" + "".join(f"{show(arms):>20}" for arms in columns.values()) for label, show in rows]
    lines += [
        "",
        f"before training, words that need the image: {base} (what the text alone gives)",
        f"one step, in turns on one batch: dense {steps['dense']:.3f} s, full {steps['full']:.3f} s, "
        f"sparse {steps['sparse']:.3f} s",
        f"dense / sparse: measured {steps['ratio_measured']:.2f}x, possible by decoder and head FLOPs "
        f"{steps['ratio_possible']:.2f}x; full / sparse: {steps['ratio_elision']:.2f}x",
        f"{len(runs)} seed(s); {results['device']}; {results['data']}",
    ]
    if len(runs) < 10:
        lines.append(
            "Seeds differ more than arms do; docs/evidence.md compares arms over many seeds of the small model."
        )
    return "\n".join(lines)


def _spread(values: list[float], show: Callable[[float], str]) -> str:
    """Mean, and with several seeds the standard deviation."""
    return show(mean(values)) + (f" ± {show(stdev(values))}" if len(values) > 1 else "")


def _percent(x: float) -> str:
    return "-" if math.isnan(x) else f"{100 * x:.1f}%"


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy on grounded words over seconds and over answer tokens computed; beside it answers, kept and elided."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = results["runs"]
    style = {"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(17, 5.2), dpi=120)
        grid = figure.add_gridspec(1, 3, width_ratios=[1, 1, 1.4], wspace=0.2)
        by_time = figure.add_subplot(grid[0])
        _draw_curves(by_time, runs, "seconds", 1, "seconds of training, teacher included")
        beside = figure.add_subplot(grid[1], sharey=by_time)
        beside.tick_params(labelleft=False)
        _draw_curves(beside, runs, "answer_tokens", 1000, "answer tokens computed, thousands")
        arms = runs[0]["arms"]
        chosen = next((a for a in ("regate", "random") if a in arms), None)
        if chosen:
            _draw_samples(figure, grid[2], arms[chosen]["samples"], _NAMES[chosen])
        note = textwrap.shorten(f"{results['data']}. {len(runs)} seed(s), {results['device']}.", 160)
        figure.text(0.125, -0.03, note, fontsize=8.5, color="#777777")
        figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
        plt.close(figure)


def _draw_curves(axes: Any, runs: list[dict[str, Any]], cost: str, unit: float, label: str) -> None:
    grounded = not math.isnan(runs[0]["base"]["grounded_accuracy"])
    key = "grounded_accuracy" if grounded else "template_accuracy"
    for name in runs[0]["arms"]:
        points = list(zip(*(run["arms"][name]["curve"] for run in runs), strict=True))
        x = [mean(p[cost] for p in point) / unit for point in points]
        seeds = [[100 * p[key] for p in point] for point in points]
        y = [mean(values) for values in seeds]
        axes.plot(x, y, marker="o", ms=4, lw=2, color=_COLOURS[name], label=_NAMES[name])
        if len(runs) > 1:
            axes.fill_between(x, [min(v) for v in seeds], [max(v) for v in seeds], color=_COLOURS[name],
                              alpha=0.13, lw=0)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("validation accuracy, %")
    axes.set_title("Words that need the image" if grounded else "Answer tokens", loc="left", weight="bold",
                   fontsize=12)  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")


def _draw_samples(figure: Any, cell: Any, samples: list[dict[str, Any]], arm: str) -> None:
    rows = cell.subgridspec(len(samples), 2, width_ratios=[1, 5.6], wspace=0.05, hspace=0.25)
    for i, sample in enumerate(samples):
        picture, text = figure.add_subplot(rows[i, 0]), figure.add_subplot(rows[i, 1])
        image = sample["image"]
        picture.imshow(image if isinstance(image, Image.Image) else Image.open(image).convert("RGB"))
        picture.set(xticks=[], yticks=[])
        picture.spines[:].set(visible=True, color="#cccccc")
        text.axis("off")
        if i == 0:
            picture.set_title(f"What a sparse step computes: {arm}", loc="left", weight="bold", fontsize=12)
            legend = {"fontsize": 12, "ha": "right", "va": "bottom", "transform": text.transAxes}
            text.text(0.865, 1.05, "kept", color=_KEPT, weight="bold", **legend)
            text.text(1.0, 1.05, "elided", color=_ELIDED, **legend)
        _write(figure, text, sample["words"][:60], sample["kept"][:60])


def _write(figure: Any, axes: Any, words: list[str], kept: list[bool]) -> None:
    """Words in lines, as wide as the axes."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    renderer = figure.canvas.get_renderer()
    x, y, space, line = 0.0, 0.86, 0.013, 0.27
    for word, keep in zip(words, kept, strict=True):
        style = {"color": _KEPT, "weight": "bold"} if keep else {"color": _ELIDED}
        text = axes.text(x, y, word.replace("$", r"\$"), fontsize=10.5, va="center", **style)
        width = text.get_window_extent(renderer).transformed(axes.transData.inverted()).width
        if x + width > 1:
            x, y = 0.0, y - line
            text.set_position((x, y))
        x += width + space
