"""What a model loses in low precision: in words, with the two columns of its errors, as tables and as figures."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from massact.records.kinds.quantisation import EXPORT, Quantisation
from massact.records.verdicts import HARMFUL, HARMLESS, HELPFUL, LEAST, OPEN, UNTESTED, judged
from massact.reports.kinds.intervention import margin_of
from massact.reports.kinds.scan.nouns import in_nouns
from massact.reports.panels import (
    Color,
    Heat,
    Limit,
    Line,
    Panel,
    Points,
    Sheet,
    cell_axis,
    column,
    layer_axis,
    log_axis,
    looks,
    named_axis,
    symlog_axis,
)
from massact.reports.parts import Code, Section, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import counted, listed, noted, number, percent, real, signed, visible

SEVERAL = ("tensor", "channel", "head")  # one scale serves several tokens
LOOKS = {HARMFUL: (Color.LIMIT, "diamond"), HARMLESS: (Color.GREEN, "circle"), OPEN: (Color.GREY, "square"),
         HELPFUL: (Color.BLUE, "diamond"), UNTESTED: (Color.MUTED, "circle")}  # fmt: skip
RANK = {HARMLESS: 0, HELPFUL: 0, HARMFUL: 2}  # of advice; what is not settled lies between
MOST_GUILTY, MOST_ADVICE, MOST_LINES = 6, 4, 4


def losses(q: Quantisation) -> pd.DataFrame:
    """The row of every scheme that is about its loss."""
    return q.quantised[q.quantised["metric"] == "nll"].reset_index(drop=True)


def in_words(q: Quantisation) -> list[str]:
    """Put a quantisation into sentences: what massive activations cost and where, what helps, what to do."""
    rows, margin = losses(q), margin_of(q)
    if not len(rows):
        return [_moved(q), *noted(q.info.notes)]
    said = [*_costs(q, rows, margin), *_rotation(q), *_others(q), *_guilty(q), *_advice(q, rows, margin)]
    return [*said, *_files(q), _tokens(q, rows), _meaning(margin), *noted(q.info.notes)]


def _files(q: Quantisation) -> list[str]:
    """The recipes that were written."""
    if not q.info.exports:
        return []
    of = visible(str(q.info.exported))
    return [f"Recipes of {of}: {listed([visible(f'{EXPORT}/{name}') for name in q.info.exports])}."]


def divergences(q: Quantisation) -> pd.DataFrame:
    """The row of every scheme that is about how far predictions move, for models that have no loss."""
    rows = q.quantised[q.quantised["metric"] == "kl"].reset_index(drop=True)
    return rows.assign(delta_nats=rows["delta"], nats_low=rows["ci_low"], nats_high=rows["ci_high"])


def _moved(q: Quantisation) -> str:
    """What schemes do to a model that predicts no tokens of the text: a classifier, a masked model without a mask."""
    rows = divergences(q)
    if not len(rows):
        return "No scheme was run."
    each = listed([f"{visible(r['scheme'])} {_loss(r)}" for _, r in rows.iterrows()], 2 * MOST_ADVICE)
    return (
        f"There is no loss of tokens: the model predicts none of the text, or gives no numbers for them in full "
        f"precision. Its predictions move (KL) by: {each}."
    )


def _tokens(q: Quantisation, rows: pd.DataFrame) -> str:
    """What all of it is of."""
    massive, base = q.info.massive, rows["baseline"].iloc[0]
    names = listed([visible(str(x)) for x in massive.get("clusters") or []], 4)
    tokens = int(real(massive.get("tokens") or 0))
    which = f"massive tokens are {tokens:,} ({names})" if tokens else "there are no massive tokens"
    return (
        f"{_at(q)}Losses of {visible(q.info.evaluated_on)} ({number(base)} nats in full precision), scales of "
        f"{visible(q.info.calibrated_on)}; {which}."
    )


def _at(q: Quantisation) -> str:
    """That only some sites were quantised, whatever the names of schemes say."""
    sites = q.info.config.get("sites") or []
    return f"Activations at {listed([visible(str(s)) for s in sites])} alone. " if sites else ""


def _meaning(margin: float) -> str:
    return (
        f"Of the loss, harmful: its whole 95% interval is beyond {number(margin)} nats; harmless: all of it is within "
        f"that; else, and below {LEAST} sequences, not settled. In the table agreement of answers has its own verdicts."
    )


def _within(row: pd.Series, low: str, high: str) -> str:
    if math.isnan(real(row[low])):
        return "no interval"
    return f"{number(row[low])} to {number(row[high])}"


def _saved(q: Quantisation, remedy: str) -> pd.DataFrame:
    return q.remedies[q.remedies["remedy"] == remedy]


def _saved_alone(q: Quantisation, rows: pd.DataFrame) -> pd.DataFrame:
    """What exempting massive tokens saves in schemes with nothing else done to them."""
    plain = ~(rows["rotated"] | rows["smoothed"].notna() | rows["inserted"] | rows["slots"] | rows["exempt"])
    mine = _saved(q, "exempt")
    return mine[mine["scheme"].isin(rows.loc[plain, "scheme"])]


def _verdict(row: pd.Series, margin: float) -> str:
    """Whether a remedy saves more than the margin: by the rule of all verdicts."""
    return judged(real(row["saved_low"]), real(row["saved_high"]), real(row["n_sequences"]), margin)


def cost_in_brief(q: Quantisation) -> str:
    """What massive activations cost at most in the schemes that were tried, in a sentence; "" where nobody knows."""
    margin, mine = margin_of(q), _saved_alone(q, losses(q))
    if not len(mine):
        return ""
    worst = mine.sort_values("saved_nats", ascending=False).iloc[0]
    if _verdict(worst, margin) != HARMFUL:
        tried = counted(len(mine), "scheme")
        return f"In none of {tried} of low precision do they cost more than {number(margin)} nats for certain."
    return (
        f"In low precision they cost up to {number(worst['saved_nats'])} nats a token "
        f"({_within(worst, 'saved_low', 'saved_high')}; {visible(worst['scheme'])}): exempt their tokens, or "
        "remove them (massact fold)."
    )


def _costs(q: Quantisation, rows: pd.DataFrame, margin: float) -> list[str]:
    """What massive activations cost: each scheme beside the same with massive tokens exempt, nothing else done."""
    sharing = dict(zip(rows["scheme"], rows["sharing"], strict=True))
    mine = _saved_alone(q, rows)
    if not len(mine):
        worst = rows.iloc[int(rows["delta_nats"].fillna(-math.inf).to_numpy().argmax())]
        greatest = f"The greatest loss is that of {visible(worst['scheme'])}: {_loss(worst)}."
        if not int(real(q.info.massive.get("tokens") or 0)):
            return [f"No token is massive here, so none of it is of massive activations. {greatest}"]
        return [
            f"{greatest} What massive activations have to do with it is not measured here: no scheme "
            "was run both with and without them in its scales."
        ]
    found: dict[str, list[str]] = {"cost": [], "contained": [], "open": []}
    for _, row in mine.sort_values("saved_nats", ascending=False).iterrows():
        verdict, name = _verdict(row, margin), visible(row["scheme"])
        cost = f"{number(row['saved_nats'])} ({_within(row, 'saved_low', 'saved_high')})"
        if verdict == HARMFUL:
            found["cost"].append(
                f"{name} loses {number(row['before_nats'])} nats, {number(row['after_nats'])} with massive tokens "
                f"exempt: "
                f"they cost {cost}"
            )
        else:
            found["contained" if verdict == HARMLESS else "open"].append(f"{name} {cost}")
    one = {sharing.get(s) for s in mine["scheme"][[_verdict(r, margin) == HARMFUL for _, r in mine.iterrows()]]}
    said = []
    if found["cost"]:
        where = "Where one scale serves several tokens, massive" if one <= {*SEVERAL, "mixed"} else "Massive"
        said.append(f"{where} activations cost: {'; '.join(found['cost'])}.")
    else:
        said.append("In none of these schemes do massive activations cost more than the margin for certain.")
    if found["contained"]:
        said.append(f"Contained, exempting them changes the loss by less than {number(margin)} nats: "
                    f"{'; '.join(found['contained'])}.")  # fmt: skip
    if found["open"]:
        said.append(f"Not settled, what exempting them saves: {'; '.join(found['open'])}.")
    return said


def _loss(row: pd.Series) -> str:
    return f"{number(row['delta_nats'])} nats ({_within(row, 'nats_low', 'nats_high')})"


def _rotation(q: Quantisation) -> list[str]:
    """Whether a rotation needs the exemption too."""
    exempt, said = _saved(q, "exempt"), []
    for _, row in _saved(q, "hadamard").iterrows():
        both = exempt[exempt["scheme"] == row["remedied"]]
        if not len(both) or "exempt" in str(row["scheme"]).split("+"):
            continue
        last = both.iloc[0]
        verdict = _verdict(last, margin_of(q))
        needs = {
            HARMFUL: "so the rotation needs the exemption too",
            HARMLESS: "so the rotation does without the exemption",
        }.get(verdict, "which is more than nothing, not surely more than the margin" if real(last["saved_low"]) > 0
              else "which is not settled")  # fmt: skip
        said.append(
            f"A rotation takes {visible(row['scheme'])} from {number(row['before_nats'])} to "
            f"{number(row['after_nats'])} "
            f"nats, with massive tokens exempt to {number(last['after_nats'])}: the exemption saves "
            f"{number(last['saved_nats'])} more ({_within(last, 'saved_low', 'saved_high')}), {needs}."
        )
    return said


def _others(q: Quantisation) -> list[str]:
    """What the other remedies do."""
    said = []
    for remedy in ("insert", "slots", "smooth", "smooth-all", "super"):
        mine = [
            f"{visible(r['scheme'])} {number(r['before_nats'])} to {number(r['after_nats'])} nats (saves "
            f"{_within(r, 'saved_low', 'saved_high')})"
            for _, r in _saved(q, remedy).iterrows()
        ]
        if mine:
            said.append(f"{REMEDY[remedy]}: {'; '.join(mine)}.")
    return said


REMEDY = {
    "insert": "Massive tokens as one constant vector",
    "slots": "Massive activation folded into slots",
    "smooth": "SmoothQuant at attn_in and mlp_in (ssm_in, ...)",
    "smooth-all": "SmoothQuant at all sites",
    "super": "Super weights spared",
}


def _guilty(q: Quantisation) -> list[str]:
    """Which sites are guilty, and how many of them have to stay."""
    rows = q.guilty_sites
    run = rows[rows["delta_nats"].notna()]
    if len(run) < 2:
        return []
    goal = q.info.goal
    meeting = run[~(run["nats_low"] > goal)]
    last = meeting.iloc[0] if len(meeting) else run.iloc[-1]
    worst = rows[(rows["left_out"] > 0) & (rows["left_out"] <= max(1, int(last["left_out"])))]
    names = [_named(q, r) for _, r in worst.iterrows()]
    n = int(last["left_out"])
    end = f"with {'it' if n == 1 else f'these {n}'} in full precision the loss is {_loss(last)}"
    stop = ", where its interval reaches down to" if not real(last["nats_low"]) > goal else ", still beyond"
    errors = listed([percent(x, 2) for x in worst["local_rest"].iloc[:3]])
    return [
        f"Guilty in {visible(last['scheme'])}, by the error that each makes alone: {listed(names, MOST_GUILTY)} "
        f"(errors {errors} of the hidden state of other tokens); {end}, from {_loss(run.iloc[0])}{stop} the goal of "
        f"{number(goal)} nats.{_why(q, worst.iloc[0])}"
    ]


def _site_row(q: Quantisation, row: pd.Series) -> pd.Series | None:
    """The row of a guilty site in the table of all."""
    sites = q.quantised_sites
    mine = sites[(sites["scheme"] == row["scheme"]) & (sites["layer"] == row["layer"]) & (sites["site"] == row["site"])]
    return mine.iloc[0] if len(mine) else None


def _named(q: Quantisation, row: pd.Series) -> str:
    """'mlp_act of layer 12 (model.layers.11.mlp.down_proj)'."""
    found = _site_row(q, row)
    modules = [] if found is None else str(found["modules"] or "").split(", ")
    where = f" ({visible(modules[0])}{' and others' if len(modules) > 1 else ''})" if modules and modules[0] else ""
    return f"{visible(row['site'])} of layer {int(row['layer'])}{where}"


def _why(q: Quantisation, row: pd.Series) -> str:
    """What happens at the worst site: its greatest value against that of other tokens, and what rounds to nothing."""
    found = _site_row(q, row)
    if found is None or math.isnan(real(found["zeroed_rate"])):
        return ""
    amax, rest = real(found["amax"]), real(found["amax_rest"])
    against = f"its greatest input is {number(amax)}, of other tokens {number(rest)}, so that " if amax > rest else ""
    return (
        f" At the first of them {against}{percent(found['zeroed_rate'], 2)} of the entries of other tokens round to 0."
    )


def _advice(q: Quantisation, rows: pd.DataFrame, margin: float) -> list[str]:
    """What to do, by what is gained for the effort, for each format that is harmful as it is."""
    said = []
    for rounded, mine in rows.groupby("rounded", sort=False):
        plain = mine[(mine["verdict"] == HARMFUL) & ~mine["scheme"].str.contains("+", regex=False)]
        if not len(plain):
            continue
        worst = plain.sort_values("delta_nats", ascending=False).iloc[0]
        ways = []
        for _, row in mine.iterrows():
            gain = real(worst["delta_nats"]) - real(row["delta_nats"])
            if row["scheme"] == worst["scheme"] or not gain > margin:
                continue
            effort = max(1, int(row["effort"]) + (row["sharing"] != worst["sharing"]))  # another kernel is one as well
            ways.append((RANK.get(str(row["verdict"]), 1), -gain / effort, row))
        best = [_way(r) for _, _, r in sorted(ways, key=lambda w: w[:2])]
        loses = f"{visible(worst['scheme'])} loses {number(worst['delta_nats'])} nats"
        what = visible(rounded)
        order = "the harmless first, the harmful last, then by gain for the effort"
        helps = f"What to do about {what} ({loses}), {order}: {'; '.join(best[:MOST_ADVICE])}."
        idle = "Nothing that was tried helps" if len(mine) > len(plain) else "No remedy was tried for"
        said.append(helps if best else f"{idle} {what}: {loses}.")
    run = rows[rows["formats"].str.contains("weights", regex=False)]
    best = [_way(r) for _, r in run.sort_values("delta_nats").iterrows()]
    return said + ([f"With weights quantised, as libraries run them: {'; '.join(best[:MOST_ADVICE])}."] if best else [])


def _way(row: pd.Series) -> str:
    return f"{visible(row['scheme'])} {_loss(row)}, {row['verdict']}"


# ------------------------------------------------------------------------------------------ figures
def losses_panel(q: Quantisation) -> Panel | None:
    """The loss of every scheme, with its interval."""
    rows, margin = losses(q), margin_of(q)
    if not len(rows):
        return None
    names = [visible(name) for name in rows["scheme"]]
    delta, low, high = (column(rows, name) for name in ("delta_nats", "nats_low", "nats_high"))
    verdicts = [v if v in LOOKS else OPEN for v in rows["verdict"]]
    said = [f"{n}: {v}, {d:.4g} nats, 95% interval {a:.4g} to {b:.4g}"
            for n, v, d, a, b in zip(names, verdicts, delta, low, high, strict=True)]  # fmt: skip
    colors, symbols = zip(*(LOOKS[v] for v in verdicts), strict=True)
    base = number(rows["baseline"].iloc[0])
    x = symlog_axis([delta, low, high], max(margin, 1e-3), f"Loss in nats beyond full precision ({base})")
    caption = "Lines: 95% intervals. Red diamonds: harmful; green circles: harmless; grey squares: not settled."
    lost = [n for n, d in zip(names, delta, strict=True) if not math.isfinite(d)]
    note = f"Not finite, so not drawn: {', '.join(lost)}." if lost else ""
    lines = [Limit(0.0, upright=True, color=Color.MUTED)]
    points = Points(delta, range(len(names)), colors, symbols, low, high, said)
    y, height = named_axis(names, slots=3), 110 + 26 * max(len(names), 4)
    sees = "Each dot is one way to store numbers in fewer bits: how much worse the model predicts with it; "
    sees += "at the line at zero it predicts as in full precision."
    given = ("Loss of each scheme", [points], x, y, caption, note, lines)
    return Panel(*given, sees=sees, height=height, width="full")


def errors_panel(q: Quantisation) -> Panel | None:
    """The error of the other tokens at the end of every block, for the plain schemes that a remedy is known for."""
    per_layer = q.quantised_sites.groupby(["scheme", "layer"], sort=False)["error_rest"].max().reset_index()
    having = set(per_layer.loc[per_layer["error_rest"].notna(), "scheme"])
    pairs = q.remedies.sort_values("saved_nats", ascending=False, kind="stable")[["scheme", "remedied"]].to_numpy()
    wanted = [name for name in dict.fromkeys(pairs.ravel()) if name in having][:MOST_LINES]
    series = []
    for name, look in zip(wanted, looks(len(wanted)), strict=True):
        mine = per_layer[per_layer["scheme"] == name].sort_values("layer")
        series.append(Line(mine["layer"].to_numpy(), column(mine, "error_rest"), visible(name), **look))
    if not series:
        return None
    n_layers = int(per_layer["layer"].max())
    y = log_axis(np.concatenate([line.y for line in series]), "error / size of the hidden state")
    return Panel("Error of tokens that are not massive, at the end of each block", series, layer_axis(n_layers), y,
                 "Everything that the scheme quantises counts.",
                 sees="How much rounding disturbs ordinary tokens: massive activations stretch the scale of numbers, "
                 "so that all others are stored coarsely.")  # fmt: skip


def sites_panel(q: Quantisation) -> Panel | None:
    """The error that each site makes alone, of the scheme whose guilty sites were looked for."""
    rows = q.quantised_sites
    name = (
        str(q.guilty_sites["scheme"].iloc[0])
        if len(q.guilty_sites)
        else str(rows["scheme"].iloc[0])
        if len(rows)
        else ""
    )
    mine = rows[rows["scheme"] == name]
    if not len(mine):
        return None
    table = mine.pivot_table(index="site", columns="layer", values="local_rest", aggfunc="max", sort=False)
    if not np.isfinite(table.to_numpy(float)).any():
        return None
    layers = [int(x) for x in table.columns]
    sites = [visible(x) for x in table.index]
    said = [[f"{s} of layer {layer}: {v:.3g}" for layer, v in zip(layers, line, strict=True)]
            for s, line in zip(sites, table.to_numpy(float), strict=True)]  # fmt: skip
    heat = Heat(table.to_numpy(float), layers, range(len(sites)), "error of other tokens", log=True, said=said)
    head, y = f"Error that each site makes alone: {visible(name)}", named_axis(sites, slots=2)
    height = 90 + 40 * len(sites)
    x, sees = (
        cell_axis("Layer", layers),
        "Where rounding hurts: a dark cell is a part of a layer that makes much of the error.",
    )
    return Panel(head, [heat], x, y, "Everything else in full precision.", sees=sees, height=height)


def draw_losses(q: Quantisation) -> Sheet | None:
    """The losses, as a file."""
    panel = losses_panel(q)
    return Sheet([panel]) if panel else None


def draw_errors(q: Quantisation) -> Sheet | None:
    """The errors, as a file."""
    panels = [p for p in (errors_panel(q), sites_panel(q)) if p is not None]
    return Sheet(panels) if panels else None


# ------------------------------------------------------------------------------------------ sections
def section(q: Quantisation) -> Section:
    """What low precision costs, scheme by scheme, and what massive activations have to do with it."""
    tables = [
        table_of("quantised", q.quantised, "Every scheme, every metric", most=600, shown_first=True),
        table_of("remedies", q.remedies, "What each remedy saves"),
        table_of("quantised_sites", q.quantised_sites, "Errors of every site, massive tokens and the rest apart"),
    ]
    if len(q.guilty_sites):
        tables.append(table_of("guilty_sites", q.guilty_sites, "Loss as the worst sites stay in full precision"))
    files = [Code(visible(name), text) for name, text in q.info.exports.items()]
    panels = (losses_panel(q), errors_panel(q), sites_panel(q))
    return Section("quantisation", "Low precision", parts_of(Words(in_words(q)), *panels, *tables, *files))


def brief(q: Quantisation) -> list[Section]:
    """A line for each scheme."""
    rows, what = losses(q), "Loss"
    if not len(rows):
        rows, what = divergences(q), "KL from full precision"
    sites = q.quantised_sites.groupby("scheme")[["error_massive", "error_rest"]].max()
    lines = []
    for _, row in rows.iterrows():
        name = row["scheme"]
        errors = [_error(sites.loc[name, c]) if name in sites.index else "-" for c in ("error_massive", "error_rest")]
        star = {HARMFUL: "!", HARMLESS: "", HELPFUL: "", UNTESTED: "?"}.get(str(row["verdict"]), "?")
        loss = f"{signed(row['delta_nats'])}{star}"
        lines.append([visible(name), loss, _within(row, "nats_low", "nats_high"), *errors])
    heads = ["<scheme", "nats", "95% interval", "massive", "rest"]
    said = "!: harmful, ?: not settled; errors: the greatest at the end of a block"
    title = f"{what} of {counted(len(rows), 'scheme')} ({said})"
    return [Section("quantisation", "", parts_of(grid(title, heads, lines)))]


def _error(value: float) -> str:
    return "-" if math.isnan(real(value)) else number(value, 2)


READING = Reading(
    in_nouns(in_words), [in_nouns(section)], in_nouns(brief),
    figures={"quantisation": in_nouns(draw_losses), "quantisation_errors": in_nouns(draw_errors)},
    table="quantised", in_brief=cost_in_brief,
)  # fmt: skip
