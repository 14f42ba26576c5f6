"""The section of a trajectory: where in a training massive activations emerge."""

from __future__ import annotations

from typing import Any

from massact.records.kinds.trajectory import Trajectory
from massact.reports import charts
from massact.reports.charts import heat_over_steps
from massact.reports.kinds.trajectory.words import trajectory_in_words
from massact.reports.parts import Chart, Part, Section, Words, parts_of, table_of
from massact.reports.render.markup import figure_text
from massact.reports.spelling import visible


def checkpoints(t: Trajectory) -> Section:
    """Where in a training massive activations emerge, over published checkpoints."""
    parts: list[Part | None] = [Words(trajectory_in_words(t))]
    for (stack, site), rows in t.revisions.groupby(["stack", "site"], sort=False):
        head = f"{visible(stack)} {visible(site)}: " if t.revisions[["stack", "site"]].nunique().max() > 1 else ""
        most = rows.groupby("revision", sort=False)["ratio"].max()
        names = [visible(str(n)) for n in most.index]
        curve = charts.line(range(len(most)), most, "greatest of any layer", "--s1",
                            text=[figure_text(n) for n in names])  # fmt: skip
        at = list(range(0, len(names), max(1, -(-len(names) // 8))))
        layout: dict[str, Any] = {
            "xaxis": {"title": {"text": "Checkpoint"}, "tickmode": "array", "tickvals": at,
                      "ticktext": [figure_text(names[i], 16) for i in at]},
            "yaxis": {"title": {"text": "Ratio"}, **charts.log_axis(most)},
            "showlegend": False,
        }  # fmt: skip
        parts += [Chart(f"{head}Top 1 / median over the training", [curve], layout, "", 320, log=True, width="half"),
                  heat_over_steps(rows, "revision", "ratio", f"{head}Ratio of each layer")]  # fmt: skip
    parts.append(table_of("revisions", t.revisions, "Every checkpoint and layer", most=600))
    return Section("checkpoints", "Checkpoints", parts_of(*parts))
