"""The tables and the picture of `benchmarks/README.md`, made from the figures in `results/`.

python -m benchmarks.tables          # rewrites what stands between the markers in README.md, and steps-*.png
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.arms import SPARSE_AFTER_ONE, decoder
from benchmarks.workloads import batch
from regate import Config, count_tokens, estimate
from regate.estimate import Sample

FOLDER = Path(__file__).parent


def table(result: dict[str, Any], backend: str) -> str:
    lines = [
        "| V/P/A | possible | ReGATE sparse | efficiency | full step | whole schedule | half the visual tokens "
        "(possible) | loss masking | per-layer gather | saved activations | gating |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    config = Config()
    full_share = config.full_steps / config.cycle
    for name, found in result["workloads"].items():
        arms = {arm: found["arms"][f"{arm} {backend}"] for arm in NAMES}
        seconds = {arm: values["seconds"] for arm, values in arms.items()}
        schedule = full_share * seconds["regate full"] + (1 - full_share) * seconds["regate sparse"]
        thin = found["arms"].get(f"regate thinned {backend}")
        thinned = f"{thin['ratio_to_dense']:.2f}x ({found['possible']['thinned']:.2f}x)" if thin else ""
        saved = arms["regate sparse"]["saved_bytes"] / arms["dense"]["saved_bytes"]
        lines.append(
            f"| {name} | {found['possible']['sparse']:.2f}x | **{arms['regate sparse']['ratio_to_dense']:.2f}x** "
            f"| {arms['regate sparse']['efficiency']:.2f} | {arms['regate full']['ratio_to_dense']:.2f}x "
            f"| {seconds['dense'] / schedule:.2f}x | {thinned} | {arms['loss masking']['ratio_to_dense']:.2f}x "
            f"| {arms['per-layer gather']['ratio_to_dense']:.2f}x | {saved:.0%} "
            f"| {found[f'gating_share_{backend}']:.1%} |"
        )
    return "\n".join(lines)


NAMES = ("dense", "loss masking", "per-layer gather", "regate full", "regate sparse")


def predictions(result: dict[str, Any], backend: str) -> str:
    """What `regate estimate` says of the very rows that were timed, beside what was timed."""
    settings = result["settings"]
    model = decoder(settings["layers"], settings["width"], settings["vocabulary"], device="cpu", dtype=None)
    lines = ["| V/P/A | predicted, sparse against full | measured | off by |", "|---|---|---|---|"]
    for name, found in result["workloads"].items():
        data = batch(Sample(*found["tokens"]), settings["rows"], settings["vocabulary"])
        said = estimate(model.config, count_tokens(model, [data]), SPARSE_AFTER_ONE)
        arms = found["arms"]
        measured = arms[f"regate full {backend}"]["seconds"] / arms[f"regate sparse {backend}"]["seconds"]
        predicted = said.sparse / said.full
        lines.append(f"| {name} | {predicted:.2f}x | {measured:.2f}x | {measured / predicted - 1:+.0%} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], backend: str, path: Path) -> None:
    names = list(result["workloads"])
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    shown = ("regate sparse", "regate full", "per-layer gather", "loss masking")
    for i, arm in enumerate(shown):
        values = [found["arms"][f"{arm} {backend}"]["ratio_to_dense"] for found in result["workloads"].values()]
        axes.bar([x + 0.2 * (i - 1.5) for x in range(len(names))], values, 0.18, label=arm.replace("regate", "ReGATE"))
    for x, found in enumerate(result["workloads"].values()):
        label = "possible (sparse)" if x == 0 else None
        axes.hlines(found["possible"]["sparse"], x - 0.42, x + 0.42, color="black", linewidth=1.2, label=label)
    axes.axhline(1.0, color="grey", linewidth=0.6)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("visual / prompt / answer tokens per sample")
    axes.set_ylabel("dense step / step")
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    figure.savefig(path, dpi=130)


def between(text: str, marker: str, new: str) -> str:
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- end -->)"
    assert re.search(pattern, text, re.DOTALL), f"README.md has no marker {marker}"
    return re.sub(pattern, lambda m: f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    readme = FOLDER / "README.md"
    text = readme.read_text()
    for path in sorted(FOLDER.glob("results/steps-*.json")):
        result = json.loads(path.read_text())
        for backend in result["settings"]["backends"]:
            draw(result, backend, FOLDER / "results" / f"{path.stem}-{backend}.png")
            text = between(text, f"{path.stem} {backend}", table(result, backend))
            text = between(text, f"estimate {path.stem} {backend}", predictions(result, backend))
    readme.write_text(text)


if __name__ == "__main__":
    main()
