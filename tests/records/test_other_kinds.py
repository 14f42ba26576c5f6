"""A kind of result that another package adds is opened, shown, told as JSON, reported and kept like our own."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

import massact as ma
from massact.records import extensions
from massact.records import kinds as registry
from massact.records.errors import UserError
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns, declare
from massact.reports import Reading, draw, show
from massact.reports import kinds as readings
from massact.reports.parts import Section, grid

GOLDEN = Path(__file__).parents[1] / "golden"
TABLES: dict[str, Columns] = {"blinks": {"layer": ("int64", "layer"), "rate": ("float64", "blinks a token")}}


@dataclass
class BlinkInfo(Sidecar):
    lamps: dict[str, Any] = field(default_factory=dict)
    schema_version: int = 2


@dataclass(repr=False)
class Blinking(Result):
    """What another package measured."""

    KIND: ClassVar[str] = "blinking"
    VERB: ClassVar[str] = "blink"
    FILE: ClassVar[str] = "blink.json"
    INFO: ClassVar[type[Any]] = BlinkInfo
    TABLES: ClassVar = TABLES
    AGAIN: ClassVar[str] = "Blink again."

    info: BlinkInfo
    blinks: pd.DataFrame = table("blinks")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package were installed."""
    entry = EntryPoint("blinking", f"{__name__}:Blinking", "massact.results")
    monkeypatch.setattr(extensions, "entry_points", lambda group: [entry] if group == entry.group else [])
    registry.kinds.cache_clear()
    yield
    registry.kinds.cache_clear()


NOTE = "One lamp is out."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with such a result in it."""
    place = Path(shutil.copytree(GOLDEN / "schema_2", tmp_path / "run"))
    rows = pd.DataFrame({"layer": [1, 2], "rate": [0.25, float("nan")]})
    Blinking(BlinkInfo(lamps={"red": 3}, notes=[NOTE]), rows).save(place)
    return place


def cli(*words: str) -> str:
    from massact.cli import app

    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("installed")
def test_it_is_found_beside_the_scan(run: Path) -> None:
    scan, one = registry.results_in(run)
    assert isinstance(scan, ma.ScanResult) and isinstance(one, Blinking)
    assert one.info.lamps == {"red": 3} and list(one.blinks.rate)[0] == 0.25
    assert "blinks" in registry.tables()


@pytest.mark.usefixtures("installed")
def test_every_door_tells_it(run: Path) -> None:
    assert NOTE in cli("show", str(run)) and "0.25" in cli("show", str(run))
    told = json.loads(cli("show", str(run), "--json"))["blinking"]
    assert told["blinks"] == [{"layer": 1, "rate": 0.25}, {"layer": 2, "rate": "nan"}]
    page = ma.report(run, kind="md").read_text()
    assert NOTE in page and "0.25" in page
    html = registry.results_in(run)[1]._repr_html_()
    assert NOTE in html
    assert draw(registry.results_in(run)[1], run) == []


@pytest.mark.usefixtures("installed")
def test_alone_it_is_shown_and_reported(run: Path, tmp_path: Path) -> None:
    one = registry.results_in(run)[1]
    out = io.StringIO()
    show(one, Console(file=out, width=80))
    assert NOTE in out.getvalue()
    assert "0.25" in ma.report(one, tmp_path / "page.md", kind="md").read_text()


def _told(result: Result) -> list[str]:
    return [f"{len(result.tables()['blinks'])} layers blink."]


READING = Reading(_told, brief=lambda result: [Section("x", "", [grid("Rates", ("layer",), [["17"]])])])


@pytest.mark.usefixtures("installed")
def test_it_can_say_itself_how_it_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(value: str) -> None:
        entry = EntryPoint("blinking", value, "massact.readings")
        monkeypatch.setattr(readings, "entry_points", lambda group, name: [entry] if name == entry.name else [])

    named(f"{__name__}:READING")
    told = cli("show", str(run))
    assert "2 layers blink." in told and "Rates" in told and "17" in told and "0.25" not in told
    assert "2 layers blink." in ma.report(run, kind="html").read_text()
    named(f"{__name__}:TABLES")
    with pytest.raises(UserError, match="no reading"):
        show(registry.results_in(run)[1], Console(file=io.StringIO()))


@pytest.mark.usefixtures("installed")
def test_damage_says_what_to_do(run: Path) -> None:
    (run / "blinks.parquet").unlink()
    with pytest.raises(UserError) as missing:
        registry.results_in(run)
    assert missing.value.do == Blinking.AGAIN
    record = run / "blink.json"
    record.write_text(record.read_text().replace('"schema_version": 2', '"schema_version": 3'))
    with pytest.raises(UserError, match="3"):
        registry.results_in(run)


def test_without_the_package_a_run_is_read_without_it(run: Path) -> None:
    assert [type(one) for one in registry.results_in(run)] == [ma.ScanResult]


def test_names_are_not_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="layers"):
        declare({"layers": {"other": ("int64", "other")}})
    for value in (f"{__name__}:TABLES", f"{__name__}:Impostor"):
        entry = EntryPoint("x", value, "massact.results")
        monkeypatch.setattr(extensions, "entry_points", lambda group, entry=entry: [entry])
        registry.kinds.cache_clear()
        with pytest.raises(UserError):
            registry.kinds()
    registry.kinds.cache_clear()


class Impostor(Result):
    KIND: ClassVar[str] = "scan"
