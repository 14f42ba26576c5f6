"""Sections of an explanation: attention, the bias that is added, who writes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.reports import charts
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.parts import Chart, Part, Section, Words, parts_of, table_of
from massact.reports.render.markup import figure_text
from massact.reports.spelling import visible

STAGES = ("hidden", "normed", "q", "k", "v")
MOST_COORDINATES, MOST_TOKENS = 3, 64


def attention(e: Explanation) -> Section:
    """How much attention goes to the tokens with findings, their values and norms, sinks (Sun 2024, Figs. 5 and 6)."""
    parts: list[Part | None] = [Words(story_in_words(e))]
    for stack, rows in _stacks(e.axes):
        parts += _axes(stack, rows)
    parts += [*_heads(e), *_maps(e)]
    if not any(isinstance(part, Chart) for part in parts):
        parts.append(Words(["Statistics of attention are unavailable in this run; the notes say why."]))
    sinks = e.sinks.sort_values("heads", ascending=False, kind="stable")
    parts += [
        table_of("axes", e.axes, "Concentration, value drain and residual norm of each layer", shown_first=True),
        table_of("heads", e.heads, "Heads", most=1200),
        table_of("sinks", sinks, "Sinks, those of most heads first", most=100),
        table_of("positions", e.positions.sort_values("alpha", ascending=False, kind="stable"),
                 "Positions, those with most attention first", most=100),
    ]  # fmt: skip
    return Section("attention", "Attention", parts_of(*parts))


def _stacks(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(visible(str(name)), rows.sort_values("layer")) for name, rows in table.groupby("stack", sort=False)]


def _curves(rows: pd.DataFrame, wanted: tuple[tuple[str, str, str, str], ...]) -> list[dict]:
    """Curves over layers of the columns that have any value."""
    return [
        charts.line(rows["layer"], rows[column], name, color, dash=dash)
        for column, name, color, dash in wanted if rows[column].notna().any()
    ]  # fmt: skip


def _axes(stack: str, rows: pd.DataFrame) -> list[Part]:
    after, n = rows.loc[rows["after_onset"], "layer"], int(rows["layer"].max())
    shapes = [charts.shade(float(after.min()), float(after.max()))] if len(after) else []
    head = f"{stack}: " if stack else ""
    found, first, null = ("tokens with findings", "--s1", "solid"), ("position 0", "--s3", "dash"), (
        "random tokens", "--s6", "dot")  # fmt: skip
    panels = (
        ("Attention on them", False,
         (("concentration", *found), ("concentration_first", *first), ("concentration_null", *null))),
        ("Value norm / that of others", True, (("value_drain", *found), ("value_drain_first", *first))),
        ("Residual norm / that of others", True, (("residual_norm", *found),)),
    )  # fmt: skip
    made: list[Part] = []
    for title, log, wanted in panels:
        data = _curves(rows, wanted)
        if not data:
            made.append(Words([f"{head}{title}: unavailable in this run."]))
            continue
        values = np.concatenate([rows[column].to_numpy(float) for column, *_ in wanted])
        layout = charts.layer_layout(n, "", log=log, values=values) | {"shapes": shapes}
        if not log:
            layout["yaxis"] |= {"range": [-0.03, 1.03]}
        made.append(Chart(f"{head}{title}", data, layout, "Shaded: blocks that read findings." if len(after) else "",
                          290, width="third"))  # fmt: skip
    return made


def _heads(e: Explanation) -> list[Part]:
    made: list[Part] = []
    for stack, rows in _stacks(e.heads[e.heads["kind"] == "attention"]):
        column = "mass_findings" if rows["mass_findings"].notna().any() else "mass_first"
        if not rows[column].notna().any():
            continue
        table = rows.pivot_table(index="head", columns="layer", values=column, dropna=False)
        what = "tokens with findings" if column == "mass_findings" else "position 0"
        data = [charts.heat(table.to_numpy(float), [int(x) for x in table.columns], [int(y) for y in table.index],
                            what="layer %{x}, head %{y}")]  # fmt: skip
        layout = {"xaxis": {"title": {"text": "Layer"}, "showgrid": False, "dtick": max(1, len(table.columns) // 8)},
                  "yaxis": {"title": {"text": "Head"}, "showgrid": False,
                            "dtick": max(1, len(table) // 8)}}  # fmt: skip
        made.append(Chart(f"{stack + ': ' if stack else ''}Attention of each head on {what}", data, layout,
                          "Mean over the queries that are none of them.", 320, width="half"))  # fmt: skip
    return made


def _maps(e: Explanation) -> list[Part]:
    """Probabilities of the prompt, mean over heads, where it is short enough for a map."""
    if not {"probs", "layers", "tokens"} <= set(e.maps):
        return []
    tokens = [figure_text(visible(str(t)), 14) for t in e.maps["tokens"]]
    if len(tokens) > MOST_TOKENS:
        return [Words([f"The attention maps of the prompt ({len(tokens):,} tokens) are in figures/attention_maps."])]
    made: list[Part] = []
    at = list(range(len(tokens)))
    ticks = {"tickmode": "array", "tickvals": at if len(at) <= 24 else at[:: -(-len(at) // 24)], "showgrid": False}
    ticks |= {"ticktext": [tokens[i] for i in ticks["tickvals"]], "tickfont": {"size": 9}, "automargin": True}
    for layer, probs in zip(e.maps["layers"], np.asarray(e.maps["probs"], float), strict=True):
        masked = np.where(np.triu(np.ones_like(probs, bool), 1) & (probs == 0), np.nan, probs)
        data = [charts.heat(masked, at, at, what="mean over heads",
                            text=[[f"{q} \u2192 {k}" for k in tokens] for q in tokens])]  # fmt: skip
        layout = {"xaxis": {**ticks, "tickangle": -90}, "yaxis": {**ticks, "autorange": "reversed"}}
        made.append(Chart(f"Attention of the prompt, layer {int(layer)}", data, layout, "Row: query; column: key.", 340,
                          width="third"))  # fmt: skip
    return made


def bias(e: Explanation) -> Section | None:
    """What these tokens add to all others: constant or not (Sun 2024, Eq. 2 and Figs. 7 and 8)."""
    if not (len(e.decomposition) or len(e.trajectory)):
        return None
    parts: list[Part | None] = []
    measured = e.decomposition[e.decomposition["constancy"].notna()]
    part = next((p for p in ("projected", "concat", "head") if (measured["part"] == p).any()), "")
    for stack, rows in _stacks(measured[measured["part"] == part]):
        head, n = f"{stack}: " if stack else "", int(rows["layer"].max())
        for column, title, log in (("constancy", "Spread between queries / mean", True),
                                   ("cosine", "Mean cosine between queries", False),
                                   ("energy_share", "Share of the output\u2019s energy", True)):  # fmt: skip
            data = _curves(rows, ((column, "tokens with findings", "--s1", "solid"),
                                  (f"null_{column}", "random tokens", "--s6", "dot")))  # fmt: skip
            values = rows[[column, f"null_{column}"]].to_numpy(float)
            parts.append(Chart(f"{head}{title}", data, charts.layer_layout(n, "", log=log, values=values),
                               f"Of what they add, {part}.", 290, width="third"))  # fmt: skip
    parts += _likeness(e)
    if not parts:
        parts.append(Words(["No block reads a hidden state with findings, so there is nothing that they add."]))
    parts += [
        table_of("decomposition", e.decomposition, "Decomposition: what the tokens with findings add to the others",
                 most=600),
        table_of("trajectory", e.trajectory, "From the hidden state to q, k and v", most=600),
    ]  # fmt: skip
    return Section("bias", "What they add to the others", parts_of(*parts))


def _likeness(e: Explanation) -> list[Part]:
    """How alike two such tokens are from the hidden state to q, k, v, in the first block that reads findings."""
    made: list[Part] = []
    for stack, axes in _stacks(e.axes[e.axes["after_onset"]]):
        layer = int(axes["layer"].min())
        rows = e.trajectory[(e.trajectory["stack"].fillna("") == axes["stack"].iloc[0]) & (
            e.trajectory["layer"] == layer)]  # fmt: skip
        sparsity = "Sparsity of a token (1: a single entry)"
        for column, title in (("cosine", "Mean cosine of two tokens"), ("sparsity", sparsity)):
            data = []
            for group, color in (("findings", "--s1"), ("random", "--s2"), ("others", "--s6")):
                values = rows[rows["group"] == group].set_index("stage")[column].reindex(STAGES)
                if values.notna().any():
                    data.append(charts.line(range(len(STAGES)), values, group, color, text=STAGES))
            if data:
                layout = {"xaxis": {"tickmode": "array", "tickvals": list(range(len(STAGES))), "ticktext": STAGES}}
                made.append(Chart(f"{stack + ': ' if stack else ''}{title}, layer {layer}", data, layout,
                                  "As Fig. 7 of Sun 2024.", 290, width="half"))  # fmt: skip
    return made


def writers(e: Explanation) -> Section | None:
    """Which submodule, neuron or weight writes the massive dims, and which takes them away."""
    if not (len(e.writers) or len(e.norm_weights)):
        return None
    parts: list[Part | None] = []
    groups = list(e.writers.groupby(["stack", "dim", "position_class"], sort=False))
    for (stack, dim, place), rows in groups[:MOST_COORDINATES]:
        data = []
        for i, name in enumerate(dict.fromkeys(rows["submodule"])):
            mine = rows[rows["submodule"] == name].groupby("layer")["write"].sum()
            data.append({
                "type": "bar", "name": figure_text(name), "x": [int(x) for x in mine.index],
                "y": charts.drawable(mine), "marker": {"color": charts.SERIES[i % len(charts.SERIES)]},
                "hovertemplate": "%{fullData.name}, layer %{x}: %{y:+.4~g}<extra></extra>",
            })  # fmt: skip
        layout = charts.layer_layout(int(rows["layer"].max()), "Added to it") | {"barmode": "group"}
        title = f"Dim {int(dim)} ({visible(place)}{', ' + visible(stack) if stack else ''}): who writes it"
        parts.append(Chart(title, data, layout, "Signed mean over its tokens.", 300))
    if len(groups) > MOST_COORDINATES:
        parts.append(Words([f"{len(groups) - MOST_COORDINATES:,} more coordinates are in the table."]))
    roles = e.writers.assign(size=e.writers["share"].abs()).sort_values("size", ascending=False, kind="stable")
    parts += [
        table_of("writers", roles, "Writers, the largest share first"),
        table_of("neurons", e.neurons, "Neurons and experts behind each step"),
        table_of("norm_weights", e.norm_weights, "Norm weights at these dims"),
    ]
    return Section("writers", "Who writes them", parts_of(*parts))
