"""Old runs still open, and the same scan still gives the same tables."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import massact as ma
from massact.records.classics import CLASSICS_TABLES, CLASSICS_VERSION, open_classics
from massact.records.explanation import EXPLAIN_TABLES, EXPLAIN_VERSION, open_explanation
from massact.records.intervention import INTERVENE_VERSION, open_intervention
from massact.records.lab import LAB_TABLES, LAB_VERSION, open_lab
from massact.records.reproduction import REPRODUCE_VERSION, open_reproduction
from massact.records.results import SCAN_TABLES
from massact.records.runinfo import SCHEMA_VERSION
from massact.records.shapes import SHAPE_TABLES, SHAPES_VERSION, open_shapes
from massact.records.tables import TABLES
from massact.records.training import TRAIN_VERSION, open_training
from massact.records.trajectory import TRAJECTORY_VERSION, open_trajectory
from massact.reports import (
    show,
    show_classics,
    show_explanation,
    show_intervention,
    show_lab,
    show_reproduction,
    show_shapes,
    show_training,
    show_trajectory,
    to_json,
)
from tests.golden.make import (
    CLASSIC,
    EXPLAINED,
    FOLDER,
    INTERVENED,
    LAB,
    REPRODUCED,
    SHAPES,
    STEPPED,
    TRAINED,
    golden_classics,
    golden_explanation,
    golden_intervention,
    golden_lab,
    golden_reproduction,
    golden_scan,
    golden_shapes,
    golden_training,
    golden_trajectory,
)

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


OLD_INTERVENTIONS = sorted(Path(INTERVENED).parent.glob("intervened_*"))


@pytest.mark.parametrize("folder", OLD_INTERVENTIONS, ids=lambda p: p.name)
def test_old_intervention_opens_and_prints(folder: Path) -> None:
    done, out = open_intervention(folder), io.StringIO()
    assert done is not None and ma.open_run(folder).found
    show_intervention(done, Console(file=out, width=100))
    assert "95% interval" in " ".join(out.getvalue().replace("│", " ").split()) and to_json(done)


def test_every_version_of_interventions_has_a_golden_one() -> None:
    assert [p.name for p in OLD_INTERVENTIONS] == [f"intervened_{v}" for v in range(1, INTERVENE_VERSION + 1)]


def test_todays_intervention_equals_the_golden_one() -> None:
    """A change of any number or column needs a new version, or an explanation."""
    golden, (_, today) = open_intervention(INTERVENED), golden_intervention()
    assert golden is not None
    pd.testing.assert_frame_equal(today.effects, golden.effects, rtol=1e-3, atol=1e-5)
    assert today.info.target["dims"] == golden.info.target["dims"]


OLD_REPRODUCTIONS = sorted(Path(REPRODUCED).parent.glob("reproduced_*"))


@pytest.mark.parametrize("folder", OLD_REPRODUCTIONS, ids=lambda p: p.name)
def test_old_reproduction_opens_and_prints(folder: Path) -> None:
    done, out = open_reproduction(folder), io.StringIO()
    assert done is not None and ma.open_run(folder).found
    show_reproduction(done, Console(file=out, width=100))
    assert "E5, First and last layer" in out.getvalue() and to_json(done)


def test_every_version_of_reproductions_has_a_golden_one() -> None:
    assert [p.name for p in OLD_REPRODUCTIONS] == [f"reproduced_{v}" for v in range(1, REPRODUCE_VERSION + 1)]


def test_todays_reproduction_equals_the_golden_one(tmp_path: Path) -> None:
    """A change of any number or column needs a new version, or an explanation."""
    golden, today = open_reproduction(REPRODUCED), golden_reproduction(tmp_path / "run")
    assert golden is not None and today.info.experiments == golden.info.experiments
    pd.testing.assert_frame_equal(today.reproduced, golden.reproduced, rtol=1e-4, atol=1e-8)
    assert list(golden.reproduced.columns) == list(TABLES["reproduced"])


OLD_CLASSICS = sorted(Path(CLASSIC).parent.glob("classics_*"))


@pytest.mark.parametrize("folder", OLD_CLASSICS, ids=lambda p: p.name)
def test_old_classics_open_and_print(folder: Path) -> None:
    done, out = open_classics(folder), io.StringIO()
    assert done is not None and ma.open_run(folder).found
    show_classics(done, Console(file=out, width=100))
    assert "norm-growth" in out.getvalue() and to_json(done)


def test_every_version_of_classics_has_a_golden_one() -> None:
    assert [p.name for p in OLD_CLASSICS] == [f"classics_{v}" for v in range(1, CLASSICS_VERSION + 1)]


def test_todays_classics_equal_the_golden_ones() -> None:
    """A change of any number or column needs a new version, or an explanation."""
    golden, (_, today) = open_classics(CLASSIC), golden_classics()
    assert golden is not None
    for table in CLASSICS_TABLES:
        pd.testing.assert_frame_equal(getattr(today, table), getattr(golden, table), rtol=1e-3, atol=1e-5)


OPENED = {
    "trained": (open_training, show_training, "12 steps", TRAIN_VERSION),
    "stepped": (open_trajectory, show_trajectory, "step100", TRAJECTORY_VERSION),
    "lab": (open_lab, show_lab, "kv-bias", LAB_VERSION),
    "shapes": (open_shapes, show_shapes, "softmax+registers", SHAPES_VERSION),
}


@pytest.mark.parametrize("kind", OPENED)
def test_old_trainings_trajectories_and_labs_open_and_print(kind: str) -> None:
    opened, shown, said, version = OPENED[kind]
    folders = sorted(Path(TRAINED).parent.glob(f"{kind}_*"))
    assert [p.name for p in folders] == [f"{kind}_{v}" for v in range(1, version + 1)]
    for folder in folders:
        record, out = opened(folder), io.StringIO()
        assert record is not None
        shown(record, Console(file=out, width=100))
        assert said in " ".join(out.getvalue().split()) and to_json(record)


def test_todays_training_trajectory_and_lab_equal_the_golden_ones() -> None:
    """A change of any number or column needs a new version, or an explanation."""
    for golden, today, tables in (
        (open_training(TRAINED), golden_training(), ("training", "monitor")),
        (open_trajectory(STEPPED), golden_trajectory(), ("revisions",)),
        (open_lab(LAB), golden_lab(), LAB_TABLES),
        (open_shapes(SHAPES), golden_shapes(), SHAPE_TABLES),
    ):
        for table in tables:
            clockless = [c for c in TABLES[table] if not c.endswith("wall_s") and c not in ("step_s", "tokens_per_s")]
            pd.testing.assert_frame_equal(
                getattr(today, table)[clockless], getattr(golden, table)[clockless], rtol=1e-2, atol=1e-4
            )
