"""What every published rule says of a model: a table, and a sentence where they disagree."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.views import StackView
from massact.reports.parts import Section, Table, Words, grid, parts_of, table_of
from massact.reports.spelling import counted, listed, number, numbered, percent, real, spanned, visible
from massact.reports.stack_words import said_once

MAIN = ("stack", "site", "criterion", "own", "verdict", "reason", "kind", "thresholds", "n_findings", "at_least",
        "layers", "dims", "n_tokens", "token_share", "statistic", "greatest", "greatest_layer")  # fmt: skip
MOST_DIMS = 3
NOUNS = {"token": "tokens", "dim": "dims", "layer": "layers"}


def criteria(scan: ScanResult) -> Section | None:
    """All criteria side by side, and where they disagree."""
    if not len(scan.criteria):
        return None
    said = said_once([(str(stack), disagreement(rows)) for stack, rows in scan.criteria.groupby("stack", sort=False)])
    title = "What each published rule says (yes: something passes)"
    return Section("criteria", "All criteria", parts_of(
        Words(said) if said else None, table_of("criteria", scan.criteria, title, MAIN, shown_first=True)))  # fmt: skip


def disagreement(rows: pd.DataFrame) -> list[str]:
    """One sentence, where some rules say yes and some no."""
    yes, no = (rows[rows["verdict"] == verdict] for verdict in ("yes", "no"))
    if not len(yes) or not len(no):
        return []
    told = [f"{visible(r.criterion)} (at {spanned('layer', _numbers(r.layers))})" for r in yes.itertuples()]
    return [f"The published rules disagree: {listed(told)} {'say' if len(told) > 1 else 'says'} yes, "
            f"{listed([visible(n) for n in no['criterion']])} {'say' if len(no) > 1 else 'says'} no."]  # fmt: skip


def small(scan: ScanResult, view: StackView) -> Table | None:
    """One row per rule, for narrow places."""
    mine = scan.criteria[scan.criteria["stack"].fillna("") == view.stack]
    mine = mine[mine["site"].isin([view.site, *(["mlp_act"] if view.site == "resid_post" else [])])]
    rows = [_row(r) for r in mine.itertuples()]
    heads = ("<rule", "<verdict", "<what passes", "<layers", "<dims", "tokens")
    looks = ["" if r.verdict in ("yes", "reported") else "dim" for r in mine.itertuples()]
    return grid("All criteria (each with its published constants; that of this run: *)", heads, rows, looks)


def _row(r: Any) -> list[str]:
    """The cells of one rule."""
    name = visible(r.criterion) + "*" * bool(r.own)
    if r.verdict == "reported":
        what = f"{visible(r.statistic)} is at most {number(r.greatest, 4)}, at layer {int(r.greatest_layer)}"
        return [name, "-", what, "", "", ""]
    if r.verdict != "yes":
        return [name, visible(r.verdict), visible(r.reason), "", "", ""]
    what = f"{'at least ' * bool(r.at_least)}{counted(int(real(r.n_findings)), 'finding')}"
    dims, share = _numbers(r.dims), real(r.token_share)
    left = max(0, int(real(r.n_dims)) - MOST_DIMS) if real(r.n_dims) > 0 else 0
    named = numbered("dim", dims[:MOST_DIMS], also=left) if dims else ""
    tokens = f"{int(real(r.n_tokens)):,} ({percent(share)})" if share == share else ""
    return [name, "yes", what, spanned("layer", _numbers(r.layers)).removeprefix("layers ").removeprefix("layer "),
            named.removeprefix("dims ").removeprefix("dim "), tokens]  # fmt: skip


def _numbers(text: Any) -> list[int]:
    """Whole numbers that a table holds as a JSON list."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return []
    return [x for x in found if type(x) is int] if isinstance(found, list) else []
