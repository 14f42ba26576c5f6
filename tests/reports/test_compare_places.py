"""Dims, tokens and positions of runs side by side."""

from __future__ import annotations

import io
from pathlib import Path

import synthetic
from rich.console import Console

from massact.records.kinds.comparison import open_compared
from massact.reports import compare, show
from massact.reports.kinds.comparison.tables import places_of
from massact.reports.kinds.scan.views import views


def test_places_are_those_of_the_findings() -> None:
    """Two dims at 16 positions: the first token and one delimiter of 8 sequences."""
    (view,) = views(synthetic.massive())
    layer, findings, dims, tokens, positions = places_of(view)
    assert (layer, findings) == ("30", "32") and set(dims.split(" and ")) == {"1415", "2533"}
    assert tokens == "'.' (8) and 'Summer' (8)" and set(positions.split(" and ")) == {"0 (8)", "3 (8)"}
    (quiet,) = views(synthetic.quiet())
    assert places_of(quiet) == ("-", "0", "-", "-", "-")


def test_runs_that_are_no_trainings_have_no_table_of_trainings(tmp_path: Path) -> None:
    for name, made in (("one", synthetic.massive()), ("two", synthetic.quiet())):
        made.save(tmp_path / name)
    both = compare(open_compared([tmp_path / "one", tmp_path / "two"]))
    out = io.StringIO()
    show(both, Console(file=out, width=120))
    assert "Training" not in out.getvalue() and "losses" not in out.getvalue()
    assert "2533" in out.getvalue() and not any("train.json" in note for note in both.notes)
