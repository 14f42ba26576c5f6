"""The site is built with warnings as errors, and the tutorial runs."""

from __future__ import annotations

import os
import re
import shutil
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
    api = [tmp_path / "site" / "api.html", *(tmp_path / "site" / "api").glob("*.html")]
    said = "".join(page.read_text(encoding="utf-8") for page in api)
    for name in ("massact.scans.scan", "massact.trace.Probe", "massact.interventions"):
        assert name in said
    if shutil.which("chromium") is not None:
        assert found_from_disk(tmp_path, "fold") > 5 and found_from_disk(tmp_path, "nothingiscalledso") == 0


def found_from_disk(place: Path, word: str) -> int:
    """How many pages and sections the search of a site that was opened from disk finds."""
    for _ in range(4):  # on a busy machine its virtual time may end before the index is read
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=10000",
             f"--user-data-dir={place / 'profile'}", f"{(place / 'site' / 'index.html').as_uri()}?q={word}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        said = re.search(r'md-search-result__meta">\s*(\d+|One|No) matching', done.stdout, re.I)
        if said is not None:
            return {"no": 0, "one": 1}.get(said[1].lower()) or int(said[1] if said[1].isdigit() else 0)
    raise AssertionError("the search of the site does not answer")


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
