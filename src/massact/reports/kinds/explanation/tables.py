"""The small table of an explanation: concentration, value drain and residual norm of each layer."""

from __future__ import annotations

from massact.records.kinds.explanation import Explanation
from massact.reports.parts import Section, narrow, parts_of, table_of
from massact.reports.spelling import visible

HEADS = {
    "layer": "layer",
    "after_onset": "reads\nfindings",
    "concentration": "attention on\nfindings",
    "concentration_uniform": "of a\nuniform head",
    "concentration_first": "on\nposition 0",
    "concentration_first_uniform": "of a\nuniform head",
    "concentration_null": "on random\ntokens",
    "value_drain": "value norm\nratio",
    "residual_norm": "residual\nnorm ratio",
}
WHAT = "Share of attention on the tokens, and norms of those with findings over norms of others (-: unavailable)"


def brief(e: Explanation) -> list[Section]:
    """A table for each stack."""
    made = []
    for stack, rows in e.axes.sort_values("layer", kind="stable").groupby("stack", sort=False, dropna=False):
        looks = ["" if reads else "dim" for reads in rows["after_onset"]]
        title = f"{visible(stack)}: {WHAT}" if stack else WHAT
        made.append(narrow(table_of("axes", rows, title, tuple(HEADS), len(rows)), title, HEADS, looks))
    return [Section("axes", "", parts_of(*made))]
