"""A scan told apart by a number of each sequence: one curve of layers for each of its values."""

from __future__ import annotations

import numpy as np
import pandas as pd

from massact.records.kinds.scan import ScanResult
from massact.reports import panels
from massact.reports.kinds.scan.curves import named
from massact.reports.kinds.scan.views import StackView
from massact.reports.panels import Line, Panel, Sheet
from massact.reports.parts import Section, Table, Words, grid, parts_of, table_of
from massact.reports.spelling import cell, counted, listed, number, visible

MOST_CURVES = 6
KEPT = ("top1", "median", "ratio")


def by_input(scan: ScanResult) -> Section | None:
    """Layers and findings for each value of what sequences are told apart by."""
    if not len(scan.by_input):
        return None
    name = visible(str(scan.by_input["input"].iloc[0]))
    said = by_input_in_words(scan)
    table = table_of("by_input", scan.by_input, f"Every layer for each {name}")
    return Section("by_input", f"By {name}", parts_of(Words(said), *_panels(scan), table))


def by_input_in_words(scan: ScanResult) -> list[str]:
    """A sentence or two for each stack: at which values findings are; none of runs that tell nothing apart."""
    rows = scan.by_input
    name = visible(str(rows["input"].iloc[0])) if len(rows) else ""
    return [_said(str(stack), mine, name) for stack, mine in rows.groupby("stack", sort=False)]


def small_by_input(scan: ScanResult, view: StackView) -> Table | None:
    """One row for each value: the layer where |h| is largest against the median there, and the findings of all."""
    mine = scan.by_input[(scan.by_input["stack"].fillna("") == view.stack) & (scan.by_input["site"] == view.site)]
    rows = []
    for value, of in mine.groupby("value", sort=True):
        known = of["ratio"].notna().any()
        best = of.loc[of["ratio"].idxmax()] if known else None
        shown = ["-"] * 4 if best is None else [str(int(best["layer"])), *(cell(best[c]) for c in KEPT)]
        rows.append([number(value), *shown, f"{int(of['n_findings'].sum()):,}"])
    name = visible(str(mine["input"].iloc[0])) if len(mine) else ""
    heads = (name, "layer", "top 1", "median", "ratio", "findings")
    return grid(f"By {name}: the layer of the greatest ratio, and the findings of all layers", heads, rows)


def _said(stack: str, rows: pd.DataFrame, name: str) -> str:
    """Where findings are, and where |h| is largest against the median."""
    head = f"{visible(stack)}: " if stack else ""
    values, having = rows["value"].unique(), rows.loc[rows["n_findings"] > 0, "value"].unique()
    best = rows.loc[rows["ratio"].idxmax()] if rows["ratio"].notna().any() else None
    where = ""
    if best is not None:
        where = (
            f" The greatest |h| is {number(best['ratio'])} times the median at {name} {number(best['value'])}, layer "
            f"{int(best['layer'])}."
        )
    if not len(having):
        return f"{head}No findings at any of {counted(len(values), name)}.{where}"
    which = "all" if len(having) == len(values) else f"{len(having)} ({listed([number(v) for v in sorted(having)])})"
    return f"{head}Findings at {which} of {counted(len(values), 'value')} of {name}.{where}"


def draw_by_input(result: ScanResult) -> Sheet | None:
    """The greatest |h| of every layer, a curve for each value that sequences are told apart by; None of other runs."""
    return Sheet(_panels(result), named(result)) if len(result.by_input) else None


def _panels(result: ScanResult) -> list[Panel]:
    made, sees = [], "How large the largest number is at each layer, a curve for each kind of input."
    for (stack, site), rows in result.by_input.groupby(["stack", "site"], sort=False):
        name, values = visible(str(rows["input"].iloc[0])), np.unique(rows["value"])
        chosen = values[np.unique(np.linspace(0, len(values) - 1, min(MOST_CURVES, len(values))).round().astype(int))]
        lines = []
        for value, look in zip(chosen, panels.looks(len(chosen)), strict=True):
            mine = rows[rows["value"] == value].sort_values("layer")
            lines.append(Line(mine["layer"].to_numpy(), mine["top1"].to_numpy(), f"{name} {number(value)}", **look))
        left = f" {len(chosen)} of {len(values)} values are drawn." if len(chosen) < len(values) else ""
        title = f"Greatest |h| of each layer by {name}" + (f": {visible(str(stack))}" if stack else "")
        title += f" ({visible(str(site))})" if site != "resid_post" else ""
        y = panels.log_axis(np.concatenate([line.y for line in lines]), "Greatest |h|")
        made.append(
            Panel(
                title, lines, panels.layer_axis(int(rows["layer"].max())), y, f"Means over sequences.{left}", sees=sees
            )
        )
    return made
