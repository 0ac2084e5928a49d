"""A part: checks, one after another, within a time; what each found is in one file as soon as it is found.

A check that fails is recorded with its error, and the others go on. The checks run in a process of its own, which a
second one watches: where a check takes the process with it, hangs, or leaves the device unusable, that check is what
failed, and another process goes on behind it. A part that is run again goes on with what is missing or failed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import described, earlier, write

MINUTES = 9.0
UNUSABLE = 75  # exit status: the device answers nothing any more, go on in another process
_SPARE = 3.0  # a check may take so many times as long as it is thought to, and then is stopped
_GRACE = 40.0  # seconds after the part's time in which its last check may come to its end

Record = dict[str, Any]


class SkippedError(Exception):
    """This machine has not what a check needs."""


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        name: unique in its part.
        run: gives what it found, as JSON.
        seconds: that it takes on an H100, as far as is known; it begins only if so many are left.
    """

    name: str
    run: Callable[[], Record]
    seconds: float = 20.0


def run(checks: Sequence[Check], path: Path, settings: Record, *, started: float, minutes: float = MINUTES) -> Record:
    """Run those that `path` has not yet, and write what they find there.

    Args:
        checks: in the order of their importance.
        settings: with others, nothing that stands in `path` counts.
        started: `time.time()` when the part began, in whichever process. A check that failed since then is not tried
            again.
        minutes: for the part.

    Returns:
        What `path` holds: `checks` by name, each with `status` "passed", "failed" or "skipped", `seconds`, and what it
        found or its `error`; `left_out`, for want of time.

    Raises:
        SystemExit: with `UNUSABLE`, after a check has left the device unusable.
    """
    result = opened(path, settings)
    done = result["checks"]
    result["left_out"] = []
    for check in checks:
        before = done.get(check.name, {"status": None})
        if before["status"] == "passed" or before.get("run") == started:
            continue
        if time.time() + check.seconds > started + 60 * minutes:
            result["left_out"].append(check.name)
            continue
        print(f"{check.name} ...", flush=True)
        begun = time.time()
        result["running"] = {"name": check.name, "since": begun, "seconds": check.seconds}
        write(result, path)
        found = _found(check) | {"run": started, "seconds": round(time.time() - begun, 1)}
        done[check.name] = found
        del result["running"]
        write(result, path)
        print(f"  {found['status']}, {found['seconds']} s {found.get('error', '')}", flush=True)
        if not _tidied():
            raise SystemExit(UNUSABLE)
    write(result, path)
    return result


def opened(path: Path, settings: Record) -> Record:
    """What an earlier run with these settings left in `path`, else nothing yet."""
    result = described("benchmarks.gpu", "torch", "transformers", *_installed()) | {"settings": settings}
    before = earlier(path, result) or {}
    return result | {"checks": before.get("checks", {}), "left_out": []}


def _installed() -> list[str]:
    """Of what checks use where it is there."""
    known = {name.lower() for found in importlib.metadata.distributions() if (name := found.metadata["Name"])}
    return [name for name in ("accelerate", "flash-attn", "liger-kernel", "peft", "triton") if name in known]


def _found(check: Check) -> Record:
    try:
        return {"status": "passed"} | check.run()
    except SkippedError as reason:
        return {"status": "skipped", "error": str(reason)}
    except Exception as error:
        where = traceback.format_exc().splitlines()[-12:]
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000], "traceback": where}


def _tidied() -> bool:
    """Give back what the check held; is the device still usable?"""
    torch._dynamo.reset()
    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def watched(command: Callable[[float], list[str]], path: Path, *, minutes: float = MINUTES, every: float = 1.0) -> bool:
    """Run a part in other processes, one after the other, until it has come to its end or its time is over.

    Args:
        command: of such a process, given `started`.
        path: as in `run`.
        every: so many seconds it is looked after.

    Returns:
        Did it come to its end?
    """
    started = time.time()
    over = started + 60 * minutes
    while time.time() < over:
        process = subprocess.Popen(command(started), start_new_session=True)
        reason = _waited(process, path, started, over + _GRACE, every)
        if process.returncode == 0:
            return True
        if not _blamed(path, started, reason) and process.returncode != UNUSABLE:
            return False  # no check's fault: the part itself cannot run
    return False


def _waited(process: subprocess.Popen[bytes], path: Path, started: float, over: float, every: float) -> str:
    """Until it ends, or is stopped because a check takes too long or the time is over; why it ended."""
    reason = ""
    try:
        while process.poll() is None and not reason:
            time.sleep(every)
            running = _running(path, started)
            if running is not None and time.time() > running["since"] + _SPARE * running["seconds"]:
                reason = f"it took more than {_SPARE:.0f} times as long as it was thought to"
            elif time.time() > over:
                reason = "the part's time was over"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    return reason or f"exit status {process.returncode}"


def _running(path: Path, started: float) -> Record | None:
    """The check that runs since this part was started."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        running: Record | None = json.loads(path.read_text()).get("running")
        if running is not None and running["since"] >= started:
            return running
    return None


def _blamed(path: Path, started: float, reason: str) -> bool:
    """The check that ran when its process ended has failed; was there one?"""
    running = _running(path, started)
    if running is None:
        return False
    result = json.loads(path.read_text())
    seconds = round(time.time() - running["since"], 1)
    error = f"its process ended: {reason}"
    result["checks"][running["name"]] = {"status": "failed", "error": error, "run": started, "seconds": seconds}
    del result["running"]
    write(result, path)
    return True
