"""Nothing is lost when processes are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1200)]  # a hundred lives; machines are shared
KILLS = 54


def test_killed_again_and_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integrations.chaos", str(tmp_path), str(KILLS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["training_kills"] + found["precompute_kills"] >= KILLS
    assert found["kills_mid_run"] >= KILLS // 3
