"""The clusters of a scan over layers: where a hump ends and a massive activation begins."""

from __future__ import annotations

import numpy as np
import pandas as pd

from massact.records.clusters import HUMP, MASSIVE, OUTLIER
from massact.records.kinds.scan import ScanResult
from massact.reports import panels
from massact.reports.kinds.scan.curves import measured, named, titled
from massact.reports.kinds.scan.views import Rule, StackView, rule_of
from massact.reports.panels import Color, Limit, Line, Panel, Sheet
from massact.reports.spelling import visible

MOST = 6
COLORS = {MASSIVE: Color.BLUE, OUTLIER: Color.ORANGE, HUMP: Color.PURPLE}


def draw_clusters(result: ScanResult) -> Sheet:
    """Mean |h| of the largest clusters of every layer, with the median and the threshold below them."""
    rule = rule_of(result)
    return Sheet([clusters(view, rule) for view in measured(result)], named(result)) or panels.unmeasured()


def clusters(view: StackView, rule: Rule) -> Panel:
    """Mean |h| of the entries of each of the largest clusters of a stack, of every layer where it has any."""
    title = titled(view, "Clusters over layers")
    rows = view.clusters.head(MOST)
    if not len(rows) or rule.kind != "element":
        said = f"No activation reaches half of every threshold of {rule.name}."
        return Panel(title, empty=said if rule.kind == "element" else f"{rule.name} is not about single activations.")
    at, median = view.column("layer"), view.column("median")
    lines = [_line(row, view, at, i) for i, (_, row) in enumerate(rows.iterrows())]
    lines.append(Line(at, median, "Median", Color.GREY, ""))
    if rule.ratio is not None:
        with np.errstate(over="ignore"):  # of a damaged table; what is infinite is not drawn
            least = np.fmax(rule.ratio * median, rule.magnitude or 0.0)
        lines.append(Line(at, least, "Threshold", Color.LIMIT, "", "dash"))
    onsets = rows[rows["label"].isin([MASSIVE, OUTLIER])].drop_duplicates("label")
    limits = [Limit(row["onset"], f"onset {row['onset']}", True, COLORS[row["label"]]) for _, row in onsets.iterrows()]
    left = len(view.clusters) - len(rows)
    caption = "Mean |h| of the findings and near misses of each cluster; where a line is broken, it has none. "
    caption += "Onset: of the largest massive activation and outlier feature. Threshold: the least |h| that passes."
    caption += f" {left:,} smaller are not drawn." * (left > 0)
    sees = (
        "Each curve is one dim at one kind of position. Above the broken red line it counts as massive: a plateau is "
    )
    sees += "written once and kept, a hump comes and goes, an outlier feature is nearly everywhere at once."
    y = panels.log_axis(np.concatenate([line.y for line in lines]), "Mean |h|")
    x = panels.layer_axis(view.n_layers)
    return Panel(title, lines, x, y, caption, limits=limits, sees=sees, height=340, width="full")


def _line(row: pd.Series, view: StackView, at: np.ndarray, i: int) -> Line:
    """Mean |h| over layers of what a cluster has; two of one dim and class share no layer."""
    both = pd.concat([view.findings, view.near_misses], ignore_index=True)
    key = ["dim", "position_class"]
    entries, same = (table[(table[key] == row[key]).all(axis=1)] for table in (both, view.clusters))
    main = same[same["label"] != HUMP]
    if len(main) and len(same) > 1:
        inside = entries["layer"].between(main["first"].iloc[0], main["last"].iloc[0])
        entries = entries[inside == (row["label"] != HUMP)]
    size = entries.groupby("layer")["magnitude"].mean().reindex(at.astype(int)).to_numpy(float)
    name = f"{visible(row['label']).partition(' ')[0]}: dim {row['dim']}, {visible(row['position_class'])}"
    return Line(at, size, name[0].upper() + name[1:], COLORS.get(row["label"], Color.GREY), panels.SYMBOLS[i])
