"""The small table of an explanation: concentration, value drain and residual norm of each layer."""

from __future__ import annotations

from massact.records.kinds.explanation import Explanation
from massact.reports.parts import Section, narrow, parts_of, table_of
from massact.reports.spelling import visible

HEADS = {
    "layer": "layer",
    "after_onset": "reads",
    "concentration": "on\nfindings",
    "concentration_uniform": "were all\nalike",
    "concentration_first": "on\npos. 0",
    "concentration_first_uniform": "were all\nalike",
    "concentration_null": "on\nrandom",
    "value_drain": "value\nnorm",
    "residual_norm": "residual\nnorm",
}
WHAT = (
    "Shares of attention on tokens with findings (beside: of a head that looks at all alike) and as many random "
    "ones; norms of the first over those of others; reads: the block reads findings; -: unavailable"
)


def brief(e: Explanation) -> list[Section]:
    """A table for each stack."""
    made = []
    for stack, rows in e.axes.sort_values("layer", kind="stable").groupby("stack", sort=False, dropna=False):
        looks = ["" if reads else "dim" for reads in rows["after_onset"]]
        title = f"{visible(stack)}: {WHAT}" if stack else WHAT
        made.append(narrow(table_of("axes", rows, title, tuple(HEADS), len(rows)), title, HEADS, looks))
    return [Section("axes", "", parts_of(*made))]
