"""The answer of a scan in a terminal, and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from massact.records.kinds.classics import Classics
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.reproduction import AGREES, DIFFERS, Reproduction
from massact.records.kinds.scan import ScanResult
from massact.records.result import Result
from massact.reports.kinds.classics import classics_in_words
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.kinds.intervention import effects_in_words
from massact.reports.kinds.reproduction import ours, published, reproduction_in_words, where
from massact.reports.kinds.scan.views import Rule, StackView, rule_of, views
from massact.reports.kinds.scan.words import answer_in_words
from massact.reports.spelling import (
    cell,
    number,
    or_dash,
    percent,
    quoted,
    real,
    shortened,
    signed,
    token_list,
    visible,
)

MOST_LAYERS, MOST_COORDINATES, MOST_NEAR_MISSES = 38, 16, 5
MOST_ROWS = 20  # of a table that nothing is known of
EDITS_BESIDE = 4  # columns of one table that a narrow terminal holds


def show_scan(result: ScanResult, console: Console) -> None:
    """Print the answer in words, then its tables.

    Args:
        result: of a scan, or of a run directory.
        console: where to; colours and width are its own. Nothing in a result is read as rich markup.
    """
    rule = rule_of(result)
    console.print(_headline(result, console.encoding))
    of = "the first sequence" if (result.info.corpus or {}).get("kind") == "tensors" else "the prompt"
    if of == "the prompt" and (tokens := result.portrait.get("tokens")) is not None:
        of += f" {quoted(''.join(map(str, tokens)), 40, console.encoding)}"
    for view in views(result):
        sections = [
            _layers(view),
            _coordinates(view, console.encoding),
            _prompt_ranks(view, of),
            _corpus_ranks(view, console.encoding),
            _near_misses(view, rule, console.encoding),
        ]
        if view.label and any(sections):
            console.print(_plain(f"\n{view.label}", console.encoding, "bold underline"))
        for section in filter(None, sections):
            console.print()
            console.print(section)


def show_explanation(e: Explanation, console: Console) -> None:
    """Print the story of an explanation in words, then its tables.

    Args:
        e: fresh, or of a run directory.
        console: where to; colours and width are its own.
    """
    names = (e.info.model.get("name") or e.info.model.get("id"), e.info.corpus.get("name"))
    title = " on ".join(visible(str(x), console.encoding) for x in names if x)
    console.print(_framed(story_in_words(e), console.encoding, f"{title}: explanation" if title else "explanation"))
    for stack in dict.fromkeys(e.axes["stack"]):
        console.print()
        console.print(_axes(e.axes[e.axes["stack"] == stack], str(stack)))


def show_intervention(e: Intervention, console: Console) -> None:
    """Print what edits did in words, then the table.

    Args:
        e: fresh, or of a run directory.
        console: where to; colours and width are its own.
    """
    name = visible(str(e.info.model.get("name") or e.info.model.get("id") or ""), console.encoding)
    console.print(_framed(effects_in_words(e), console.encoding, f"{name}: intervention" if name else "intervention"))
    for group, rows in e.effects.groupby("group", sort=False):
        edits = list(dict.fromkeys(rows["edit"]))
        for start in range(0, len(edits), EDITS_BESIDE):
            few = rows[rows["edit"].isin(edits[start : start + EDITS_BESIDE])]
            console.print()
            console.print(_effects(few, "" if group == "all" else str(group), console.encoding))


def _effects(rows: pd.DataFrame, group: str, encoding: str) -> _Section:
    """A line for each metric, a column for each edit: its change, starred where the interval leaves out zero."""
    edits = list(dict.fromkeys(rows["edit"]))
    names = [shortened(visible(str(edit), encoding), 24) for edit in edits]
    table = _table("metric", "without", *names, left=("metric",), folding=("metric", *names))
    for metric, mine in rows.groupby("metric", sort=False):
        by_edit = {row["edit"]: row for _, row in mine.iterrows()}
        before = [real(row["baseline"]) for row in by_edit.values()]
        # Sink statistics are of the layers behind an edit, so edits at different layers differ in them.
        same = all(b == before[0] or abs(b - before[0]) <= 1e-6 * abs(before[0]) for b in before)
        table.add_row(Text(visible(str(metric), encoding).replace("_", " ")), number(before[0]) if same else "varies",
                      *(_starred(by_edit[edit]) if edit in by_edit else "-" for edit in edits))  # fmt: skip
    of = f" of {visible(group, encoding)}" if group else ""
    nats = "; nll and kl in nats" if {"nll", "kl"} & set(rows["metric"]) else ""
    return _Section(f"Change by each edit{of} (*: zero is outside of the 95% interval{nats})", table)


def _starred(row: pd.Series) -> str:
    low, high = real(row["ci_low"]), real(row["ci_high"])
    return signed(row["delta"]) + ("*" if low > 0 or high < 0 else " ")


def show_classics(c: Classics, console: Console) -> None:
    """Print what the classic works find in words; their numbers are in the tables of the run.

    Args:
        c: fresh, or of a run directory.
        console: where to; colours and width are its own.
    """
    name = visible(str(c.info.model.get("name") or c.info.model.get("id") or ""), console.encoding)
    console.print(_framed(classics_in_words(c), console.encoding, f"{name}: classics" if name else "classics"))


def show_reproduction(r: Reproduction, console: Console) -> None:
    """Print a line for each experiment, then every value of which one was published; all are in the table of the run.

    Args:
        r: fresh, or of a run directory.
        console: where to; colours and width are its own.
    """
    name = visible(str(r.info.model.get("name") or r.info.model.get("id") or ""), console.encoding)
    title = f"{name}: reproduction" if name else "reproduction"
    console.print(_framed(reproduction_in_words(r), console.encoding, title))
    compared = r.reproduced[r.reproduced["verdict"].isin((AGREES, DIFFERS))]
    if len(compared):
        table = _table("", "quantity", "here", "published", "tag", "verdict", left=("", "quantity", "tag", "verdict"),
                       folding=("quantity", "here", "published"))  # fmt: skip
        for _, row in compared.iterrows():
            cells = (row["experiment"], where(row), ours(row), published(row), row["tag"], row["verdict"])
            table.add_row(*(_plain(str(c), console.encoding) for c in cells))
        console.print()
        console.print(_Section("Beside published values", table))


def show_other(result: Result, console: Console) -> None:
    """Print the notes and the first rows of every table of a result of another package.

    Args:
        result: fresh, or of a run directory.
        console: where to; colours and width are its own.
    """
    console.print(_framed(noted(result), console.encoding, result.KIND))
    for name, rows in result.tables().items():
        if not len(rows):
            continue
        numeric = {c for c, (dtype, _) in result.TABLES[name].items() if dtype in ("int64", "float64")}
        table = _table(*rows.columns, left=tuple(c for c in rows.columns if c not in numeric))
        for _, row in rows.head(MOST_ROWS).iterrows():
            cells = (or_dash(row[c]) if c in numeric else visible(str(row[c])) for c in rows.columns)
            table.add_row(*(_plain(text, console.encoding) for text in cells))
        more = f", {MOST_ROWS} of {len(rows):,} rows" if len(rows) > MOST_ROWS else ""
        console.print()
        console.print(_Section(f"{name}{more}", table))


def noted(result: Result) -> list[str]:
    """Whose result it is, and its notes."""
    return [f"A result of {result.VERB}.", *(visible(str(note)) for note in result.info.notes)]


def _axes(rows: pd.DataFrame, stack: str) -> _Section:
    """Three axes side by side."""
    table = _table("", "layer", "attention on\nfindings", "on\nposition 0", "on random\ntokens", "value norm\nratio",
                   "residual\nnorm ratio", left=("",))  # fmt: skip
    columns = ("concentration", "concentration_first", "concentration_null", "value_drain", "residual_norm")
    for _, row in rows.sort_values("layer").iterrows():
        reads = bool(row["after_onset"])
        table.add_row("|" if reads else "", str(row["layer"]), *(or_dash(row[c]) for c in columns),
                      style="" if reads else "dim")  # fmt: skip
    name = f"{visible(stack)}: " if stack else ""
    marks = "|: the block reads findings; -: unavailable"
    what = "Share of attention on the tokens, and norms of those with findings over norms of others"
    return _Section(f"{name}{what} ({marks})", table)


def _plain(text: str, encoding: str, style: str = "") -> Text:
    """Text that rich prints as it is, with what the terminal cannot encode escaped."""
    return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)


def _headline(result: ScanResult, encoding: str) -> Panel:
    """The words in a frame, one line of them each, the first in bold."""
    corpus, model = result.info.corpus or {}, result.info.model or {}
    names = (model.get("name") or model.get("id"), corpus.get("name"))
    title = " on ".join(visible(str(x), encoding) for x in names if x)
    return _framed(answer_in_words(result), encoding, title)


def _framed(lines: list[str], encoding: str, title: str) -> Panel:
    """Lines in a frame, the first in bold."""
    body = Table.grid(padding=(0, 1))
    body.add_column(width=1)
    body.add_column(overflow="fold")  # an ellipsis is a character that not every terminal has
    body.add_row("", _plain(lines[0], encoding, "bold"))
    for line in lines[1:]:
        body.add_row("-", _plain(line, encoding))
    return Panel(
        body,
        title=Text(f" {title} ") if title else None,
        title_align="left",
        border_style="dim",
        box=box.SQUARE,
    )


@dataclass
class _Section:
    """A table under its title."""

    title: str
    table: Table

    def __rich__(self) -> Group:
        return Group(Text(self.title, style="bold"), self.table)


def _table(*columns: str, left: tuple[str, ...] = (), folding: tuple[str, ...] = ()) -> Table:
    """A table of numbers: right-aligned but for the columns in `left`; those in `folding` wrap."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(
            Text(name),
            justify="left" if name in left else "right",
            overflow="fold",
            no_wrap=name not in folding,
        )
    return table


def _layers(view: StackView) -> _Section | None:
    """Fig. 4 of Sun 2024 in numbers."""
    if not len(view.layers):
        return None
    table = _table("", "layer", "top 1", "top 2", "top 3", "median", "ratio", "fp16\nheadroom", "findings", left=("",))
    previous, span = -1, view.span
    for i in kept_rows(view):
        if i > previous + 1:
            between = int(view.layers["n_findings"][previous + 1 : i].sum())
            table.add_row("", "...", *[""] * 6, f"{between:,}", style="dim")
        row, previous = view.layers.iloc[i], i
        values = [cell(row[c]) for c in ("top1", "top2", "top3", "median", "ratio", "headroom_fp16")]
        overflows = row["headroom_fp16"] < 1 or row["nonfinite"] > 0
        table.add_row(
            _mark(int(row["layer"]), span, view.peak_layer),
            str(row["layer"]),
            *values,
            f"{int(row['n_findings']):,}",
            style="red" if overflows else "" if row["n_findings"] else "dim",
        )
    mean, of = (f", mean over {view.n_sequences:,} sequences", " of all") if view.n_sequences > 1 else ("", "")
    columns = f"ratio: top 1 / median; fp16 headroom: 65,504 / the largest |h|{of}"
    return _Section(f"Largest and median |h| of each layer{mean} ({columns})", table)


def _mark(layer: int, span: tuple[int, int] | None, peak: int | None) -> str:
    """Where a layer is between onset and offset."""
    if span is None or not span[0] <= layer <= span[1]:
        return ""
    if layer in span:
        return "only" if span[0] == span[1] else "onset" if layer == span[0] else "offset"
    return "peak" if layer == peak else "|"


def kept_rows(view: StackView) -> list[int]:
    """Rows of the layers table to print: all; of deep models the ends and what is near onset and offset."""
    n, numbers = len(view.layers), [int(x) for x in view.layers["layer"]]
    if n <= MOST_LAYERS + 2:
        return list(range(n))
    wanted = [x for x in (*(view.span or ()), view.peak_layer, view.shown_layer) if x is not None]
    marked = [numbers.index(x) for x in wanted if x in numbers]
    # In order of importance: the marked rows, both ends, their neighbours ever further away.
    order = [*marked, 0, n - 1]
    for distance in range(1, n):
        order += [i + side * distance for i in dict.fromkeys([*marked, 0, n - 1]) for side in (-1, 1)]
    kept: set[int] = set()
    for i in order:
        if 0 <= i < n and len(kept) < MOST_LAYERS - 4:  # at most five gaps, one row each
            kept.add(i)
    return sorted(kept)


def _coordinates(view: StackView, encoding: str) -> _Section | None:
    """Where the findings of the peak layer are, and how constant (Sun 2024, section 2.2 and Table 2)."""
    rows = view.coordinates[view.coordinates["layer"] == view.peak_layer]
    size = rows["mean"].abs().to_numpy(float, na_value=np.nan)
    rows = rows.assign(size=size).sort_values(["count", "size"], ascending=False, kind="stable")
    if not len(rows):
        return None
    spread = _spread("mean", "std", encoding)
    table = _table(
        "layer",
        "dim",
        "class",
        "findings",
        "share",
        spread,
        "spread",
        "tokens",
        left=("class", "tokens"),
        folding=("tokens",),
    )
    for _, row in rows.head(MOST_COORDINATES).iterrows():
        tokens = token_list(row["tokens"])
        named = ", ".join(quoted(t, 16, encoding) for t in tokens[:3])
        left = int(row["n_tokens"]) - min(len(tokens), 3)
        table.add_row(
            str(row["layer"]),
            _index(row["dim"]),
            Text(visible(row["position_class"], encoding)),
            f"{int(row['count']):,}",
            "-" if math.isnan(real(row["share"])) else percent(row["share"]),
            _spread(cell(row["mean"]), cell(row["std"]), encoding) if row["count"] > 1 else cell(row["mean"]),
            percent(row["spread"]) if row["count"] > 1 else "-",
            Text(named + (f", {left:,} more" if left > 0 and named else "")),
        )
    columns = "share: of the sequences; spread: std / |mean|"
    more = f", the {MOST_COORDINATES} most frequent of {len(rows):,}" if len(rows) > MOST_COORDINATES else ""
    return _Section(f"Coordinates at layer {view.peak_layer}, that of the largest finding{more} ({columns})", table)


def _spread(mean: str, std: str, encoding: str) -> str:
    return f"{mean} {'±' if encoding.lower().startswith('utf') else '+-'} {std}"


def _index(value: Any) -> str:
    """-1 stands for 'has none' in the tables."""
    return str(int(value)) if int(value) >= 0 else "-"


def _prompt_ranks(view: StackView, of: str) -> _Section | None:
    """Table 1 of Sun 2024, of the prompt, or of what stands in for it."""
    rows = view.ranks[view.ranks["source"] == "prompt"]
    if not len(rows):
        return None
    table = _table("rank", "|h|", "signed value", left=("rank",))
    for _, row in rows.iterrows():
        table.add_row(Text(visible(row["rank"])), cell(row["magnitude"]), cell(row["value_mean"]))
    return _Section(f"Ranks of |h| in the hidden state of {of}, layer {view.shown_layer}", table)


def _corpus_ranks(view: StackView, encoding: str) -> _Section | None:
    """Table 2 of Sun 2024, with the share of sequences whose value sits at the same dim (E8)."""
    rows = view.ranks[view.ranks["source"] == "corpus"]
    if not len(rows):
        return None
    table = _table(
        "rank",
        "mean |h|",
        _spread("mean value", "std", encoding),
        "at the same dim",
        "sequences",
        left=("rank",),
    )
    for _, row in rows.iterrows():
        table.add_row(
            Text(visible(row["rank"])),
            cell(row["magnitude"]),
            _spread(cell(row["value_mean"]), cell(row["value_std"]), encoding),
            percent(row["same_dim"]),
            f"{int(row['n_sequences']):,}",
        )
    return _Section(f"Ranks of |h| over the sequences of the corpus, layer {view.shown_layer}", table)


def _near_misses(view: StackView, rule: Rule, encoding: str) -> _Section | None:
    """The activations that come nearest to the criterion without passing."""
    rows = view.near_misses
    if not len(rows):
        return None
    table = _table(
        "layer",
        "sequence",
        "pos",
        "dim",
        "class",
        "value",
        "ratio",
        "fails on",
        "token",
        left=("class", "fails on", "token"),
        folding=("fails on", "token"),
    )
    for _, row in rows.head(MOST_NEAR_MISSES).iterrows():
        missed = ", ".join(rule.failed(row["magnitude"], row["ratio"])) or "-"
        table.add_row(
            str(row["layer"]),
            _index(row["sequence"]),
            _index(row["pos"]),
            _index(row["dim"]),
            Text(visible(row["position_class"], encoding)),
            cell(row["value"]),
            cell(row["ratio"]),
            missed,
            Text(quoted(row["token"], 20, encoding)),  # all of 'frame 10.56-10.58 s'
        )
    order = "largest |h|" if rows["ratio"].isna().all() else "highest ratio (|h| / median)"
    shown = f"{min(len(rows), MOST_NEAR_MISSES)} of {len(rows):,}, the {order} first"
    return _Section(f"Near misses: {shown}", table)
