"""One task in full, `docs/evidence/TASK.md`: every arm's accuracy, cost and choices, and what holds of them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable
from statistics import mean, median
from typing import Any

from benchmarks.quality import analysis
from benchmarks.quality.analysis import Part, Record
from benchmarks.quality.arms import ARMS
from benchmarks.quality.findings import against_dense, comparisons
from benchmarks.quality.markdown import percent, shown, table
from benchmarks.quality.summary import FEW

NOTES = {
    "captions": "Which of two templates an answer follows is not told, so that about half of the whole answers can be "
    "right. Seeds from 10 on were made on another machine.",
    "clips": "Seeds from 10 on were made on another machine.",
    "photos-early": "The parts were linked by {settings[link_steps]} steps on other pictures, each seed's own. That "
    "is not enough for all: dense training ends anywhere between 48% and 88%, and where an arm gets is luck, too.",
    "photos": "Seeds start in turn from {settings[starts]} models, whose parts were linked by {settings[link_steps]} "
    "steps on other pictures, as one fine-tunes a model that sees: else a run's accuracy would tell when it left its "
    "first plateau, which is luck. So seeds are orders of the data more than they are models. Seeds from 12 on start "
    "from three others, made on another machine.",
}


def page(name: str, result: dict[str, Any], part: Part) -> str:
    """The task's own page, its tables on `part`."""
    runs = result["runs"]
    arms = told(runs)
    parts = [
        f"# {name.capitalize()}", about(name, result), f"![Accuracy over cost: {name}]({name}.png)",
        f"## Quality on {part} samples", quality(runs, arms, part), _arrived(runs),
        _fallen(runs, arms), _guarded(runs, arms),
        "Minus dense, paired by seed:", differences(runs, arms, part),
        "## Cost", "Shares of dense, means over seeds:", costs(runs, arms), _reaching(runs, arms),
        "## What the gate keeps", _calibration(runs, arms), _context(runs, arms),
        "## What holds", "\n".join(filter(None, [against_dense(runs, arms, part), comparisons(runs, arms, part)])),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def told(runs: list[Record]) -> list[str]:
    """The arms with enough seeds to tell of."""
    seeds = Counter(run["arm"] for run in runs)
    return [arm for arm in ARMS if seeds[arm] >= min(FEW, seeds["dense"] or 1)]


def about(name: str, result: dict[str, Any]) -> str:
    """The task, how it is trained, and what made the records."""
    settings, made = result["settings"], result["made"][0]
    devices = {m["device"].get("gpu", m["device"]["cpu"]) for m in result["made"]}
    schedule = settings["schedule"]
    text = (
        f"{result['source']}. {settings['steps']} steps of {settings['batch_size']} samples, AdamW, learning rate "
        f"{settings['lr']:g} falling to 0; {schedule['warmup']} steps of warm-up, then {schedule['full_steps']} full "
        f"steps in each cycle of {schedule['cycle']}, or that share of samples full in each step. torch "
        f"{made['torch']}, transformers {made['transformers']}, {' and '.join(sorted(devices))}, commit "
        f"{', '.join(sorted({m['commit'][:9] for m in result['made']}))}."
    )
    text = " ".join([text, NOTES.get(name, "").format(settings=settings)]).strip()
    return textwrap.fill(text, 120)


Column = tuple[str, Callable[[Record], float], Callable[[float], str]]


_HEADS = {"grounded": "grounded words", "other": "other words", "free_running": "whole answer", "loss": "loss"}


def _measures(part: Part) -> list[str]:
    """Answers were generated for test samples only."""
    return [name for name in _HEADS if part == "test" or name != "free_running"]


def _columns(part: Part) -> list[Column]:
    """Columns; the controls are on validation samples always."""
    shown = {name: "{:.4f}".format if name == "loss" else percent for name in _HEADS}
    return [
        *((_HEADS[name], analysis.final(name, part), shown[name]) for name in _measures(part)),
        ("grounded, blank input (validation)", lambda run: run["final"]["blank"]["grounded"], percent),
        ("grounded, another's input (validation)", lambda run: run["final"]["shuffled"]["grounded"], percent),
    ]


def quality(runs: list[Record], arms: list[str], part: Part) -> str:
    """Means over each arm's seeds, beside dense's grounded words over the same seeds."""
    columns, grounded = _columns(part), analysis.final("grounded", part)
    dense = {run["seed"]: grounded(run) for run in runs if run["arm"] == "dense"}
    rows = [["arm", "", "seeds", "dense's grounded words, same seeds", *(label for label, _, _ in columns)]]
    for arm in arms:
        some = [run for run in runs if run["arm"] == arm]
        cells = [show(mean(map(measure, some))) for _, measure, show in columns]
        beside = [dense[run["seed"]] for run in some if run["seed"] in dense]
        rows.append([arm, ARMS[arm].told, str(len(some)), percent(mean(beside)) if beside else "", *cells])
    return table(rows)


def _arrived(runs: list[Record]) -> str:
    """Had dense training learnt what it would? Where it had not, luck decides how far another is at the same time."""
    told = []
    for seed, run in sorted((run["seed"], run) for run in runs if run["arm"] == "dense"):
        first, last = (run["curve"][i]["grounded"] for i in (0, -1))
        told.append(f"{seed}: {percent(first)}, {percent(last)} ({100 * last * analysis.late(run):+.0f})")
    return (
        textwrap.fill(
            "Dense before its first step and after its last by seed, and in brackets what it still learnt in the last "
            f"quarter of the run, on the validation samples that are looked at while training: {'; '.join(told)}.",
            120,
        )
        if told
        else ""
    )


def _fallen(runs: list[Record], arms: list[str]) -> str:
    """Were words forgotten that sparse steps leave out?"""
    falls = {arm: [analysis.fall(run) for run in runs if run["arm"] == arm] for arm in arms}
    told = [f"{arm} {100 * max(found):.1f} ({100 * mean(found):.1f})" for arm, found in falls.items()]
    return textwrap.fill(
        "Other words on the way: by how many points they fell below what they had been, in the worst seed (and on "
        f"average): {', '.join(told)}.", 120,
    )  # fmt: skip


def _guarded(runs: list[Record], arms: list[str]) -> str:
    """How often a guard made steps full."""
    told = []
    for arm in arms:
        found = [
            run["report"]["steps_guarded"] for run in runs if run["arm"] == arm and "steps_guarded" in run["report"]
        ]
        if (ARMS[arm].config or {}).get("guard") and found:
            told.append(f"{arm} {', '.join(map(str, found))}")
    return textwrap.fill(f"Steps that the guard made full, by seed: {'; '.join(told)}.", 120) if told else ""


def differences(runs: list[Record], arms: list[str], part: Part) -> str:
    """Points of accuracy; loss as it is."""
    measures = _measures(part)
    rows = [["arm", "seeds", *(_HEADS[name] for name in measures), "grounded, by seed"]]
    for arm in arms:
        found = {name: analysis.paired(runs, arm, analysis.final(name, part)) for name in measures}
        grounded = found["grounded"]
        if arm == "dense" or grounded is None:
            continue
        cells = [shown(found[name], 100 if name != "loss" else 1) for name in measures]
        by_seed = " ".join(f"{100 * x:+.1f}" for x in grounded.by_seed.values())
        rows.append([arm, str(len(grounded.by_seed)), *cells, by_seed])
    return table(rows)


COSTS = {
    "answer_tokens": "answer tokens learnt from", "positions": "positions", "flops": "FLOPs of decoder and head",
    "all_seconds": "seconds",
}  # fmt: skip


def costs(runs: list[Record], arms: list[str]) -> str:
    """Means over the seeds that dense has, too."""
    rows = [["arm", *COSTS.values(), "of them the teacher's"]]
    dense = {run["seed"]: run for run in runs if run["arm"] == "dense"}
    for arm in arms:
        some = [run for run in runs if run["arm"] == arm and run["seed"] in dense]
        if not some:
            continue
        shares = [mean(cost(r) / cost(dense[r["seed"]]) for r in some) for cost in map(analysis.spent, COSTS)]
        seconds = analysis.spent("all_seconds")
        shares.append(mean(r["curve"][-1]["teacher_seconds"] / seconds(dense[r["seed"]]) for r in some))
        rows.append([arm, *(f"{share:.0%}" for share in shares)])
    return table(rows)


def _reaching(runs: list[Record], arms: list[str]) -> str:
    """Cost of 98% of dense's final accuracy on grounded words."""
    on_the_way = ("mean accuracy on the way, by tokens", "so ahead of dense", "by seconds", "by seconds ahead of dense")
    rows = [["arm", "reached", *COSTS.values(), *on_the_way]]
    for arm in arms:
        found = {cost: analysis.reached(runs, arm, cost, of_final=0.98) for cost in COSTS}
        tokens = found["answer_tokens"]
        if not tokens.seeds:
            continue
        shares = [f"{median(x.shares.values()):.0%}" if x.shares else "" for x in found.values()]
        ways = [
            x
            for cost in ("answer_tokens", "all_seconds")
            for x in (percent(mean(analysis.areas(runs, arm, cost).values())), _ahead(runs, arm, cost))
        ]
        rows.append([arm, f"{len(tokens.shares)} of {tokens.seeds}", *shares, *ways])
    told = (
        "Where 98% of dense's last validation accuracy on grounded words was reached, as a share of dense's whole cost "
        "(median of the seeds that did, of those that begin below it), and the mean accuracy on the way to what the "
        "cheapest arm spent in all; in how many seeds an arm is ahead of dense on the way to what the cheaper of the "
        "two spent:"
    )
    return f"{textwrap.fill(told, 120)}\n\n{table(rows)}"


def _ahead(runs: list[Record], arm: str, cost: str) -> str:
    found = analysis.ahead(runs, arm, cost)
    return "" if arm == "dense" else f"{sum(found.values())} of {len(found)}"


def _calibration(runs: list[Record], arms: list[str]) -> str:
    """Means over seeds, of each quarter of a run that had sparse steps."""
    rows = [["arm", *(f"quarter {i + 1}" for i in range(4))]]
    for arm in arms:
        some = [run for run in runs if run["arm"] == arm and run["calibration"]]
        if not some:
            continue
        cells = []
        for quarter in range(4):
            found = [q for run in some for q in run["calibration"] if q["quarter"] == quarter]
            shown = [f"{mean(q[name] for q in found):.0%}" for name in ("precision", "recall")] if found else []
            cells.append(" / ".join(shown))
        rows.append([arm, *cells])
    told = "Precision / recall on sparse steps: kept words that are grounded, grounded words that are kept."
    return f"{told}\n\n{table(rows)}"


def _context(runs: list[Record], arms: list[str]) -> str:
    """Losses of kept words, means over the seeds that measured them."""
    rows = [["arm", "seeds", *(f"{part}, {words}" for part in ("train", "validation") for words in ("sparse", "full"))]]
    for arm in arms:
        some = [run["context"] for run in runs if run["arm"] == arm and run.get("context")]
        if some:
            means = [
                mean(c[part][words] for c in some) for part in ("train", "validation") for words in ("sparse", "full")
            ]
            rows.append([arm, str(len(some)), *(f"{x:.4f}" for x in means)])
    if len(rows) == 1:
        return ""
    told = (
        "After the last step, the mean loss of the words that a sparse step keeps: without the elided words before "
        "them (as the step learns and remembers it), and with all words, as at inference:"
    )
    return f"{textwrap.fill(told, 120)}\n\n{table(rows)}"
