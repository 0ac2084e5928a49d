"""What a figure was measured on, kept beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def described(module: str, *packages: str) -> dict[str, Any]:
    """The command that was given to `python -m module`, versions of `packages`, and the device."""
    device: dict[str, Any] = {"cpu": cpu(), "cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2)}
    versions = {name: importlib.metadata.version(name) for name in packages}
    if "torch" in packages:
        import torch

        versions["torch"] = str(torch.__version__)  # names the build, which its package's version may not
        if torch.cuda.is_available():
            device["gpu"] = torch.cuda.get_device_name()
            device["cuda"] = torch.version.cuda
    return {
        "command": " ".join(["python", "-m", module, *map(_relative, sys.argv[1:])]),
        "python": platform.python_version(),
        **versions,
        "device": device,
    }


def earlier(path: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run wrote to `path`, if its settings, versions and device were those of `result`."""
    if not path.exists():
        return None
    before = json.loads(path.read_text())

    def same(name: str) -> bool:
        if name != "device":
            return bool(before.get(name) == result[name])
        return all(before[name].get(part) == result[name].get(part) for part in ("cpu", "cores", "gpu"))

    measured_with = [name for name in result if name not in ("command", "workloads", "runs")]
    return before if all(map(same, measured_with)) else None


def write(result: dict[str, Any], path: Path) -> None:
    """As JSON; a file that was there is replaced when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


def _relative(argument: str) -> str:
    """Paths without the folders of one machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument
