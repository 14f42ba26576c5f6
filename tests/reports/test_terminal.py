"""What is printed: the numbers of the tables, as plain text, at any width."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import synthetic
import synthetic_tables
from rich.cells import cell_len
from rich.console import Console

from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import jsonable
from massact.records.tables import frame
from massact.reports import show, to_json
from massact.reports.kinds.scan.tables import kept_rows
from massact.reports.kinds.scan.views import views
from massact.reports.spelling import cell, percent
from tests.facts import tells


def printed(result: ScanResult, width: int = 80, encoding: str = "utf-8", **options: bool) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    show(result, Console(file=file, width=width, **options))
    file.flush()
    return raw.getvalue().decode(encoding)


def section(text: str, title: str) -> list[list[str]]:
    """The rows of a printed table as words."""
    lines = text.split(title, 1)[1].split("\n\n", 1)[0].splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("─"))
    return [line.split() for line in lines[rule + 1 :]]


def test_layers_table_has_the_numbers_of_the_table() -> None:
    result = synthetic.massive()
    rows = section(printed(result), "Largest and median |h| of each layer")
    assert len(rows) == len(result.layers)
    for words, (_, row) in zip(rows, result.layers.iterrows(), strict=True):
        expected = [
            str(row["layer"]),
            *(cell(row[c]) for c in ("top1", "top2", "top3", "median", "ratio", "headroom_fp16")),
            str(row["n_findings"]),
        ]
        assert words[-len(expected) :] == expected
    marks = {row[1]: row[0] for row in rows if len(row) == 9}
    assert marks["2"] == "onset" and marks["30"] == "offset" and marks["17"] == "|" and "31" not in marks


def test_clusters_and_ranks_have_the_numbers_of_the_tables() -> None:
    result = synthetic.massive()
    text = printed(result, 100)
    *rows, hump = section(text, "Clusters, the largest first")
    peak = result.coordinates[result.coordinates["layer"] == 30]
    peak = peak.assign(size=peak["mean"].abs()).sort_values("size", ascending=False, kind="stable")
    for words, (_, row) in zip(rows, peak.iterrows(), strict=True):
        mine = result.findings[
            result.findings[["dim", "position_class"]].eq(row[["dim", "position_class"]]).all(axis=1)
        ]
        std = ["±", cell(row["std"])] if len(set(mine.loc[mine["layer"] == 30, "value"])) > 1 else []
        ratio = mine.loc[mine["layer"] == 30, "ratio"].mean()
        assert words == [
            "massive",
            str(row["dim"]),
            row["position_class"],
            "2-30",
            "30",
            cell(row["mean"]),
            *std,
            cell(ratio),
            percent(row["share"]),
            str(len(mine)),
            repr(json.loads(row["tokens"])[0]),
        ]
    near = result.near_misses
    assert hump[:6] == ["hump", str(near["dim"][0]), "delimiter", "10-16", "10", cell(near["value"][0])]
    assert hump[7:9] == [percent(1 / 8), "0"]  # of one sequence of eight, and none of its entries passes
    for title, source in (
        ("Ranks of |h| in the hidden state of the prompt", "prompt"),
        ("Ranks of |h| over", "corpus"),
    ):
        ranks = result.ranks[result.ranks["source"] == source]
        for words, (_, row) in zip(section(text, title), ranks.iterrows(), strict=True):
            assert " ".join(words).startswith(f"{row['rank']} {cell(row['magnitude'])} {cell(row['value_mean'])}")
    near = result.near_misses.sort_values(["ratio", "magnitude"], ascending=False, kind="stable")
    title = text.split("Near misses: ", 1)[1].splitlines()[0]
    assert title.startswith(f"5 of {len(near)}, ")
    assert [row[6] for row in section(text, "Near misses: 5 of 7")] == [cell(x) for x in near["ratio"][:5]]


def test_ranks_are_printed_in_their_order_however_they_are_stored() -> None:
    result = synthetic.massive()
    result.ranks = result.ranks.iloc[::-1].reset_index(drop=True)
    rows = section(printed(result), "Ranks of |h| in the hidden state of the prompt")
    assert [" ".join(row[:-2]) for row in rows] == list(synthetic_tables.RANKS)


def test_deep_models_lose_their_middle_not_their_marks() -> None:
    result = synthetic.massive(n_layers=126, span=(4, 120))
    rows = section(printed(result), "Largest and median")
    assert 20 < len(rows) <= 40
    assert {"0", "126"} <= {row[0] for row in rows} and {"onset", "offset"} <= {row[0] for row in rows}
    hidden = [row for row in rows if row[0] == "..."]
    shown = [int(row[-1].replace(",", "")) for row in rows]
    assert hidden and sum(shown) == int(result.layers["n_findings"].sum())


@pytest.mark.parametrize("n_layers", [39, 40, 41, 60, 1000])
def test_at_most_forty_rows(n_layers: int) -> None:
    view = views(synthetic.massive(n_layers=n_layers, span=(n_layers // 2, n_layers // 2 + 1)))[0]
    rows = kept_rows(view)
    gaps = sum(b > a + 1 for a, b in zip([-1, *rows], [*rows, n_layers + 1], strict=False))
    assert len(rows) + gaps <= 40 and rows == sorted(set(rows))


def test_every_line_fits_and_is_plain(every: ScanResult) -> None:
    for width in (80, 120, 40):
        text = printed(every, width)
        assert "\x1b" not in text and "\r" not in text and "\t" not in text
        assert all(cell_len(line) <= width for line in text.splitlines())


def test_colours_only_where_asked_for() -> None:
    assert "\x1b[" in printed(synthetic.massive(), force_terminal=True)


def test_hostile_text_is_printed_as_it_is() -> None:
    text = printed(synthetic.hostile(), 160)
    for piece in (
        "[red]",
        "[/]",
        "$x$",
        "<script>",
        "[bold]evil[/bold]\\x1b[31m",
        "[link=http://x]note[/link]\\nsecond line",
    ):
        assert piece in text, piece
    assert "\u202e" not in printed(synthetic.hostile(), 160)


def test_a_terminal_without_unicode() -> None:
    for make in synthetic.EVERY.values():
        assert printed(make(), encoding="ascii").isascii()
        printed(make(), encoding="cp1252")


def test_stacks_are_printed_one_after_the_other() -> None:
    text = printed(synthetic.two_stacks())
    first, second = text.index("\nencoder\n"), text.index("\ndecoder\n")
    assert first < text.index("Clusters, the largest first") < second


def test_two_sites_of_one_stack_keep_their_own_ranks() -> None:
    result = synthetic.quiet()
    other = synthetic.quiet()
    for table in ("layers", "near_misses", "ranks"):
        getattr(other, table)["site"] = "resid_post_prenorm"
    other.ranks["magnitude"] += 1000
    other.info.answer["stacks"][0]["site"] = "resid_post_prenorm"
    for table in ("layers", "near_misses", "ranks"):
        both = pd.concat([getattr(result, table), getattr(other, table)]).to_dict("records")
        setattr(result, table, frame(table, both))
    result.info.answer["stacks"] += other.info.answer["stacks"]
    one, two = views(result)
    assert (one.label, two.label) == ("resid_post", "resid_post_prenorm")
    assert len(one.ranks) == len(two.ranks) == 20
    assert np.allclose(two.ranks["magnitude"] - one.ranks["magnitude"], 1000)


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_json_is_the_record(every: ScanResult) -> None:
    text = to_json(every)
    record = json.loads(text, parse_constant=refuse)
    assert text.isascii()
    assert record == json.loads(json.dumps(jsonable(every.as_dict())))
    assert len(record["findings"]) == len(every.findings)
    assert record["answer"] == json.loads(json.dumps(jsonable(every.info.answer)))


def test_json_spells_nan_and_keeps_tokens() -> None:
    record = json.loads(to_json(synthetic.broken()))
    assert record["layers"][25]["top1"] == "nan" and record["layers"][25]["max"] == "inf"
    tokens = {row["token"] for row in json.loads(to_json(synthetic.hostile()))["findings"]}
    assert tokens == set(synthetic.HOSTILE)


def test_json_of_missing_strings() -> None:
    result = synthetic.quiet()
    result.near_misses.loc[0, "token"] = None
    assert not re.search(r"\bNaN\b", to_json(result))


def test_one_finding_has_no_std() -> None:
    result = synthetic.massive()
    first = (result.findings["sequence"] == 0) & (result.findings["layer"] == 9)
    result.findings, result.near_misses = result.findings[first], frame("near_misses")
    rows = section(printed(synthetic.clustered(result), 160), "Clusters, the largest first")
    means = {cell(value) for value in result.findings["value"]}
    assert len(rows) == 4 and {row[5] for row in rows} == means and not any("±" in row for row in rows)


def test_ranks_of_images_and_sound_are_of_the_first_sequence() -> None:
    result = synthetic.massive()
    result.info.corpus["kind"] = "tensors"
    assert tells(printed(result), "Ranks", "first sequence") and not tells(printed(result), "Ranks", "prompt")


def test_a_time_is_printed_whole() -> None:
    result = synthetic.quiet()
    result.near_misses["token"] = "frame 10.56-10.58 s"
    assert "frame 10.56-10.58 s" in printed(result, 160)
