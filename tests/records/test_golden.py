"""Old runs still open, and the same scan still gives the same tables."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import massact as ma
from massact.records.explanation import EXPLAIN_TABLES, EXPLAIN_VERSION, open_explanation
from massact.records.results import SCAN_TABLES
from massact.records.runinfo import SCHEMA_VERSION
from massact.records.tables import TABLES
from massact.reports import show, show_explanation, to_json
from tests.golden.make import EXPLAINED, FOLDER, golden_explanation, golden_scan

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


OLD_EXPLANATIONS = sorted(Path(EXPLAINED).parent.glob("explained_*"))


@pytest.mark.parametrize("folder", OLD_EXPLANATIONS, ids=lambda p: p.name)
def test_old_explanation_opens_and_prints(folder: Path) -> None:
    explanation, out = open_explanation(folder), io.StringIO()
    assert explanation is not None and ma.open_run(folder).found
    show_explanation(explanation, Console(file=out, width=100))
    assert "says what causes what" in " ".join(out.getvalue().replace("│", " ").split()) and to_json(explanation)


def test_every_version_of_explanations_has_a_golden_one() -> None:
    assert [p.name for p in OLD_EXPLANATIONS] == [f"explained_{v}" for v in range(1, EXPLAIN_VERSION + 1)]


def test_todays_explanation_equals_the_golden_one() -> None:
    """A change of any number or column needs a new version, or an explanation."""
    golden, (_, today) = open_explanation(EXPLAINED), golden_explanation()
    assert golden is not None
    for table in EXPLAIN_TABLES:
        pd.testing.assert_frame_equal(getattr(today, table), getattr(golden, table), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(today.maps["probs"], golden.maps["probs"], atol=1e-5)
