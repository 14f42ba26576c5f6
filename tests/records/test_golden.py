"""Old runs still open, and the same scan still gives the same tables."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import massact as ma
from massact.records.results import SCAN_TABLES
from massact.records.runinfo import SCHEMA_VERSION
from massact.records.tables import TABLES
from massact.reports import show, to_json
from tests.golden.make import FOLDER, golden_scan

GOLDEN = sorted(Path(FOLDER).parent.glob("schema_*"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_old_run_opens_and_prints(folder: Path) -> None:
    result = ma.open_run(folder)
    out = io.StringIO()
    show(result, Console(file=out, width=100))
    assert "2,500" in out.getvalue() and to_json(result)
    assert result.found and set(result.findings.dim) == {5}


def test_every_schema_version_has_a_golden_run() -> None:
    assert [p.name for p in GOLDEN] == [f"schema_{v}" for v in range(1, SCHEMA_VERSION + 1)]


def test_todays_scan_equals_the_golden_run() -> None:
    """A change of any number or column needs a new schema version, or an explanation."""
    golden, today = ma.open_run(FOLDER), golden_scan()
    for table in SCAN_TABLES:
        pd.testing.assert_frame_equal(getattr(today, table), getattr(golden, table), rtol=1e-5, atol=1e-8)
        assert list(getattr(golden, table).columns) == list(TABLES[table])
    np.testing.assert_allclose(today.portrait["magnitude"], golden.portrait["magnitude"], rtol=1e-5, atol=1e-7)
    assert today.info.answer["stacks"][0]["dims"] == golden.info.answer["stacks"][0]["dims"]
    assert today.info.model["weights_sha256"] == golden.info.model["weights_sha256"]
