"""Strings on a page, whatever they hold; Markdown, LaTeX, the model card; results in a notebook; the command line."""

from __future__ import annotations

import html
import re
from pathlib import Path

import compared
import hostile_run
import labs
import pytest
import read_page
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from test_trajectory import growing

from massact.records.errors import UserError
from massact.records.figure_files import FORMATS, STYLES, formats_of
from massact.records.tables import read_table
from massact.reports import report
from massact.reports.parts import shown_value
from massact.reports.render.markup import environment, figure_text, inlined_json, md, prose, tex
from massact.reports.spelling import HIDDEN
from massact.verbs.inputs import Inputs
from tests.cli.test_cli import run as massact

ANYTHING = st.text(alphabet=st.characters(exclude_categories=[]), max_size=60) | st.sampled_from(hostile_run.EVIL)


def element(template: str, **given: object) -> str:
    """A piece of HTML, as the templates write it."""
    return environment().from_string(template).render(**given)


def parsed(element: str) -> read_page.Element:
    """The only element of a piece of HTML."""
    (child,) = read_page.read(f"<!DOCTYPE html>\n{element}").root.children
    assert isinstance(child, read_page.Element)
    return child


def paragraph(token: str) -> read_page.Element:
    return parsed(element("<p>{{ token }}</p>", token=token))


CELL = '<td title="{{ token }}" data-v="{{ shown }}"><bdi>{{ shown }}</bdi></td>'


@given(ANYTHING)
def test_any_token_is_text_and_nothing_else(token: str) -> None:
    shown = shown_value("token", "string", token)
    cell = parsed(element(CELL, token=token, shown=shown))
    assert cell.text == shown and cell.attributes["data-v"] == shown and set(cell.attributes) == {"title", "data-v"}
    assert parsed(element("<p>{{ token | prose }}</p>", token=token)).text == paragraph(token).text
    assert not set(map(_category, shown)) & HIDDEN and len(shown) < 80


def _category(character: str) -> str:
    import unicodedata

    return unicodedata.category(character)


@given(ANYTHING)
def test_any_token_is_text_in_a_figure(token: str) -> None:
    text = figure_text(token, 2000)
    assert "<" not in text and ">" not in text and "$" not in text
    assert html.unescape(text) == paragraph(token).text or len(token) > 400
    dumped = inlined_json({"text": [text, token]})
    assert dumped.isascii() and not set(dumped) & set("<>&")


@given(ANYTHING)
def test_any_token_is_text_in_latex_and_markdown(token: str) -> None:
    assert "\n" not in tex(token) and "\n" not in md(token)
    bare = re.sub(r"\\[{}$&#%_]", "", tex(token).replace(r"$\pm$", ""))
    assert bare.count("{") == bare.count("}") and not set(bare) & set("$&#%~^")
    assert not re.search(r"(?<!\\)(?:\\\\)*[<|`*]", md(token))


def test_long_tokens_are_cut_and_their_length_is_told() -> None:
    assert shown_value("token", "string", "x" * 10_000) == f"\u201c{'x' * 40}\u2026 (10,000 characters)\u201d"
    assert shown_value("tokens", "string", '["a", "\\n"]') == "\u201ca\u201d, \u201c\\n\u201d"
    assert shown_value("token", "string", "\ud800") == "\u201c\\ud800\u201d"


def test_right_to_left_words_stand_apart() -> None:
    assert prose("a \u0634\u0643\u0631\u0627 b") == "a <bdi>\u0634\u0643\u0631\u0627</bdi> b"


def test_missing_is_never_blank_and_never_zero() -> None:
    nan = float("nan")
    assert shown_value("mass_first", "float64", nan) == shown_value("token", "string", None) == "unavailable"
    assert shown_value("dim", "int64", -1) == "none" and shown_value("dim", "int64", 12345) == "12345"
    assert shown_value("count", "int64", 12345) == "12,345" and shown_value("found", "bool", False) == "no"
    assert shown_value("token", "string", "") == "no token" and shown_value("max", "float64", float("inf")) == "inf"


def test_markdown_and_latex_hold_the_main_tables(tmp_path: Path) -> None:
    run = hostile_run.write(tmp_path / "run")
    text = report(run, kind="md").read_text(encoding="utf-8")
    assert re.match(r"# .* \\</title\\>\\<script\\>alert\\\(1\\\)//\n", text)
    layers = read_table(run, "layers")
    lines = [line for line in text.splitlines() if line.startswith("| 12 |")]
    assert len(lines) >= 2 and f"{layers['top1'][12]:,.0f}" in lines[0]
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    text = report(run, kind="latex").read_text(encoding="utf-8")
    assert text.count(r"\begin{longtable}") == text.count(r"\end{longtable}") >= 4
    for block in re.findall(r"\\begin\{longtable\}\{([lr]+)\}(.*?)\\end", text, flags=re.S):
        rows = [line for line in block[1].splitlines() if line.endswith(r"\\") and not line.startswith(r"\caption")]
        assert rows and {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(block[0])}


@pytest.mark.parametrize(
    "result",
    [synthetic.massive(), synthetic.empty(), synthetic.unanswered(), synthetic.broken(), compared.trained(),
     hostile_run.explanation(hostile_run.EVIL), hostile_run.intervention(hostile_run.EVIL), labs.lab(), growing()],
    ids=lambda r: type(r).__name__,
)  # fmt: skip
def test_results_show_themselves_in_notebooks(result: object) -> None:
    shown = result._repr_html_()  # type: ignore[attr-defined]
    text = re.sub(r'<img alt="\w+" src="data:image/png;base64,[A-Za-z0-9+/=]+" style="max-width:100%"/>', "", shown)
    assert len(text) < 60_000 and "<script" not in shown and parsed(text).name == "div"


def test_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compared.write(tmp_path / "run", None, synthetic.empty())
    assert massact(monkeypatch, "report", str(run), "--figures", "pdf, png") == 0
    assert f"Written: {run / 'report.html'} (" in capsys.readouterr().out
    figures = sorted(p.name for p in (run / "figures").iterdir())
    assert "layers.pdf" in figures and "layers.png" in figures and not any(n.endswith(".svg") for n in figures)
    first = (run / "figures" / "layers.pdf").read_bytes()
    assert first.startswith(b"%PDF")
    assert massact(monkeypatch, "report", str(run), "--format", "md", "--figures", "pdf") == 0
    assert (run / "figures" / "layers.pdf").read_bytes() == first  # no dates in it
    assert massact(monkeypatch, "report", str(run), "--figures", "gif") == 2
    assert massact(monkeypatch, "report", str(run), "--figures", "none", "--style", "lecture") == 0
    assert 'data-style="lecture"' in (run / "report.html").read_text(encoding="utf-8")
    assert massact(monkeypatch, "report", str(run), "--style", "wall") == 2
    assert massact(monkeypatch, "report", str(run), str(run)) == 2
    assert massact(monkeypatch, "report", str(tmp_path / "nowhere")) == 2


def test_an_unknown_format_of_figures_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format 'gif'"):
        report(synthetic.massive(), tmp_path / "x.html", figures=["gif"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "named"), [
    ("none", ()), ("png", ("png",)), ("svg, png,svg", ("svg", "png")), (",".join(FORMATS), tuple(FORMATS)),
])  # fmt: skip
def test_formats_of_figures_are_named_with_commas(text: str, named: tuple[str, ...]) -> None:
    assert formats_of(text) == Inputs.of({"figures": text}).formats() == named


@pytest.mark.parametrize("text", ["", "png,", "png,none", "PNG", "png svg"])
def test_what_is_no_format_of_figures(text: str) -> None:
    for read in (formats_of, lambda text: Inputs.of({"figures": text})):
        with pytest.raises(UserError):
            read(text)


def test_every_verb_takes_the_styles_that_figures_have_and_no_other() -> None:
    for style in STYLES:
        assert Inputs.of({"style": style}).style == style
    with pytest.raises(UserError, match="wall"):
        Inputs.of({"style": "wall"})
