"""SIGKILL at random moments, 20 times: what is resumed ends where it would have ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_20_times_and_resumed_to_the_same_loss(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == 20 and len(set(told["steps"])) > 3  # kills fell into different parts of a training
    records, whole = told["records"], told["records"].pop("whole")
    weights = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    table = pd.read_parquet(tmp_path / "whole" / "training.parquet").drop(columns="step_s")
    monitor = pd.read_parquet(tmp_path / "whole" / "monitor.parquet")
    for name, record in records.items():
        assert record["status"] == "ok" and record["losses"] == whole["losses"], name
        mine = load_file(tmp_path / name / "model" / "model.safetensors")
        assert all(torch.equal(mine[k], w) for k, w in weights.items())
        rows = pd.read_parquet(tmp_path / name / "training.parquet").drop(columns="step_s")
        pd.testing.assert_frame_equal(rows, table)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / name / "monitor.parquet"), monitor)
        assert not [p for p in (tmp_path / name).rglob("*") if p.name.startswith(".")], "something was left behind"
