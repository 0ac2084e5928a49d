"""Packages that a machine with torch and transformers, but without a network, may lack; needs neither."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

# Distribution: module. Without the first four regate does not run; without the others checks are skipped.
NEEDED = {"lmdb": "lmdb", "einops": "einops", "accelerate": "accelerate", "pyyaml": "yaml"}
WANTED = {"peft": "peft", "trl": "trl", "datasets": "datasets", "bitsandbytes": "bitsandbytes"}
WANTED |= {"liger-kernel": "liger_kernel", "matplotlib": "matplotlib", "easy-vqa": "easy_vqa"}
USUALLY_MISSING = ("lmdb", "trl", "bitsandbytes", "liger-kernel", "easy-vqa")


def missing() -> list[str]:
    """Of all these, what the running Python lacks."""
    return [name for name, module in (NEEDED | WANTED).items() if importlib.util.find_spec(module) is None]


def told(packages: list[str], *, python: str, folder: Path) -> str:
    """How to carry `packages` to a machine with this version of Python, and to install them there.

    Without dependencies: another torch is not to come with them.
    """
    names = " ".join(packages)
    lines = [
        "where there is a network:",
        f"  python -m pip download --no-deps --only-binary=:all: --python-version {python} "
        f"--platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 "
        f"--dest {folder} {names}",
        "where the GPU is:",
        f"  python -m pip install --no-deps --no-index --find-links {folder} {names}",
    ]
    return "\n".join(lines)


def main(*, python: str | None, folder: Path) -> None:
    here = missing()
    print(f"this machine (Python {platform.python_version()}) lacks: {', '.join(here) or 'nothing'}")
    print(f"a machine with a GPU usually lacks: {', '.join(USUALLY_MISSING)}")
    print(
        told(
            sorted({*here, *USUALLY_MISSING}),
            python=python or ".".join(platform.python_version_tuple()[:2]),
            folder=folder,
        )
    )
