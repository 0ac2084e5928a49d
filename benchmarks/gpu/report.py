"""What a part found, for `benchmarks.tables`: figures in the form that other files have, and tables of checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def as_files(stem: str, result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A part's file as those that other benchmarks write, each with its stem, and as what is left of it."""
    merged: dict[str, dict[str, Any]] = {}
    for name, check in result["checks"].items():
        for kind in ("steps", "peak", "compilation"):
            if (found := check.get(kind)) is None:
                continue
            parts = [kind, "gpu", found["settings"]["model"]]
            if kind == "steps":
                parts += _options(found["settings"])
                found = found | {"workloads": _timed(found)}
                if not found["workloads"]:
                    continue
            file = merged.setdefault("-".join(parts), found | {name: result.get(name) for name in ("torch", "device")})
            if kind != "compilation":
                file["workloads"] = file["workloads"] | found["workloads"]
    yield from merged.items()
    starts = [check for check in result["checks"].values() if "start" in check]
    if starts:
        yield f"starts-{stem}", {"starts": starts}
    yield f"checks-{stem}", result


def _options(settings: dict[str, Any]) -> list[str]:
    """That tell one file of steps from another."""
    named = [name for name in ("lora", "checkpointing") if settings[name]]
    return [*(named if settings["lora"] else ["full", *named]), *settings["backends"]]


def _timed(found: dict[str, Any]) -> dict[str, Any]:
    """The workloads of which a gated step was timed, whatever others ran out of memory, say."""
    return {name: w for name, w in found["workloads"].items() if any(arm.startswith("regate") for arm in w["arms"])}


def checks(result: dict[str, Any]) -> str:
    """Each check, and what came of it."""
    lines = ["| check | | gradients off by (plainly computed) | seconds |", "|---|---|---|---|"]
    for name, check in result["checks"].items():
        said = check["status"] + (f": {check['error'].splitlines()[0][:160]}" if check.get("error") else "")
        errors = ""
        if (numbers := check.get("numbers")) is not None:
            errors = f"{numbers['error']['gradients']:.2g} ({numbers['plain_error']['gradients']:.2g})"
        lines.append(f"| {name} | {said.replace('|', '/')} | {errors} | {check['seconds']:.0f} |")
    lines += [f"| {name} | left out, no time | | |" for name in result["left_out"]]
    return "\n".join(lines)


def starts(result: dict[str, Any]) -> str:
    """From applying to steady steps: what compilation takes, cold and warm."""
    lines = ["| model | layers | arm | cold | warm | steady step |", "|---|---|---|---|---|---|"]
    found = {(x["model"], x["layers"], x["arm"], x["start"]): x for x in result["starts"]}
    for model, layers, arm in dict.fromkeys(key[:3] for key in found):
        both = [found.get((model, layers, arm, start)) for start in ("cold", "warm")]
        told = [f"{check['compilation']:.1f} s" if check else "" for check in both]
        steady = min(min(check["steps"]) for check in both if check)
        lines.append(f"| {model} | {layers} | {arm} | {told[0]} | {told[1]} | {steady:.3f} s |")
    return "\n".join(lines)
