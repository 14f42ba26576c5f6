"""SIGKILL at random moments: a run directory is as before or finished, and what goes on ends as it would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("MASSACT_KILLS", "5"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_verbs_leave_nothing_half_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.killed_verbs", str(tmp_path), str(KILLS)], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert sorted(told) == ["classics", "explain", "intervene", "scan"]
    assert all(verb["kills"] >= KILLS for verb in told.values())
    assert any(verb["open"] < verb["kills"] for verb in told.values()), "no kill fell into the work"
