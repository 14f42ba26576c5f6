"""The classic outlier works on one model: a sentence or two for each, and one figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from massact.records.kinds.classics import Classics
from massact.records.verdicts import MARGIN, verdict_of
from massact.reports import panels
from massact.reports.kinds.intervention import main_metric, with_verdicts
from massact.reports.kinds.scan.nouns import in_nouns
from massact.reports.panels import Axis, Bars, Color, Line, Panel, Sheet
from massact.reports.parts import Section, Words, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import (
    counted,
    listed,
    noted,
    number,
    numbered,
    percent,
    quoted,
    real,
    shortened,
    signed,
    spanned,
    visible,
)

Numbers = Mapping[str, Any]
MOST_DIMS = 8


def classics_in_words(c: Classics) -> list[str]:
    """Put the outcome of every entry into sentences, unavailable ones with their reason.

    Args:
        c: fresh, or read from a run directory.
    """
    said = [f"{counted(len(c.info.outcomes), 'classic work')} on this model; each names its source."]
    for name, outcome in c.info.outcomes.items():
        source = visible(str(c.info.sources.get(name, "")))
        head = f"{visible(name)}{f' ({source})' if source else ''}"
        if "unavailable" in outcome:
            said.append(f"{head}: unavailable: {visible(str(outcome['unavailable']))}")
            continue
        for stack, numbers in outcome.items():
            where = f", {visible(stack)}" if stack else ""
            if not isinstance(numbers, Mapping):
                continue
            if "unavailable" in numbers:
                said.append(f"{head}{where}: unavailable: {visible(str(numbers['unavailable']))}.")
            elif name in SENTENCES:
                said.append(f"{head}{where}: {' '.join([*SENTENCES[name](numbers), *_verdicts(c, name, stack)])}")
    return said + noted(c.info.notes)


def _verdicts(c: Classics, name: str, stack: str) -> list[str]:
    """The verdicts on the edits of one entry, by the rule of all effects."""
    rows = c.classic_effects
    rows = rows[(rows["classic"] == name) & (rows["stack"] == stack) & (rows["group"] == "all")]
    metric = main_metric(rows)
    by: dict[str, list[str]] = {}
    for _, row in rows[rows["metric"] == metric].iterrows():
        by.setdefault(verdict_of(row), []).append(quoted(str(row["edit"]), 60))
    told = "; ".join(f"{found}: {listed(edits, MOST_DIMS)}" for found, edits in by.items())
    return [f"By {metric.replace('_', ' ')}, margin {number(MARGIN)}: {told}."] if by else []


def _dims(dims: Any) -> str:
    """'dims 3 and 7'."""
    return numbered("dim", dims or [], MOST_DIMS)


def _norm_growth(n: Numbers) -> list[str]:
    growth = (
        f"without position 0 norms grow by a factor of {number(n['factor'], 4)} per layer (log-linear fit over "
        f"{n['layers']} layers, R^2 {number(n['r2'])})"
    )
    if math.isnan(real(n["factor"])):
        growth = f"a log-linear fit of the norms is unavailable ({counted(int(n['layers']), 'layer')})"
    return [f"{growth}; the hidden state at position 0 is up to {number(n['first_over_rest'])} times as long."]


def _outlier_features(n: Numbers) -> list[str]:
    told = []
    for where, at in n["at"].items():
        place = "at the inputs of linear layers" if where == "inputs" else f"in the hidden state ({visible(where)})"
        told.append(f"{_features(at, place)}.")
    zeroed = n.get("zeroed") or {}
    told += [f"{visible(edit)}: {_changes(by)}." for edit, by in zeroed.items() if isinstance(by, Mapping) and by]
    return told


def _features(at: Numbers, place: str) -> str:
    """How many dims the rule of outlier features picks at one kind of site, of how many, and whether it picks any out.

    More than half of all dims are no outliers: the limit of the rule is below what is ordinary there.
    """
    n, of, massive = int(at["n"]), int(at.get("n_dims") or 0), int(at["n_massive"])
    both = f"{len(at['massive'])} of {counted(massive, 'massive dim')}" if massive else "no massive dims"
    if of and 2 * n > of:
        return (f"{n:,} of {of:,} dims pass the rule {place}, {both} among them: its limit of |x| >= 6 is below what "
                "is ordinary there, so it does not tell outliers")  # fmt: skip
    among = f" of {of:,} dims" if of else ""
    which = f" ({_dims(at['dims'])}), with {both} among them" if n else ""
    return f"{counted(n, 'outlier feature')}{among} {place}{which}"


def _changes(by: Numbers) -> str:
    """'perplexity 22 to 25 (+3), kl +0.2' of what each metric was and is, or of its change alone."""
    said = []
    for metric, value in by.items():
        name = visible(metric).replace("_", " ")
        if isinstance(value, list | tuple) and len(value) == 2:
            before, after = (real(v) for v in value)
            said.append(f"{name} {number(before)} to {number(after)} ({signed(after - before)})")
        else:
            said.append(f"{name} {signed(value)}")
    return ", ".join(said)


def _outlier_metrics(n: Numbers) -> list[str]:
    parts = [
        f"{visible(point)} {number(at['inf_norm'])} (layer {at['inf_norm_layer']}) / {number(at['kurtosis'])}"
        for point, at in n.items() if isinstance(at, Mapping) and "inf_norm" in at
    ]  # fmt: skip
    return [f"greatest infinity norm of a layer / mean kurtosis: {', '.join(parts)}."] if parts else []


def _streaming(n: Numbers) -> list[str]:
    by_k = n["by_k"]
    told = ", ".join(f"{k}: {number(v)}" for k, v in by_k.items())
    near, largest = n["smallest_k_near_best"], max(map(int, by_k))
    more = f" 4 newlines in their place: {number(n['newline'])}." if n.get("newline") is not None else ""
    return [
        f"perplexity with a window of {n['width']} keys of which k are initial tokens, {told}; on all keys "
        f"{number(n['dense'])} ({n['n_targets']:,} targets).{more}",
        f"k = {near} is the least within 1% of the best."
        if near is not None and near < largest
        else f"No k below {largest} is within 1% of the best; whether {largest} is enough cannot be told.",
    ]


def _attention_biases(n: Numbers) -> list[str]:
    effects = n.get("effects") or {}
    told = [
        f"{visible(edit)}: greatest change of a logit {percent(by['max_delta_logit'])}, KL {_nats(by.get('kl'))}."
        for edit, by in effects.items() if isinstance(by, Mapping) and "max_delta_logit" in by and "zero" in edit
    ]  # fmt: skip
    if "keys_redundant" in n:
        told.append("Key biases are redundant, as the softmax says." if n["keys_redundant"] else
                    "Key biases are not redundant here.")  # fmt: skip
    if n.get("value_bias_identity_error") is not None:
        off = number(n["value_bias_identity_error"])
        told.append(f"Value biases are added as they are to every output (off by {off}).")
    return told or ["no bias has an effect to measure; the notes say why."]


def _nats(value: Any) -> str:
    return "n/a" if value is None else f"{number(value)} nats"


def _rogue_dims(n: Numbers) -> list[str]:
    shares = [f"{dim} ({percent(s)})" for dim, s in zip(n["rogue_dims"], n["shares"], strict=False) if real(s) >= 0.01]
    kl, r2 = n.get("kl") or {}, (n.get("r2") or {}).get("1")
    known = len(n["rogue_dims"]) and not math.isnan(real(r2))
    without = f"; without dim {n['rogue_dims'][0]} r^2 with the full cosine is {number(r2)}" if known else ""
    told = [
        f"mean cosine of random token pairs {number(n['mean_anisotropy'])} over layers, {number(n['anisotropy'])} at "
        f"layer {n['layer']}{_parts(shares)}{without}."
    ]
    fixed = n.get("fixed") or {}
    if fixed:
        told.append("After the fixes: " + ", ".join(f"{visible(k)} {number(v)}" for k, v in fixed.items()) + ".")
    if "rogue" in kl:
        parts = ", ".join(f"{k} {number(v)}" for k, v in kl.items())
        of = f" ({_dims(n['rogue_dims'])})" if len(n["rogue_dims"]) else ""
        told.append(f"KL of the prediction without one dim, in nats, mean over the dims of a kind: {parts}; rogue are "
                    f"the {counted(len(n['rogue_dims']), 'dim')} with most of the similarity{of}.")  # fmt: skip
    return told


def _parts(shares: list[str]) -> str:
    """', of which dim 17 makes up 88 %'."""
    if not shares:
        return ", of which no single dim makes up 1%"
    return f", of which dim{'s' * (len(shares) > 1)} {listed(shares)} make{'s' * (len(shares) == 1)} up these shares"


def _norm_weights(n: Numbers) -> list[str]:
    dims = n["outlier_dims"]
    which = f" ({_dims(dims)}), {len(n['outlier_and_massive'])} of them massive" if dims else ""
    told = [f"{counted(len(dims), 'dim')} beyond 3 sigma in half of the layers{which}."]
    harm = n.get("harm") or {}
    metric = next((m for m in ("perplexity", "nll", "kl") if m in harm), None)
    if metric:
        h = harm[metric]
        beside = "".join(f", {words} {signed(h[k])}" for k, words in (("random", "random dims"), ("random_worst", "the "
                         "worst of them"), ("largest", "the largest other scales")) if k in h)  # fmt: skip
        told.append(f"Scale and bias to zero at {_dims(n['dims'])}: {metric} {signed(h['subject'])}{beside}.")
    return told


def _token_classes(n: Numbers) -> list[str]:
    chance = n["chance"]
    shares = [f"{visible(c).replace('_', '/')} {percent(v)} (chance {percent(chance.get(c))})"
              for c, v in n["attention"].items() if c != "other"]  # fmt: skip
    over = [f"{visible(c).replace('_', '/')} in {spanned('layer', at)}" for c, at in n["layers_over_half"].items()
            if at and c != "other"]  # fmt: skip
    told = [f"attention on {listed(shares)}." if shares else "no class of tokens but other ones."]
    if over:
        told.append(f"More than half of it goes to {listed(over)}.")
    gradients = n.get("gradient_over_other") or {}
    parts = [f"{visible(c).replace('_', '/')} {number(g['late'])}" for c, g in gradients.items() if "late" in g]
    if parts:
        told.append(f"|dL/dP| in the later layers, over that of other tokens: {', '.join(parts)}.")
    return told


SENTENCES: dict[str, Callable[[Numbers], list[str]]] = {
    "norm-growth": _norm_growth,
    "outlier-features": _outlier_features,
    "outlier-metrics": _outlier_metrics,
    "streaming": _streaming,
    "attention-biases": _attention_biases,
    "rogue-dims": _rogue_dims,
    "norm-weights": _norm_weights,
    "token-classes": _token_classes,
}


# ---- the figure
def draw_classics(c: Classics) -> Sheet | None:
    """Norms, anisotropy, attention on classes of tokens by layer, and perplexity by kept initial tokens."""
    t = c.classics
    t = t[t["stack"] == (str(t["stack"].value_counts().index[0]) if len(t) else "")]
    wanted = (
        (_norms, "norm-growth", "norm"),
        (_anisotropy, "rogue-dims", "anisotropy"),
        (_classes, "token-classes", "attention"),
        (_window, "streaming", "perplexity"),
    )
    kept = ((draw, t[(t["classic"] == classic) & (t["metric"] == metric)]) for draw, classic, metric in wanted)
    return Sheet([draw(rows) for draw, rows in kept if len(rows)]) or None


def _norms(rows: pd.DataFrame) -> Panel:
    stream, lines = rows[rows["site"].str.startswith("resid_post")], []
    for subject, color, symbol, name in (("rest", Color.BLUE, "circle", "all other positions"),
                                         ("first", Color.LIMIT, "square", "position 0")):  # fmt: skip
        mine = stream[stream["subject"] == subject].sort_values("layer")
        lines.append(Line(mine["layer"], panels.column(mine, "value"), name, color, symbol))
    axis = panels.log_axis(panels.column(stream, "value"), "Norm")
    n_layers = int(stream["layer"].max()) if len(stream) else 1
    sees = "The length of whole hidden states: the first token is far longer where it carries massive activations."
    return Panel("Norm of the hidden state", lines, panels.layer_axis(n_layers), axis, sees=sees)


def _by_subject(rows: pd.DataFrame, unnamed: str) -> list[Line]:
    lines = []
    groups = rows.groupby("subject", sort=False)
    for (subject, mine), look in zip(groups, panels.looks(len(groups)), strict=True):
        mine, name = mine.sort_values("layer"), shortened(visible(subject), 30) or unnamed
        lines.append(Line(mine["layer"], panels.column(mine, "value"), name, **look))
    return lines


def _anisotropy(rows: pd.DataFrame) -> Panel:
    lines, axis = _by_subject(rows, "cosine"), panels.layer_axis(int(rows["layer"].max()))
    sees = "Whether any two tokens point the same way: near 1 a few dims (rogue dims) rule all of them."
    return Panel("Similarity of random token pairs", lines, axis, Axis("Mean cosine"), sees=sees)


def _classes(rows: pd.DataFrame) -> Panel:
    means = rows.groupby(["subject", "layer"], sort=False)["value"].mean().reset_index()
    lines, axis = _by_subject(means, "none"), panels.share_axis("Mean probability")
    x, sees = (
        panels.layer_axis(int(means["layer"].max())),
        "Where attention goes: to the first token, delimiters, or the rest.",
    )
    return Panel("Attention on classes of tokens", lines, x, axis, sees=sees)


def _window(rows: pd.DataFrame) -> Panel:
    labels, values = [shortened(visible(s), 14) for s in rows["subject"]], panels.column(rows, "value")
    bars = Bars(range(len(rows)), values, colors=Color.GREEN, said=labels, what="perplexity")
    ticks = [(float(i), label) for i, label in enumerate(labels)]
    return Panel("Perplexity in a window, k initial tokens kept", [bars], Axis(ticks=ticks, grid=False),
                 panels.log_axis(values, "Perplexity"), sees="Whether the model fails once its first tokens are "
                 "dropped from a sliding window: the bar without them is far taller if it needs them.")  # fmt: skip


def section(c: Classics) -> Section:
    """What the works that the paper grew from find on this model."""
    return Section("classics", "Classic works", parts_of(
        Words(classics_in_words(c)), *panels.parts_in(draw_classics(c)),
        table_of("classics", c.classics, "All that was measured", most=500),
        table_of("classic_effects", with_verdicts(c.classic_effects), "What their edits did"),
    ))  # fmt: skip


READING = Reading(
    in_nouns(classics_in_words), [in_nouns(section)], figures={"classics": in_nouns(draw_classics)}, table="classics"
)
