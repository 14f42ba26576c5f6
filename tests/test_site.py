"""The site is built with warnings as errors, and the tutorial runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def test_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JUPYTER_PLATFORM_DIRS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    start = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in start and 'src="http' not in start
    said = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("massact.scans.scan", "massact.trace.Probe", "massact.interventions"):
        assert name in said


def test_tutorial_runs_and_says_what_it_said() -> None:
    """The tables of the committed notebook come out again; only the clock and the machine may differ."""
    committed = nbformat.read(ROOT / "docs" / "tutorial.ipynb", 4)
    again = nbformat.read(ROOT / "docs" / "tutorial.ipynb", 4)
    NotebookClient(again, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    for before, after in zip(committed.cells, again.cells, strict=True):
        if before.cell_type == "code":
            assert not [o for o in after.outputs if o.output_type == "error"], before.source
            kinds = [o.output_type for o in before.outputs if o.output_type != "stream"]
            assert kinds == [o.output_type for o in after.outputs if o.output_type != "stream"], before.source
