"""Run directories that tests of several verbs begin with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from massact.reports.render import figures
from tests.cli.test_cli import run


def render_nothing(patch: pytest.MonkeyPatch, but: str = "") -> None:
    """Figures are made, and empty files have their names, `but` for one: rendering takes longer than most verbs."""
    render = figures._save

    def save(figure: Figure, folder: Path, name: str, formats: Sequence[str], dpi: float) -> list[Path]:
        if name == but:
            return render(figure, folder, name, formats, dpi)
        paths = [folder / f"{name}.{kind}" for kind in formats]
        for path in paths:
            path.touch()
        return paths

    patch.setattr(figures, "_save", save)


def scanned_run(factory: pytest.TempPathFactory, *options: str) -> Path:
    """A run directory of a scan of the embedded model, without figures."""
    out = factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("massact.reports.draw", lambda *_, **__: [])
        assert run(patch, "scan", "--quiet", "--out", str(out), *options) == 0
    return out


def copied_run(scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for one test, in which nothing is drawn."""
    monkeypatch.setattr("massact.reports.draw", lambda *_, **__: [])
    return Path(shutil.copytree(scanned, tmp_path / "run"))
