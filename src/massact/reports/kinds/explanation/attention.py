"""Figures of an explanation: attention maps, three axes, heads, the bias, the writers, the trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.records.rules import BROADCAST, NOP
from massact.reports import panels
from massact.reports.kinds.scan.nouns import nouns_of
from massact.reports.panels import SERIES, Axis, Bars, Color, Heat, Limit, Line, Panel, Sheet
from massact.reports.spelling import visible

MOST_TOKENS = 64  # of a map
MOST_COORDINATES = 4
STAGES = ("hidden", "normed", "q", "k", "v")
GROUPS = (("findings", Color.BLUE, "circle"), ("random", Color.ORANGE, "square"), ("others", Color.GREY, "triangle-up"))
AXES = (
    ("concentration", "Attention on them",
     "How much attention the few tokens with massive activations draw, of all that there is (1)."),
    ("value_drain", "Value norm / that of others",
     "How long what is read from them is: far below 1, they are looked at but say little."),
    ("residual_norm", "Residual norm / that of others",
     "How long their hidden states are: far above 1, because of the massive activations."),
)  # fmt: skip
SHARES = (
    ("constancy", "Spread between queries / mean",
     "How much what they add differs from token to token: near 0, it is a constant, a bias."),
    ("cosine", "Mean cosine between queries", "Whether they add the same direction to all: at 1 they do."),
    ("energy_share", "Share of the output\u2019s energy", "How much of what attention gives comes from them."),
)  # fmt: skip
MASSIVE, RANDOM = (Color.BLUE, "circle", "solid"), (Color.GREY, "square", "dot")
FOUND, FIRST, NULL = "tokens with findings", "position 0", "random tokens"


def stacks_of(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each stack, in the order of the layers."""
    return [(visible(str(name)), rows.sort_values("layer")) for name, rows in table.groupby("stack", sort=False)]


def lines_of(rows: pd.DataFrame, *wanted: tuple[str, str, str, str, str]) -> list[Line]:
    """Curves over layers of the columns that have any value: column, name, colour, symbol, dash."""
    return [
        Line(rows["layer"], panels.column(rows, name), label, *look)
        for name, label, *look in wanted
        if rows[name].notna().any()
    ]


def _values(lines: Sequence[Line]) -> np.ndarray:
    return np.concatenate([np.asarray(line.y, float) for line in lines])


def draw_maps(e: Explanation) -> Sheet | None:
    """Mean logits and probabilities of a prompt, before, at and after the onset (Sun 2024, Figs. 5 and 6)."""
    if not {"probs", "layers", "tokens"} <= set(e.maps):
        return None
    tokens = [panels.token_label(str(t)) for t in e.maps["tokens"]]
    words = nouns_of(e.info.corpus, e.maps["tokens"])
    n, probs = len(tokens), np.asarray(e.maps["probs"], float)
    logits = np.asarray(e.maps["logits"], float) if "logits" in e.maps else None
    unseen = np.triu(np.ones((n, n), bool), 1) & (probs == 0) if logits is None else ~np.isfinite(logits)
    ticks = panels.thinned(range(n), tokens, 24 if n > 40 else 40)
    x = Axis("Key", limits=(-0.5, n - 0.5), ticks=ticks, grid=False)
    y = Axis("Query", limits=(n - 0.5, -0.5), ticks=ticks, grid=False)
    said = [[f"{q} \u2192 {k}" for k in tokens] for q in tokens] if n <= MOST_TOKENS else []
    made, width = [], "half" if len(e.maps["layers"]) in (1, 2, 4) else "third"
    for name, values in (("Logits", logits), ("Attention", probs)):
        if values is None:
            continue
        low, high = panels.ends_of(values, 0.0, 1.0) if name == "Logits" else (0.0, 1.0)
        for layer, one in zip(e.maps["layers"], np.where(unseen, np.nan, values), strict=True):
            heat = Heat(one, range(n), range(n), "mean over heads", low=low, high=high, said=said)
            title = f"{name} of {words.the()}, layer {int(layer)}"
            sees = f"Who looks at whom: a bright column is a {words.position} that nearly all others look at."
            made.append(Panel(title, [heat], x, y, "Row: query; column: key.", sees=sees, height=340, width=width))
    return Sheet(made, page=n <= MOST_TOKENS)


def draw_axes(e: Explanation) -> Sheet | None:
    """Concentration, value drain and residual norm of every layer, side by side and never merged."""
    return Sheet([panel for stack, rows in stacks_of(e.axes) for panel in _axes(stack, rows)]) or None


def _axes(stack: str, rows: pd.DataFrame) -> list[Panel]:
    first, null = (FIRST, Color.GREEN, "triangle-up", "dash"), (NULL, *RANDOM)
    uniform = [(f"concentration{of}_uniform", f"{what}, uniform head", color, symbol, "dot") for of, what, color, symbol
               in (("", FOUND, *MASSIVE[:2]), ("_first", FIRST, *first[1:3]))]  # fmt: skip
    after, layers = rows.loc[rows["after_onset"], "layer"], panels.layer_axis(int(rows["layer"].max()))
    shades = [(float(after.min()) - 0.5, float(after.max()) + 0.5)] if len(after) else []
    said, made = "Shaded: blocks that read findings." if shades else "", []
    for name, title, sees in AXES:
        others = ((f"{name}_first", *first), (f"{name}_null", *null), *uniform)
        lines = lines_of(rows, (name, FOUND, *MASSIVE), *(x for x in others if x[0].startswith(name) and x[0] in rows))
        axis, limits = panels.share_axis(), []
        if lines and name != "concentration":
            axis, limits = panels.log_axis(_values(lines)), [Limit(1.0, color=Color.MUTED)]
        title = panels.headed(stack, title)
        given = (title, lines, layers, axis, said, "", limits, shades)
        made.append(Panel(*given, sees=sees, width="third"))
    return made


def draw_own(e: Explanation) -> Sheet | None:
    """Attention on the sink beside attention on a query's own key, and what the sinks' values add (Fesser 2026)."""
    made = []
    for stack, rows in stacks_of(e.axes[e.axes["diagonal"].notna()]):
        given = (("concentration", FOUND, *MASSIVE), ("concentration_first", FIRST, Color.GREEN, "triangle-up", "dash"),
                 ("diagonal", "own key", Color.ORANGE, "square", "solid"),
                 ("diagonal_uniform", "own key, uniform head", Color.GREY, "", "dot"))  # fmt: skip
        layers = panels.layer_axis(int(rows["layer"].max()))
        sees = "Where a head with nothing to fetch looks: at the sink, or at the token itself."
        title = panels.headed(stack, "Attention on the sink and on the own key")
        made.append(Panel(title, lines_of(rows, *given), layers, panels.share_axis(), sees=sees))
        made += _types(stack, e.heads[(e.heads["kind"] == "attention") & (e.heads["stack"] == rows["stack"].iloc[0])])
    return Sheet(made) or None


def _types(stack: str, heads: pd.DataFrame) -> list[Panel]:
    looks = (("nop", Color.BLUE, "circle"), ("between", Color.GREY, "square"), ("broadcast", Color.ORANGE, "diamond"))
    points, at = list[Line](), list[np.ndarray]()
    for kind, color, symbol in looks:
        mine = heads[(heads["sink_type"] == kind) & heads["value_norm_first"].notna()]
        if len(mine):
            said = [f"layer {int(r.layer)}, head {int(r.head)}" for r in mine.itertuples()]
            at.append(panels.column(mine, "value_norm_first"))
            points.append(Line(panels.column(mine, "mass_first"), at[-1], kind, color, symbol, "", said=said))
    x, y = panels.share_axis("Attention on position 0"), panels.log_axis(np.concatenate(at) if at else [])
    sees = "Each point is a head with a sink: low ones look at it and take next to nothing from it (no-op)."
    title = panels.headed(stack, "What sinks give: value norm of position 0 over that of others")
    limits = [Limit(value, color=Color.MUTED) for value in (NOP, BROADCAST)]
    return [Panel(title, points, x, y, "Lines: no-op below, broadcast above.", limits=limits, sees=sees)] if at else []


def draw_heads(e: Explanation) -> Sheet | None:
    """Attention on the tokens with findings (on position 0 where there are none) of every head."""
    made = []
    for stack, rows in stacks_of(e.heads[e.heads["kind"] == "attention"]):
        name, what = ("mass_findings", FOUND) if rows["mass_findings"].notna().any() else ("mass_first", FIRST)
        table = rows.pivot_table(index="head", columns="layer", values=name, dropna=False)
        heads, layers = ([int(i) for i in index] for index in (table.index, table.columns))
        heat = Heat(table.to_numpy(float), layers, heads, "mean probability", low=0.0, high=1.0)
        x, y = panels.cell_axis("Layer", layers), panels.cell_axis("Head", heads)
        title = panels.headed(stack, f"Attention of each head on {what}")
        known = [heat] * bool(rows[name].notna().any())
        sees = "Each cell is one attention head: a dark one looks at hardly anything but these tokens (a sink)."
        made.append(Panel(title, known, x, y, "Mean over the queries that are none of them.", sees=sees))
    return Sheet(made) or None


def draw_bias(e: Explanation) -> Sheet | None:
    """What the tokens with findings add to all others, beside random tokens (Sun 2024, Fig. 8)."""
    measured, made = e.decomposition[e.decomposition["constancy"].notna()], []
    part = next((p for p in ("projected", "concat", "head") if (measured["part"] == p).any()), "")
    for stack, rows in stacks_of(measured[measured["part"] == part]):
        layers = panels.layer_axis(int(rows["layer"].max()))
        for name, title, sees in SHARES:
            lines = lines_of(rows, (name, FOUND, *MASSIVE), (f"null_{name}", NULL, *RANDOM))
            axis = panels.log_axis(_values(lines)) if lines and name != "cosine" else Axis()
            said = f"Of what they add, {part}."
            made.append(Panel(panels.headed(stack, title), lines, layers, axis, said, sees=sees, width="third"))
    return Sheet(made) or None


def draw_writers(e: Explanation) -> Sheet | None:
    """What every submodule adds to the most frequent coordinates, layer by layer."""
    made = []
    for (stack, dim, place), rows in list(e.writers.groupby(["stack", "dim", "position_class"], sort=False)):
        names = list(dict.fromkeys(rows["submodule"]))
        sums = [rows[rows["submodule"] == name].groupby("layer")["write"].sum() for name in names]
        bars = [
            Bars(mine.index, mine.to_numpy(float), visible(name), SERIES[i % len(SERIES)])
            for i, (name, mine) in enumerate(zip(names, sums, strict=True))
        ]
        where = ", ".join(x for x in (visible(place), visible(stack)) if x)
        x, y, nothing = panels.layer_axis(int(rows["layer"].max())), Axis("Added to it"), Limit(0.0, color=Color.MUTED)
        title, said = f"Dim {int(dim)} ({where}): who writes it", "Signed mean over its tokens."
        sees = "Which part of the model writes this number: a tall bar makes it, one downwards takes it away."
        made.append(Panel(title, bars, x, y, said, limits=[nothing], sees=sees, width="full"))
    return Sheet(made[:MOST_COORDINATES]) or None


def draw_trajectory(e: Explanation) -> Sheet | None:
    """How alike the tokens with findings are from the hidden state to q, k and v (Sun 2024, Fig. 7)."""
    stages, made = range(len(STAGES)), []
    x = Axis(limits=(-0.3, len(STAGES) - 0.7), ticks=list(zip(map(float, stages), STAGES, strict=True)))
    for stack, axes in stacks_of(e.axes[e.axes["after_onset"]]):
        layer = int(axes["layer"].min())
        rows = e.trajectory[
            (e.trajectory["stack"].fillna("") == axes["stack"].iloc[0]) & (e.trajectory["layer"] == layer)
        ]
        sparsity = "Sparsity of a token (1: a single entry)"
        for name, title, sees in (
            (
                "cosine",
                "Mean cosine of two tokens",
                "How alike these tokens are on their way into attention: at 1, the same.",
            ),
            ("sparsity", sparsity, "How much of a token is one number: at 1, all of it; the norm leaves nothing else."),
        ):
            lines = []
            for group, color, symbol in GROUPS:
                mine = rows[rows["group"] == group].drop_duplicates("stage").set_index("stage")
                values = mine[name].reindex(STAGES).to_numpy(float)
                if np.isfinite(values).any():
                    lines.append(Line(stages, values, group, color, symbol, said=STAGES))
            title = panels.headed(stack, f"{title}, layer {layer}")
            made.append(Panel(title, lines, x, caption="As Fig. 7 of Sun 2024.", sees=sees))
    return Sheet(made) or None


EXPLAIN_FIGURES: dict[str, Callable[[Explanation], Sheet | None]] = {
    "attention_maps": draw_maps,
    "attention_axes": draw_axes,
    "attention_heads": draw_heads,
    "attention_own": draw_own,
    "attention_bias": draw_bias,
    "writers": draw_writers,
    "trajectory": draw_trajectory,
}
