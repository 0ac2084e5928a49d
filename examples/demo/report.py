"""The demo's table and picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_COLOURS = {"dense": "#555555", "regate": "#0b7a75", "random": "#d1495b"}
_KEPT, _ELIDED = "#0b7a75", "#b8b8b8"


def table(results: dict[str, Any]) -> str:
    """Columns: one per arm. Plain text."""
    arms, steps = results["arms"], results["steps_seconds"]
    dense = arms.get("dense")
    rows: list[tuple[str, Any]] = [
        ("held-out loss", lambda a: f"{a['final']['loss']:.3f}"),
        ("accuracy, grounded words", lambda a: _percent(a["final"]["grounded_accuracy"])),
        ("accuracy, template words", lambda a: _percent(a["final"]["template_accuracy"])),
        ("whole caption right, free-running", lambda a: _percent(a["final"]["exact_match"])),
        ("answer tokens computed", lambda a: _share(a, dense, "answer_tokens")),
        ("decoder positions computed", lambda a: _share(a, dense, "positions")),
        ("training seconds (this machine, noisy)", lambda a: f"{a['seconds']:.0f}"),
        ("teacher seconds", lambda a: f"{a['report'].get('teacher_seconds', 0):.1f}"),
        ("gating seconds", lambda a: f"{a['report'].get('gate_seconds', 0):.1f}"),
    ]
    lines = [f"{'':40}" + "".join(f"{name:>18}" for name in arms)]
    lines += [f"{label:40}" + "".join(f"{show(a):>18}" for a in arms.values()) for label, show in rows]
    lines += [
        "",
        f"one step, in turns on one batch:  dense {steps['dense']:.3f} s, full {steps['full']:.3f} s, "
        f"sparse {steps['sparse']:.3f} s",
        f"dense / sparse: measured {steps['ratio_measured']:.2f}x, possible by decoder and head FLOPs "
        f"{steps['ratio_possible']:.2f}x",
        f"before training, grounded words: {_percent(results['base']['grounded_accuracy'])} "
        "(what the text alone gives)",
    ]
    return "\n".join(lines)


def _percent(x: float) -> str:
    return "-" if math.isnan(x) else f"{100 * x:.1f}%"


def _share(arm: dict[str, Any], dense: dict[str, Any] | None, name: str) -> str:
    value = arm["final"][name]
    return f"{value:,} ({value / dense['final'][name]:.0%})" if dense else f"{value:,}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: accuracy on grounded words against answer tokens computed. Right: answers, kept and elided."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13, 5), dpi=130)
    grid = figure.add_gridspec(1, 2, width_ratios=[1, 1.35], wspace=0.12)
    axes = figure.add_subplot(grid[0])
    for name, arm in results["arms"].items():
        x = [point["answer_tokens"] / 1000 for point in arm["curve"]]
        y = [_metric(point) for point in arm["curve"]]
        axes.plot(x, y, marker="o", ms=4, lw=2, color=_COLOURS[name], label=name)
        axes.annotate(name, (x[-1], y[-1]), (6, 0), textcoords="offset points", va="center",
                      color=_COLOURS[name], weight="bold")  # fmt: skip
    grounded = any(
        not math.isnan(p["grounded_accuracy"]) for a in results["arms"].values() for p in a["curve"]
    )
    axes.set_xlabel("answer tokens computed (thousands)")
    axes.set_title(f"Held-out accuracy on {'words that need the image' if grounded else 'answer tokens'}",
                   loc="left", fontsize=11)  # fmt: skip
    axes.grid(alpha=0.25)
    axes.margins(x=0.14)
    gated = results["arms"].get("regate") or next(iter(results["arms"].values()))
    _draw_samples(figure, figure.add_subplot(grid[1]), gated["samples"])
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _metric(point: dict[str, float]) -> float:
    return (
        point["template_accuracy"] if math.isnan(point["grounded_accuracy"]) else point["grounded_accuracy"]
    )


def _draw_samples(figure: Any, axes: Any, samples: list[dict[str, Any]]) -> None:
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_title("What a sparse step computes", loc="left", fontsize=11)
    axes.text(0.55, 1.02, "kept", color=_KEPT, weight="bold", transform=axes.transAxes)
    axes.text(0.63, 1.02, "elided", color=_ELIDED, transform=axes.transAxes)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    height = 1 / max(len(samples), 1)
    for i, sample in enumerate(samples):
        top = 1 - i * height
        picture = axes.inset_axes([0, top - 0.85 * height, 0.15, 0.78 * height])
        picture.imshow(sample["image"])
        picture.set_xticks([])
        picture.set_yticks([])
        x, y = 0.18, top - 0.2 * height
        for word, kept in zip(sample["words"], sample["kept"], strict=True):
            text = axes.text(x, y, word, fontsize=10, color=_KEPT if kept else _ELIDED,
                             weight="bold" if kept else "normal")  # fmt: skip
            box = text.get_window_extent(renderer).transformed(axes.transData.inverted())
            if box.x1 > 1:
                x, y = 0.18, y - 0.22 * height
                text.set_position((x, y))
                x += box.width + 0.012
            else:
                x = box.x1 + 0.012
