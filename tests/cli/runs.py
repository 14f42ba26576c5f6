"""Run directories that tests of several verbs begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.test_cli import run


def scanned_run(factory: pytest.TempPathFactory, *options: str) -> Path:
    """A run directory of a scan of the embedded model, without figures."""
    out = factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("massact.reports.draw", lambda *_: [])
        assert run(patch, "scan", "--quiet", "--out", str(out), *options) == 0
    return out


def copied_run(scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for one test, in which nothing is drawn."""
    monkeypatch.setattr("massact.reports.draw", lambda *_: [])
    return Path(shutil.copytree(scanned, tmp_path / "run"))
