"""Dims, tokens and positions of runs side by side."""

from __future__ import annotations

import io
from pathlib import Path

import synthetic
from rich.console import Console

from massact.records.kinds.comparison import open_compared
from massact.reports import compare, show
from massact.reports.kinds.comparison.tables import places
from massact.reports.spelling import cell


def test_places_are_the_clusters_of_each_run(tmp_path: Path) -> None:
    """Two dims at the first token and one delimiter of 8 sequences; a run without findings has its hump."""
    for name, made in (("loud", synthetic.massive()), ("quiet", synthetic.quiet())):
        made.save(tmp_path / name)
    table = places(compare(open_compared([tmp_path / "loud", tmp_path / "quiet"])))
    assert table is not None
    cells = list(zip(*(column.shown for column in table.columns), strict=True))
    assert [c[:5] for c in cells] == [
        ("loud", "massive", "2533", "delimiter", "2-30"),
        ("loud", "massive", "1415", "delimiter", "2-30"),
        ("loud", "massive", "2533", "start", "2-30"),
        ("loud", "massive", "1415", "start", "2-30"),
        ("quiet", "hump", "17", "start", "3-4"),
    ]
    found = synthetic.massive().findings.query("layer == 30 and dim == 2533 and position_class == 'delimiter'")
    assert cells[0][5:] == (cell(found["value"].mean()), "100%", "'.'")


def test_runs_that_are_no_trainings_have_no_table_of_trainings(tmp_path: Path) -> None:
    for name, made in (("one", synthetic.massive()), ("two", synthetic.quiet())):
        made.save(tmp_path / name)
    both = compare(open_compared([tmp_path / "one", tmp_path / "two"]))
    out = io.StringIO()
    show(both, Console(file=out, width=120))
    assert "Training" not in out.getvalue() and "losses" not in out.getvalue()
    assert "2533" in out.getvalue() and not any("train.json" in note for note in both.notes)
