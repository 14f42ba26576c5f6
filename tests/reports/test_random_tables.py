"""No table, however wrong, makes a traceback; and the room never brings torch along."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import read_page
import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from massact.records.answer import Answer, Peak, StackAnswer
from massact.records.kinds.scan import ScanResult
from massact.records.tables import columns_of, frame
from massact.reports import answer_in_words, draw, show, to_json
from massact.reports.contents import contents_of
from massact.reports.pages import page_of
from massact.reports.render.html import html

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(synthetic.HOSTILE)
REAL = st.floats() | st.sampled_from([0.0, 1.0, 100.0, 1e-30, 1e38])
WHOLE = st.integers(-1, 50)
STACKS = st.sampled_from(["", "encoder"])


@st.composite
def rows(draw_: st.DrawFn, table: str) -> list[dict[str, object]]:
    """Rows of one table with any value in any column."""
    fixed = {
        "stack": STACKS,
        "site": st.just("resid_post"),
        "layer": st.integers(0, 6),
        "source": st.sampled_from(["prompt", "corpus"]),
        "rank": WHOLE if table != "ranks" else TEXT,
        "n_sequences": st.integers(0, 9),
        "nonfinite": st.integers(0, 9),
        "n_findings": st.integers(0, 9),
    }
    kinds = {"float64": REAL, "int64": WHOLE, "string": TEXT, "bool": st.booleans()}
    columns = {c: fixed.get(c, kinds[dtype]) for c, (dtype, _) in columns_of(table).items()}
    return draw_(st.lists(st.fixed_dictionaries(columns), max_size=5))


PEAKS = st.none() | st.builds(
    Peak,
    layer=st.integers(0, 6),
    pos=WHOLE,
    dim=WHOLE,
    value=REAL,
    magnitude=REAL,
    median=REAL,
    ratio=REAL,
    token=TEXT,
    sequence=WHOLE,
    position_class=TEXT,
)
MAYBE_LAYER = st.none() | st.integers(0, 6)
ANSWERS = st.builds(
    StackAnswer,
    stack=STACKS,
    site=st.just("resid_post"),
    n_layers=st.integers(0, 6),
    n_findings=st.integers(0, 3),
    layers=st.lists(st.integers(0, 6), max_size=4),
    onset=MAYBE_LAYER,
    offset=MAYBE_LAYER,
    onset_module=st.none() | TEXT,
    onset_jump=st.none() | REAL,
    dims=st.lists(st.tuples(WHOLE, REAL), max_size=9),
    tokens=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 9)), max_size=9),
    group=TEXT | st.just("start"),
    per_sequence=REAL,
    peak=PEAKS,
    spread=st.none() | REAL,
    largest=PEAKS,
    largest_magnitude=PEAKS,
    headroom=st.just({}),
    nonfinite=st.integers(0, 9),
)


@st.composite
def results(draw_: st.DrawFn) -> ScanResult:
    stacks = draw_(st.lists(ANSWERS, max_size=2))
    answer = Answer(any(s.n_findings for s in stacks), stacks, draw_(st.sampled_from([{}, {"unavailable": "x"}])))
    tables = {t: frame(t, draw_(rows(t))) for t in ScanResult.TABLES}
    info = synthetic.info(answer)
    info.notes = draw_(st.lists(TEXT, max_size=2))
    return ScanResult(info, **tables)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(results())
def test_any_tables_can_be_said_and_printed(result: ScanResult) -> None:
    assert all(isinstance(s, str) for s in answer_in_words(result))
    show(result, Console(file=io.StringIO(), width=80))
    json.loads(to_json(result))


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
@given(results())
def test_any_tables_can_be_drawn(tmp_path: Path, result: ScanResult) -> None:
    assert draw(result, tmp_path)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(results())
def test_any_tables_have_a_page(result: ScanResult) -> None:
    read_page.check(read_page.read(html(page_of(contents_of(result)))))


def test_the_room_does_not_import_torch_or_pyplot() -> None:
    code = (
        "import sys, massact.reports; "
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_saved_run_reads_the_same(tmp_path: Path) -> None:
    from massact.records.kinds.scan import open_run

    for name in ("massive", "quiet", "broken", "hostile", "two stacks"):
        result = synthetic.EVERY[name]()
        again = open_run(result.save(tmp_path / name))
        assert answer_in_words(again) == answer_in_words(result)
        assert json.loads(to_json(again))["findings"] == json.loads(to_json(result))["findings"]
