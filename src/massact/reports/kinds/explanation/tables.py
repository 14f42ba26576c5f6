"""The small table of an explanation: concentration, value drain and residual norm of each layer."""

from __future__ import annotations

from massact.records.kinds.explanation import Explanation
from massact.reports.parts import Section, grid, parts_of
from massact.reports.spelling import or_dash, visible

COLUMNS = ("concentration", "concentration_first", "concentration_null", "value_drain", "residual_norm")
HEADS = ("<", "layer", "attention on\nfindings", "on\nposition 0", "on random\ntokens", "value norm\nratio",
         "residual\nnorm ratio")  # fmt: skip
MARKS = "|: the block reads findings; -: unavailable"
WHAT = "Share of attention on the tokens, and norms of those with findings over norms of others"


def brief(e: Explanation) -> list[Section]:
    """A table for each stack."""
    made = []
    for stack in dict.fromkeys(e.axes["stack"]):
        axes = e.axes[e.axes["stack"] == stack].sort_values("layer")
        reads = [bool(x) for x in axes["after_onset"]]
        rows = [["|" * on, str(row["layer"]), *(or_dash(row[c]) for c in COLUMNS)]
                for on, (_, row) in zip(reads, axes.iterrows(), strict=True)]  # fmt: skip
        name = f"{visible(str(stack))}: " if stack else ""
        made.append(grid(f"{name}{WHAT} ({MARKS})", HEADS, rows, ["" if on else "dim" for on in reads]))
    return [Section("axes", "", parts_of(*made))]
