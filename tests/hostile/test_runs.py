"""Run directories of every verb, damaged: opened, printed, put on a page and compared."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from massact import reports
from massact.records.errors import MassactError
from massact.records.kinds import kinds
from massact.records.kinds.comparison import open_compared
from tests.hostile.damage import cases, damaged, limits

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name != "__pycache__")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("hostile") / "golden"))


def refused_or(work: Callable[[], Any]) -> Any:
    """What comes of it; None where it was refused, with words."""
    try:
        return work()
    except MassactError as error:
        assert error.what
        return None


def printed(directory: Path) -> None:
    """Open whatever is there and print it, as a terminal and as JSON do."""
    for kind in kinds().values():
        result = refused_or(lambda kind=kind: kind.open(directory))
        if result is not None:
            refused_or(lambda result=result: reports.show(result, Console(file=io.StringIO(), width=80)))
            json.loads(reports.to_json(result))


def paged(rng: Random, directory: Path, whole: Path, out: Path) -> None:
    """Make a page of it, and compare it with a whole one."""
    kind = rng.choice(["html", "md", "latex", "card"])
    several = [directory, whole] if rng.randrange(3) == 0 else [directory]
    made = refused_or(lambda: reports.report(several, out / "page", kind))
    assert made is None or (out / "page").stat().st_size
    assert {p.name for p in out.iterdir()} <= {"page"}
    (out / "page").unlink(missing_ok=True)
    compared = refused_or(lambda: reports.compare(open_compared([directory, whole])))
    if compared is not None:
        reports.show(compared, Console(file=io.StringIO(), width=80))
        json.loads(reports.to_json(compared))


@settings(max_examples=cases("runs"))
@given(st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_damaged_runs_are_printed_or_refused(runs: Path, kind: str, rng: Random) -> None:
    files = sorted(p for p in (runs / kind).rglob("*") if p.is_file())
    with damaged(rng, runs / kind, files), limits():
        printed(runs / kind)


@settings(max_examples=cases("pages"))
@given(st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_damaged_runs_are_put_on_a_page_or_refused(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, rng: Random
) -> None:
    files = sorted(p for p in (runs / kind).rglob("*") if p.is_file())
    out = tmp_path_factory.mktemp("page")
    with damaged(rng, runs / kind, files, 1), limits():
        paged(rng, runs / kind, GOLDEN / "explained_2", out)
