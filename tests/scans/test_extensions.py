"""Criteria that another package adds are found by name, scan, and stand in the reference beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import massact as ma
from massact.cli import app
from massact.records import extensions as registry
from massact.records.errors import UserError
from massact.scans.criteria import CRITERIA, Criterion, criteria, criterion
from tests.families import build

LOUD = Criterion(
    "loud",
    "|h| > times x median|h|",
    {"times": 3.0},
    "another package",
    "element",
    lambda e, t: e.candidates[e.candidates.magnitude > t["times"] * e.candidates["median"]],
)
TWICE, OTHER = Criterion("sun2024", "", {}, "", "layer", LOUD.rule), "no criterion"


def named(name: str) -> EntryPoint:
    return EntryPoint("loud", f"{__name__}:{name}", "massact.criteria")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """As if packages with these entry points were installed."""
    entries = [named("LOUD")]
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in entries if e.group == group])
    yield entries


def test_a_criterion_of_another_package(installed: list[EntryPoint]) -> None:
    assert criterion("loud") is LOUD and list(criteria())[:-1] == list(CRITERIA)
    ids = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    scan = ma.scan(ma.load(build("gpt2")), ids, criterion="loud", null=False, bos_contrast=False)
    assert scan.info.criterion["name"] == "loud" and scan.info.criterion["thresholds"] == {"times": 3.0}
    assert len(scan.findings) and set(scan.findings.criterion) == {"loud"}
    with pytest.raises(UserError, match="no threshold 'tmes'"):
        ma.scan(criterion="loud", thresholds={"tmes": 2.0})


def test_it_stands_in_the_reference_and_is_told_where_a_name_is_wrong(
    installed: list[EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import generate

    row = next(line for line in generate.reference_page().splitlines() if line.startswith("| `loud` |"))
    assert "times x median" in row and "times = 3" in row and "another package" in row
    done = CliRunner().invoke(app, ["scan", "--criterion", "lod"])
    assert "loud" in done.output + str(done.exception)


@pytest.mark.parametrize("name", ["TWICE", "OTHER"])
def test_what_is_refused(installed: list[EntryPoint], name: str) -> None:
    installed[:] = [named(name)]
    with pytest.raises(UserError, match="no Criterion"):
        criteria()
