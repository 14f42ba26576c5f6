"""What norms make of the massive tokens: in words, as figures and as a section."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.reports import panels
from massact.reports.kinds.explanation.attention import RANDOM, lines_of
from massact.reports.panels import Color, Limit, Line, Panel, Sheet
from massact.reports.parts import Section, Words, parts_of, table_of
from massact.reports.spelling import between, counted, listed, number, percent, real, spanned, visible

READS = {"attn_in": "attention", "mlp_in": "the MLP", "cross_attn_in": "cross-attention"}
LOOKS = ((Color.BLUE, "circle"), (Color.ORANGE, "square"), (Color.GREEN, "triangle-up"), (Color.PURPLE, "diamond"))
FEW = 4  # sequences: below it no half has two of these tokens
NORM = Color.MUTED, "", "dot"


def norm_words(norm: object) -> str:
    """'the norm before attention', or the site of one in the stream itself."""
    name = str(norm)
    return f"the norm before {READS[name]}" if name in READS else f"the norm that gives {visible(name)}"


def _classes(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [
        (f"dim {int(dim)} ({visible(kind)})", mine.sort_values("layer", kind="stable"))
        for (dim, kind), mine in rows.groupby(["dim", "position_class"], sort=False)
    ]


def collapse_in_words(e: Explanation) -> list[str]:
    """Of every class of massive tokens: its first norm beside the bound, and which norms let the dim through."""
    after = set(e.axes.loc[e.axes["after_onset"], "layer"])
    said = []
    for what, rows in _classes(e.collapse):
        seen = rows[rows["layer"].isin(after)] if after else rows[rows["role"] != ""]
        if not len(seen):
            said.append(f"Norm collapse of {what}: no norm reads these tokens where they are massive.")
            continue
        said += [x for x in (_first(what, seen), _entries(what, seen), _roles(what, seen)) if x]
    return said


def _first(what: str, rows: pd.DataFrame) -> str:
    """The first norm that reads them and does not switch the dim off: shares, and cosines beside their bounds."""
    on = rows[rows["role"] == "on"]
    row = (on if len(on) else rows).iloc[0]
    if math.isnan(real(row["onehot"])) or math.isnan(real(row["onehot_before"])):
        return ""
    around = _around(row["onehot_low"], row["onehot_high"])
    null = "" if math.isnan(real(row["onehot_random"])) else f"; random tokens: {percent(row['onehot_random'])}"
    told = (
        f"Norm collapse of {what}: behind {norm_words(row['norm'])} of layer {int(row['layer'])} that dim holds "
        f"{percent(row['onehot'])} of the squared norm of these tokens ({around}{percent(row['onehot_before'])} before "
        f"the gain{null})"
    )
    if math.isnan(real(row["min_cosine"])):
        one = int(row["n_sequences"]) >= FEW and int(row["n_checked"]) == 1
        why = "before the norm they are one vector already" if one else "too few sequences have them"
        return f"{told}; how alike the norm makes two of them is not known: {why}."
    bounds = [
        f"{number(row['bound'], 4)} by the mean direction of the other half of the sequences"
        if not math.isnan(real(row["bound"])) else "",
        f"{number(row['bound_dim'])} by the dim alone" if not math.isnan(real(row["bound_dim"])) else "",
    ]  # fmt: skip
    least = f"no two of {counted(int(row['n_checked']), 'token')} have a cosine below {number(row['min_cosine'], 4)}"
    beside = (
        "" if math.isnan(real(row["min_cosine_random"])) else f" (random tokens: {number(row['min_cosine_random'])})"
    )
    known = [b for b in bounds if b]
    return f"{told}; {least}{beside}" + (f"; it cannot be below {listed(known)}." if known else ".")


def _around(low: object, high: object) -> str:
    if math.isnan(real(low)) or percent(low) == percent(high):
        return ""
    return f"95% interval over sequences {percent(low)} to {percent(high)}; "


def _entries(what: str, rows: pd.DataFrame) -> str:
    """How near the greatest entry comes to what the norm allows."""
    known = rows[rows["entry"].notna() & (rows["entry_bound"] > 0) & (rows["role"] == "on")]
    if not len(known):
        return ""
    share = (known["entry"] / known["entry_bound"]).astype(float)
    return (f"Behind these norms the entry at {what} is {between([share.min(), share.max()], percent)} of "
            "sqrt(D) |g|, which it cannot exceed whatever the magnitude is.")  # fmt: skip


def _roles(what: str, rows: pd.DataFrame) -> str:
    """Which norms let the dim through, which switch it off, and which feed what takes it away."""
    parts = []
    for norm, mine in rows.groupby("norm", sort=False):
        told = []
        for role, words in (("on", "lets it through"), ("dimmed", "dims it"), ("off", "switches it off")):
            at = mine[mine["role"] == role]
            if len(at):
                told.append(f"{words} in {spanned('layer', [int(x) for x in at['layer']])}{_ranked(at)}")
        if told:
            parts.append(f"{norm_words(norm)} {listed(told)}")
    for norm, taken in rows[rows["removes"]].groupby("norm", sort=False):
        where = spanned("layer", [int(x) for x in taken["layer"]])
        parts.append(f"what reads {norm_words(norm)} takes it away in {where}{_ranked(taken)}")
    if not parts:
        return ""
    text = "; ".join(parts)
    return f"Of {what}, {text}."


def _ranked(rows: pd.DataFrame) -> str:
    """Where the gain of the dim stands among all dims: 1 is the greatest."""
    ranks = rows["gain_rank"].dropna().astype(float)
    if not len(ranks):
        return ""
    low, high = int(ranks.min()), int(ranks.max())
    said = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f" (|gain| of rank {said} of {int(rows['n_dims'].iloc[0]):,})"


def draw_collapse(e: Explanation) -> Sheet | None:
    """One-hot share, least cosine with its bound, and the gain, of every norm along the layers."""
    made = []
    for stack, of_stack in [(visible(str(n)), r) for n, r in e.collapse.groupby("stack", sort=False)]:
        for what, rows in _classes(of_stack):
            made += _panels(f"{stack}: {what}" if stack else what, rows)
    return Sheet(made) or None


def _panels(head: str, rows: pd.DataFrame) -> list[Panel]:
    layers = panels.layer_axis(int(rows["layer"].max()))
    norms = list(rows.groupby("norm", sort=False))
    shares, cosines, gains = [], [], []
    for (norm, mine), (color, symbol) in zip(norms, LOOKS, strict=False):
        name = visible(str(norm))
        shares += lines_of(mine, ("onehot", f"behind {name}", color, symbol, "solid"))
        cosines += lines_of(
            mine,
            ("min_cosine", f"measured, {name}", color, symbol, "solid"),
            ("bound", f"bound, {name}", color, "", "dash"),
        )
        known = mine[mine["gain"].notna()]
        gains.append(Line(known["layer"], known["gain"].abs().to_numpy(float), name, color, symbol))
    first = norms[0][1] if norms else rows
    shares += lines_of(first, ("onehot_before", "before the gain", *NORM), ("onehot_random", "random tokens", *RANDOM))
    cosines += lines_of(first, ("min_cosine_random", "random tokens", *RANDOM))
    gains = [line for line in gains if len(line.x)]
    values = [x for line in gains for x in line.y]
    return [
        Panel(panels.headed(head, "Share of the massive dim"), shares, layers, panels.share_axis(),
              sees="How much of these tokens is one number: at 1, all of it; near 0, a norm has switched it off.",
              width="third"),
        Panel(panels.headed(head, "Least cosine of two massive tokens"), cosines, layers, panels.Axis(),
              "Measured on half of the sequences, the bound with the direction of the other half.",
              limits=[Limit(1.0, color=Color.MUTED)], width="third",
              sees="Whether the norm makes them one vector: near 1 it does, and it is never below the bound."),
        Panel(panels.headed(head, "|Gain| of the norm at the massive dim"), gains, layers, panels.log_axis(values),
              sees="What the norm multiplies the massive dim by: nearly nothing where it is kept out, much where it is "
                   "read.", width="third"),
    ]  # fmt: skip


def collapsed(e: Explanation) -> Section | None:
    """What norms make of the massive tokens."""
    if not len(e.collapse):
        return None
    return Section("collapse", "What norms make of them", parts_of(
        Words(_told(e)), *panels.parts_in(draw_collapse(e)),
        table_of("collapse", e.collapse, "Norm by norm: one-hot share, cosines and bounds, gain", most=400),
    ))  # fmt: skip


def _told(e: Explanation) -> list[str]:
    """The sentences, stack by stack."""
    said = []
    for stack, rows in e.collapse.groupby("stack", sort=False):
        one = Explanation(e.info, axes=e.axes[e.axes["stack"] == stack], collapse=rows)
        said += collapse_in_words(one)
    return said
