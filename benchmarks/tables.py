"""The tables and pictures of `benchmarks/README.md`, made from the figures in `results/`.

python -m benchmarks.tables       # rewrites what stands between markers in README.md, and tables.md, and the pictures
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from benchmarks import scale
from benchmarks.arithmetic import decided
from benchmarks.arms import SPARSE_AFTER_ONE
from benchmarks.gpu import report
from benchmarks.models import SIZES
from benchmarks.workloads import batch, kept_labels
from regate import Config, count_tokens, estimate
from regate.insight.estimate import Sample, build_on_meta

FOLDER = Path(__file__).parent


EFFICIENCIES = ("efficiency", "efficiency_without_adamw")
OTHERS = ("loss masking", "per-layer gather", "random-LTD", "liger", "regate sparse + liger")


def table(result: dict[str, Any], backend: str) -> str:
    """Ratios to the dense step of the same backend; "-" where an arm was refused, or the dense one."""
    others = [arm for arm in OTHERS if any(f"{arm} {backend}" in w["arms"] for w in result["workloads"].values())]
    heads = [
        "V/P/A", "possible", "ReGATE sparse", "efficiency (without AdamW)", "full step", "whole schedule",
        "half the visual tokens (possible)", *others, "positions", "saved activations", "gating",
    ]  # fmt: skip
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, found in result["workloads"].items():
        arms = _of(backend, found)
        full, sparse = (arms.get(f"regate {kind}", {}) for kind in ("full", "sparse"))
        gains = [arm.get("ratio_to_dense") for arm in (full, sparse)]
        thin = arms.get("regate thinned")
        lines.append(
            _row(
                [
                    name,
                    f"{found['possible']['sparse']:.2f}x",
                    _shown(gains[1], "**{:.2f}x**"),
                    "{} ({})".format(*(_shown(sparse.get(name), "{:.2f}") for name in EFFICIENCIES)),
                    _shown(gains[0]),
                    _shown(_schedule(*gains)),
                    f"{_shown(thin.get('ratio_to_dense'))} ({found['possible']['thinned']:.2f}x)" if thin else "",
                    *(_shown(arms[arm].get("ratio_to_dense")) if arm in arms else "" for arm in others),
                    f"{share_computed(result, found):.0%}",
                    _shown(_memory(sparse, arms.get("dense", {})), "{:.0%}"),
                    _shown(sparse.get("gating_share"), "{:.1%}"),
                ]
            )
        )
    return "\n".join(lines)


def strongest(result: dict[str, Any], backend: str) -> str:
    """Gains over the fastest dense step of the same backend; efficiencies are against the arithmetic of a dense step
    that computes valid positions alone, and logits at labels alone. Empty where no such step was timed."""
    peaks = any(arm["peak_bytes"] for found in result["workloads"].values() for arm in found["arms"].values())
    heads = [
        "V/P/A", "strongest dense (over padded)", "possible", "ReGATE sparse", "efficiency", "full step",
        "whole schedule (of arithmetic)", "exact mode (of arithmetic)",
        f"{'peak memory' if peaks else 'saved activations'}, exact and sparse",
    ]  # fmt: skip
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, found in result["workloads"].items():
        arms, possible = _of(backend, found), found["possible"]
        named = next((arm["strongest"] for arm in arms.values() if "strongest" in arm), None)
        if named is None:
            lines.append(_row([name, *[""] * (len(heads) - 1)]))
            continue
        best = arms[named]
        kinds = ("full", "sparse", "exact")
        timed = {kind: arms.get(f"regate {kind}", {}) for kind in kinds}
        gains = {kind: arm.get("ratio_to_strongest") for kind, arm in timed.items()}
        limits = {kind: possible[kind] / possible["unpadded"] for kind in kinds}
        gain, limit = (_schedule(x["full"], x["sparse"]) for x in (gains, limits))
        memory = [_shown(_memory(timed[kind], best), "{:.0%}") for kind in ("exact", "sparse") if timed[kind]]
        exact = f"{_shown(gains['exact'])} ({_shown(_over(gains['exact'], limits['exact']), '{:.2f}')})"
        lines.append(
            _row(
                [
                    name,
                    f"{named} ({_shown(best.get('ratio_to_dense'))})",
                    f"{limits['sparse']:.2f}x",
                    _shown(gains["sparse"], "**{:.2f}x**"),
                    _shown(_over(gains["sparse"], limits["sparse"]), "{:.2f}"),
                    _shown(gains["full"]),
                    f"{_shown(gain)} ({_shown(_over(gain, limit), '{:.2f}')})",
                    exact if timed["exact"] else "",
                    ", ".join(memory),
                ]
            )
        )
    return "\n".join(lines)


def visual(result: dict[str, Any], backend: str) -> str:
    """Gains of steps that leave visual tokens out, over the fastest dense step; in brackets what arithmetic allows. And
    of the whole schedule, over that step and over the padded one. Empty where no such step was timed."""
    kinds = {"thinned": "half, hidden", "half": "half, visible", "quarter": "a quarter, visible"}
    heads = ["V/P/A", *kinds.values(), "whole schedule, a quarter, visible", "over padded dense"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, found in result["workloads"].items():
        arms, possible = _of(backend, found), found["possible"]
        if any(f"regate {kind}" not in arms for kind in kinds):
            continue
        gains = {kind: arms[f"regate {kind}"].get("ratio_to_strongest") for kind in kinds}
        cells = [f"{_shown(gain)} ({possible[kind] / possible['unpadded']:.2f}x)" for kind, gain in gains.items()]
        full, sparse = arms.get("regate full", {}), arms["regate quarter"]
        schedule = [_schedule(full.get(over), sparse.get(over)) for over in ("ratio_to_strongest", "ratio_to_dense")]
        lines.append(_row([name, *cells, *(_shown(gain, "**{:.2f}x**") for gain in schedule)]))
    return "\n".join(lines) if len(lines) > 2 else ""


def mixed(result: dict[str, Any]) -> str:
    """Gains over padded dense training of the same rows, and over the fastest dense way."""
    batches = result["batches"]
    arms = list(dict.fromkeys(arm for found in batches for arm in found["seconds"] if arm != "padded"))
    heads = [
        "rows",
        "padded positions over valid ones",
        *arms,
        "strongest dense",
        "whole schedule over it (of arithmetic)",
    ]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for found in batches:
        seconds = found["seconds"]
        cells = [f"{seconds['padded'] / seconds[arm]:.2f}x" if arm in seconds else "" for arm in arms]
        schedule = ["", ""]
        if "strongest" in found:
            gain, possible = found["schedule_over_strongest"], found["possible"]["schedule"]
            schedule = [found["strongest"], f"**{gain:.2f}x** ({gain / possible:.2f})"]
        lines.append(_row([str(found["rows"]), f"{found['padded_over_valid']:.2f}", *cells, *schedule]))
    return "\n".join(lines)


def _of(backend: str, found: dict[str, Any]) -> dict[str, Any]:
    """A workload's arms of one backend, by name."""
    return {arm.removesuffix(f" {backend}"): x for arm, x in found["arms"].items() if arm.endswith(f" {backend}")}


def _schedule(full: float | None, sparse: float | None) -> float | None:
    """The gain of a whole cycle, from that of its full and of its sparse steps; None if one of them is not known."""
    if full is None or sparse is None:
        return None
    share = Config().full_steps / Config().cycle
    return 1 / (share / full + (1 - share) / sparse)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(number: float | None, form: str = "{:.2f}x") -> str:
    """A cell; "-" where an arm was refused (out of memory, say), or what it would be compared with."""
    return "-" if number is None else form.format(number)


def _over(number: float | None, other: float | None) -> float | None:
    return None if number is None or other is None else number / other


def _memory(arm: dict[str, Any], other: dict[str, Any]) -> float | None:
    """An arm's peak over another's; on a CPU, which does not tell it, what autograd keeps."""
    return _over(*(x.get("peak_bytes") or x.get("saved_bytes") for x in (arm, other)))


def the_batch(result: dict[str, Any], found: dict[str, Any]) -> dict[str, Tensor]:
    """The batch that was timed."""
    return batch(Sample(*found["tokens"]), found["rows"], SIZES[result["settings"]["model"]].vocabulary)


def share_computed(result: dict[str, Any], found: dict[str, Any]) -> float:
    """Positions that a sparse step computes, over those of the padded batch."""
    data = the_batch(result, found)
    return sum(decided(data, kept_labels(data["labels"], SPARSE_AFTER_ONE.keep))["sparse"].computed) / (
        data["labels"].numel()
    )


def predictions(result: dict[str, Any], backend: str) -> str:
    """What `regate estimate` says of the very rows that were timed, beside what was timed."""
    model = build_on_meta(SIZES[result["settings"]["model"]].config())
    lines = ["| V/P/A | predicted, sparse against full | measured | off by |", "|---|---|---|---|"]
    for name, found in result["workloads"].items():
        said = estimate(model, count_tokens(model, [the_batch(result, found)]), SPARSE_AFTER_ONE)
        sparse, full = (found["arms"].get(f"regate {kind} {backend}", {}) for kind in ("sparse", "full"))
        measured = _over(sparse.get("ratio_to_dense"), full.get("ratio_to_dense"))
        predicted = said.sparse / said.full
        off = None if measured is None else measured / predicted - 1
        lines.append(_row([name, _shown(predicted), _shown(measured), _shown(off, "{:+.0%}")]))
    return "\n".join(lines)


def draw(result: dict[str, Any], backend: str, path: Path) -> None:
    names = list(result["workloads"])
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    shown = ("regate sparse", "regate full", "per-layer gather", "random-LTD", "loss masking")
    for i, arm in enumerate(shown):
        values = [_of(backend, found).get(arm, {}).get("ratio_to_dense") for found in result["workloads"].values()]
        if None in values:
            continue
        axes.bar([x + 0.17 * (i - 2) for x in range(len(names))], values, 0.15, label=arm.replace("regate", "ReGATE"))
    for x, found in enumerate(result["workloads"].values()):
        label = "possible (sparse)" if x == 0 else None
        axes.hlines(found["possible"]["sparse"], x - 0.42, x + 0.42, color="black", linewidth=1.2, label=label)
        dense = found["arms"].get(f"dense {backend}", {}).get("seconds")
        if (limit := _over(dense, found.get("roofline_seconds", {}).get("sparse"))) is not None:
            label = "roofline (sparse)" if x == 0 else None
            axes.hlines(limit, x - 0.42, x + 0.42, color="black", linewidth=1.2, linestyle="dotted", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.6)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("visual / prompt / answer tokens per sample")
    axes.set_ylabel("dense step / step")
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    figure.savefig(path, dpi=130)


def compilation(result: dict[str, Any]) -> str:
    lines = [_row(["run", "compilation", "in steps", "graphs", "median step after it"]), _row(["---"] * 5)]
    regate = result["runs"]["regate"]["compile_seconds"]
    for name, found in result["runs"].items():
        ratio = "" if name == "regate" else f" (ReGATE: {regate / found['compile_seconds']:.2f} of it)"
        steps = ", ".join(map(str, found["steps_that_compiled"]))
        lines.append(
            _row(
                [
                    name,
                    f"{found['compile_seconds']:.0f} s{ratio}",
                    steps,
                    str(found["graphs"]),
                    f"{found['median_step_seconds']:.3f} s",
                ]
            )
        )
    return "\n".join(lines)


def teacher(result: dict[str, Any]) -> str:
    lines = [_row(["V/P/A", "of a dense epoch", "cheaper than padded"]), _row(["---"] * 3)]
    for name, found in result["workloads"].items():
        lines.append(_row([name, f"{found['share_of_dense_epoch']:.1%}", f"{found['times_cheaper_than_padded']:.1f}x"]))
    return "\n".join(lines)


def peak(result: dict[str, Any]) -> str:
    """What autograd keeps in the largest step of a cycle, over the dense one; in brackets, what a step allocates."""
    arms = [arm for arm in next(iter(result["workloads"].values()))["arms"] if arm != "dense"]
    lines = [_row(["V/P/A", *arms]), _row(["---"] * (1 + len(arms)))]
    for name, found in result["workloads"].items():
        cells = [found["arms"].get(arm) for arm in arms]
        shown = [f"{x['of_dense_saved']:.2f} ({x['of_dense_allocated']:.2f})" if x else "" for x in cells]
        lines.append(_row([name, *shown]))
    return "\n".join(lines)


def roofline(result: dict[str, Any], backend: str) -> str:
    """How near steps come to the least time that the device needs for their arithmetic; empty where it is not known."""
    rows = {name: _of(backend, found) for name, found in result["workloads"].items()}
    shares = {name: {arm: x for arm, x in arms.items() if "roofline_share" in x} for name, arms in rows.items()}
    heads = list(dict.fromkeys(arm for arms in shares.values() for arm in arms))
    lines = [_row(["V/P/A", *heads]), _row(["---"] * (1 + len(heads)))]
    for name, arms in shares.items():
        lines.append(_row([name, *(f"{arms[arm]['roofline_share']:.0%}" if arm in arms else "" for arm in heads)]))
    return "\n".join(lines) if heads else ""


KINDS = {
    "compilation": compilation,
    "teacher": teacher,
    "peak": peak,
    "mixed": mixed,
    "checks": report.checks,
    "starts": report.starts,
}
OF_STEPS = {"": table, "strongest ": strongest, "visual ": visual, "roofline ": roofline, "estimate ": predictions}


def write_all(folder: Path) -> str:
    """Tables of every result in a folder, by the name of what they show; beside them the pictures and `tables.md`."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        files = report.as_files(path.stem, result) if path.stem.startswith("gpu-") else [(path.stem, result)]
        for stem, some in files:
            kind = stem.split("-")[0]
            if kind == "steps":
                for backend in some["settings"]["backends"]:
                    draw(some, backend, folder / f"{stem}-{backend}.png")
                    found |= {f"{what}{stem} {backend}": make(some, backend) for what, make in OF_STEPS.items()}
            elif kind in KINDS:
                found[stem] = KINDS[kind](some)
    found["scale"] = scale.tables(folder)
    text = "\n\n".join(f"<!-- {name} -->\n{lines}\n<!-- end -->" for name, lines in found.items() if lines) + "\n"
    (folder / "tables.md").write_text(text)
    return text


def into(text: str, tables: str) -> str:
    """`text` with what stands between markers taken from `tables`, where both have the marker."""
    for marker, new in re.findall(r"<!-- (.+?) -->\n(.*?)<!-- end -->", tables, flags=re.DOTALL):
        pattern = rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, new=new: f"{m[1]}{new}{m[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    readme = FOLDER / "README.md"
    readme.write_text(into(readme.read_text(), write_all(FOLDER / "results")))


if __name__ == "__main__":
    main()
