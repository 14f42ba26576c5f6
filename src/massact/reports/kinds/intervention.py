"""What edits did, in words, as a table and as a figure, with intervals; verdicts as `records/verdicts.py` has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.intervention import Intervention
from massact.records.kinds.quantisation import Quantisation
from massact.records.verdicts import (
    CONTROL,
    HARMFUL,
    HARMLESS,
    HELPFUL,
    LEAST,
    MARGIN,
    ONE_SIDED,
    OPEN,
    UNTESTED,
    ZERO,
    starred,
    unit_of,
    verdict_of,
)
from massact.reports.panels import Color, Limit, Panel, Points, Sheet, column, headed, named_axis, symlog_axis
from massact.reports.parts import Facts, Part, Section, Table, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import (
    counted,
    listed,
    noted,
    number,
    numbered,
    percent,
    real,
    shortened,
    signed,
    spanned,
    visible,
)
from massact.reports.stack_words import called

NONE_FOUND = "The scan has no massive activations, and these edits ask for none"
EDITS_ABREAST = 4  # columns of one table that a narrow terminal holds


def main_metric(effects: pd.DataFrame) -> str:
    """The metric that a verdict is about: perplexity, accuracy, or else how often the top answer stays."""
    have = set(effects["metric"])
    return next((m for m in ("perplexity", "accuracy", "top1_agreement") if m in have), "")


def verdict(row: pd.Series, margin: float = MARGIN) -> str:
    """The verdict on one effect, see `massact.records.verdicts.verdict_of`.

    Args:
        row: of the table `effects`.
        margin: by which a run that recorded no verdict is judged.
    """
    return verdict_of(row, margin)


def margin_of(e: Intervention | Quantisation) -> float:
    """The margin that a run was judged by."""
    margin = real(e.info.config.get("margin"))
    return margin if margin >= 0 else MARGIN


def effects_in_words(e: Intervention) -> list[str]:
    """Put effects into sentences.

    Args:
        e: fresh, or read from a run directory.
    Source: Sun 2024, Table 3; the controls of Owen 2025 and Parodi 2026.
    """
    metric, target = main_metric(e.effects), e.info.target
    rows = _main_rows(e)
    edited = f"Edited: {_clusters(target)} at {_where(target)}, {_which(e.info.config)}"
    said = [
        f"{edited if target else NONE_FOUND}; effects on {visible(e.info.evaluated_on)}, values estimated on "
        f"{visible(e.info.estimated_on)}."
    ]
    margin = margin_of(e)
    said += [f"{_sentence(row)}: {_judged(row, rows, margin)}." for _, row in rows.iterrows()]
    if len(rows):
        said += [_by_which(metric, margin), *_not_recorded(rows)]
    groups = e.effects[(e.effects["metric"] == metric) & (e.effects["group"] != "all")]
    for name, mine in groups.groupby("edit", sort=False):
        said += [_worst(str(name), of) for _, of in mine.groupby(mine["group"].str.partition("=")[0], sort=False)]
    return said + noted(e.info.notes)


def _main_rows(e: Intervention) -> pd.DataFrame:
    """What each edit does to the main metric, over all sequences."""
    return e.effects[(e.effects["metric"] == main_metric(e.effects)) & (e.effects["group"] == "all")]


def without_in_brief(e: Intervention) -> str:
    """What happens without them, in a sentence: set to zero, else under the first edit; "" where nothing was edited."""
    rows = _main_rows(e)
    zero = rows[rows["edit"] == ZERO]
    if not len(rows):
        return ""
    row = (zero if len(zero) else rows).iloc[0]
    how = "Set to zero" if len(zero) else f"Under the edit {visible(row['edit'])}"
    return f"{how}, {_spaced(row['metric'])} goes from {_change(row)}: {verdict(row, margin_of(e))}."


def _judged(row: pd.Series, rows: pd.DataFrame, margin: float) -> str:
    """The verdict, with what it lacks, and the share of what zero does."""
    found, n = verdict(row, margin), int(row["n_sequences"])
    if found == UNTESTED:
        return f"{found}, the edit changes no entry by more than rounding"
    share = real(row["share_of_zero"])
    told = "" if math.isnan(share) else (
        f", {percent(share, 2)} of what zero does ({percent(row['share_low'], 2)} to {percent(row['share_high'], 2)})"
    )  # fmt: skip
    if found != OPEN:
        return found + told
    needed = real(row["n_needed"])
    more = f"about {needed:,.0f} sequences like these would do" if math.isfinite(needed) else (
        "no number of sequences like these would do" if needed > 0 else "")  # fmt: skip
    few = f"{counted(n, 'sequence')}, fewer than {LEAST}" if n < LEAST else ""
    why = "; ".join(x for x in (few, more) if x)
    return f"{found}{f' ({why})' if why else ''}{told}"


def _by_which(metric: str, margin: float) -> str:
    """What the verdicts mean, in one sentence."""
    unit = f"{number(margin)} nats, about {percent(math.expm1(margin), 2)} of the perplexity"
    beyond = unit if unit_of(metric) == "nats" else f"{number(margin)} in {_spaced(metric)}"
    return (
        f"Harmful or helpful: the whole interval is beyond {beyond}; harmless: all of it is within that to both sides; "
        f"else, and below {LEAST} sequences, not settled; not tested: the edit changed nothing."
    )


def _not_recorded(rows: pd.DataFrame) -> list[str]:
    """What a run of an older version does not tell, and why shares are missing."""
    if not (rows["verdict"].fillna("") != "").any():
        return [
            "Not recorded in this run: how much the edits changed, so none is called not tested; shares of what zero "
            "does; how many sequences would settle a verdict. Its intervals are percentile bootstraps, too narrow with "
            "few sequences: intervene again."
        ]
    if unit_of(str(rows["metric"].iloc[0])) != "nats":
        return []
    zero = rows["edit"].str.fullmatch(rf"{ZERO}(,? .*)?")  # of a cluster, or of several layers, too
    others = rows[~zero & (rows["verdict"] != UNTESTED)]
    if not len(others) or others["share_of_zero"].notna().any():
        return []
    why = "its own harm is not beyond the margin" if zero.any() else "it was not among the edits"
    return [f"Shares of what zero does are unavailable: {why}."]


def _worst(edit: str, rows: pd.DataFrame) -> str:
    """Whom an edit hurts most, where an interval says so."""
    rows = rows.reset_index(drop=True)
    shown = "; ".join(f"{visible(row['group'])} {_change(row)}" for _, row in rows.head(6).iterrows())
    known = rows[rows["gap_low"].notna()]
    if not len(known):
        old = not (rows["verdict"].fillna("") != "").any()
        finite = np.isfinite(rows["edited"].to_numpy(float)).all()
        why = f"two groups of {LEAST} sequences or more are needed" if finite else "not all of these are finite"
        why = "not recorded in this run" if old else f"unavailable: {why}"
        return f"{visible(edit)}, group by group: {shown}. The interval of their difference is {why}."
    worst = known.iloc[0]
    unit = "nats" if unit_of(str(worst["metric"])) == "nats" else f"in {_spaced(str(worst['metric']))}"
    apart = f"{number(worst['gap'])} {unit}, 95% interval {number(worst['gap_low'])} to {number(worst['gap_high'])}"
    if real(worst["gap_low"]) > 0:
        few = int((rows["n_sequences"] < LEAST).sum())
        among = f" (without {counted(few, 'group')} of fewer than {LEAST} sequences)" if few else ""
        most = f"{visible(edit)} hurts {visible(worst['group'])} most{among}"
        return f"{most}: {_change(worst)}; more than the next by {apart}."
    return f"{visible(edit)}: no difference between groups is settled (the first two differ by {apart}): {shown}."


def _where(target: Mapping[str, Any]) -> str:
    """'12.resid_post', of several layers 'resid_post of layers 12-13'; dims where no clusters are recorded."""
    site, dims = visible(str(target.get("site", "?"))), numbered("dim", target.get("dims") or [])
    layers = [int(x) for x in target.get("layers") or []]
    where = site if len(layers) < 2 else f"{site.rpartition('.')[2]} of {spanned('layer', layers)}"
    those = f" (those of layer {layers[0]})" if len(layers) > 1 else ""
    stacks = [str(x) for x in target.get("stacks") or []]
    where += f" and in the same places of {called(stacks[1:])}" if len(stacks) > 1 else ""
    return where if target.get("clusters") and not those else f"{where}, {dims}{those}"


def _clusters(target: Mapping[str, Any]) -> str:
    """'the massive activations 507@start and 247@start'; of an older run the word alone."""
    by_label: dict[str, list[str]] = {}
    for key, label in dict(target.get("clusters") or {}).items():
        by_label.setdefault(visible(label), []).append(visible(key))
    told = [f"the {label}{'s' * (len(keys) > 1)} {listed(keys, 6)}" for label, keys in by_label.items()]
    return listed(told) or "the massive activations"


def _which(config: Mapping[str, Any]) -> str:
    return "exactly the findings" if config.get("exact") else "found again by half the size of the smallest finding"


def _sentence(row: pd.Series) -> str:
    fired = f"{counted(int(row['n_elements']), 'element')} in {counted(int(row['n_calls']), 'call')}"
    return f"{visible(row['edit'])} ({fired}): {_spaced(row['metric'])} {_change(row)}"


def _spaced(metric: str) -> str:
    return metric.replace("_", " ")


def _change(row: pd.Series) -> str:
    spell = number if row["metric"] == "perplexity" else percent
    difference = signed(row["delta"]) if row["metric"] == "perplexity" else f"{percent(row['delta'])}"
    low, high = real(row["ci_low"]), real(row["ci_high"])
    within = "no interval" if math.isnan(low) else f"95% interval {spell(low)} to {spell(high)}"
    return f"{spell(row['baseline'])} to {spell(row['edited'])} ({difference}, {within})"


def draw_effects(e: Intervention) -> Sheet | None:
    """The change of the main metric under each edit, with its interval."""
    panel = effects_panel(e.effects, margin=margin_of(e))
    at = f" at {visible(str(e.info.target.get('site', '?')))}" if e.info.target else ""
    return Sheet([panel], f"Edits{at}") if panel else None


# The columns that a reader wants first: as many as a page is wide; all are in the file.
MAIN = ("edit", "stack", "layer", "cluster", "metric", "group", "baseline", "edited", "delta", "ci_low", "ci_high",
        "verdict", "n_needed", "n_elements")  # fmt: skip
LOOKS = {HARMFUL: (Color.LIMIT, "diamond"), HARMLESS: (Color.GREEN, "circle"), OPEN: (Color.GREY, "square"),
         HELPFUL: (Color.BLUE, "diamond"), UNTESTED: (Color.MUTED, "circle")}  # fmt: skip


def section(e: Intervention) -> Section:
    """What edits of the massive activations do, with intervals and controls (Sun 2024, Table 3)."""
    margin = margin_of(e)
    parts: list[Part | None] = [Words(effects_in_words(e)), effects_panel(e.effects, margin=margin)]
    rows = with_verdicts(e.effects, margin)
    table = table_of("effects", rows, "Effects of every edit on every metric", MAIN, 600, shown_first=True)
    return Section("interventions", "Interventions", parts_of(*parts, _head(e.info.config.get("head")), table))


def with_verdicts(effects: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """The effects of any version, each with its verdict."""
    return effects.assign(verdict=[verdict(row, margin) for _, row in effects.iterrows()])


def _head(record: Any) -> Facts | None:
    """The head that was built for a model without one; None where the model has its own."""
    if not isinstance(record, dict):
        return None
    names = {"kind": "Kind", "n_classes": "Classes", "templates": "Prompts, {} is the class",
             "classes": "First classes", "classes_sha256": "Classes, SHA-256", "file": "File",
             "sha256": "SHA-256", "reads": "Reads"}  # fmt: skip
    pairs = []
    for key, name in names.items():
        value = record.get(key)
        if value is not None:
            texts = value if isinstance(value, list) else [value]
            pairs.append((name, "; ".join(shortened(visible(str(text)), 120) for text in texts)))
    return Facts(pairs, "Head that gave the classes")


def effects_panel(effects: pd.DataFrame, title: str = "", margin: float = MARGIN) -> Panel | None:
    """The change of the main metric under each edit, with its interval."""
    metric = main_metric(effects)
    rows = effects[(effects["metric"] == metric) & (effects["group"] == "all")]
    if not len(rows):
        return None
    names, verdicts = [visible(name) for name in rows["edit"]], [verdict(row, margin) for _, row in rows.iterrows()]
    delta, low, high = (column(rows, name) for name in ("delta", "ci_low", "ci_high"))
    said = [f"{n}: {v}, 95% interval {a:.4g} to {b:.4g}" for n, v, a, b in zip(names, verdicts, low, high, strict=True)]
    colors, symbols = zip(*(LOOKS[v] for v in verdicts), strict=True)
    told = [f"{signed(d)}, {v}" for d, v in zip(delta, verdicts, strict=True)]
    points = Points(delta, range(len(names)), colors, symbols, low, high, said, told)
    base, spaced = real(rows["baseline"].iloc[0]), metric.replace("_", " ")
    unseen = [n for n, d in zip(names, delta, strict=True) if not math.isfinite(d)]
    caption = f"Without an edit {spaced} is {base:.4g}. Lines: 95% intervals. Red diamonds: "
    caption += "harmful; blue: helpful; green circles: harmless; grey squares: not settled; grey circles: not tested."
    caption += f" Margin: {number(margin)}."
    left_out = f"Not finite, so not drawn: {', '.join(unseen)}." if unseen else ""
    x = symlog_axis([delta, low, high], _near(base), f"Change of {spaced}")
    head, y = "change under each edit" if title else "Change under each edit", named_axis(names, slots=3)
    nothing, height = Limit(0.0, upright=True, color=Color.MUTED), 90 + 44 * max(len(names), 3)
    sees = f"Each dot is one edit: how much {spaced} changes when the massive activations are set so. "
    sees += "A dot near the line at zero: the model does not miss them; far from it: it depends on them."
    given = (headed(title, head), [points], x, y, caption, left_out, [nothing])
    return Panel(*given, sees=sees, height=height, width="full")


def _near(base: float) -> float:
    """The power of ten below what counts as nothing, so that a harm does not hide the harmless."""
    return 10.0 ** math.floor(math.log10(max(MARGIN * base if math.isfinite(base) else 0.0, 1e-3)))


def brief(e: Intervention) -> list[Section]:
    """A line for each metric, a column for each edit, group by group."""
    made: list[Table | None] = []
    for group, rows in e.effects.groupby("group", sort=False):
        edits = list(dict.fromkeys(rows["edit"]))
        for start in range(0, len(edits), EDITS_ABREAST):
            few = rows[rows["edit"].isin(edits[start : start + EDITS_ABREAST])]
            made.append(_changes(few, "" if group == "all" else str(group)))
    return [Section("effects", "", parts_of(*made))]


def _changes(effects: pd.DataFrame, group: str) -> Table | None:
    """The change of each metric by each edit, starred where the interval leaves out zero."""
    edits, lines = list(dict.fromkeys(effects["edit"])), []
    for metric, mine in effects.groupby("metric", sort=False):
        by_edit = {row["edit"]: row for _, row in mine.iterrows()}
        before = [real(row["baseline"]) for row in by_edit.values()]
        # Sink statistics are of the layers behind an edit, so edits at different layers differ in them.
        same = all(b == before[0] or abs(b - before[0]) <= 1e-6 * abs(before[0]) for b in before)
        lines.append(
            [
                _spaced(visible(str(metric))),
                number(before[0]) if same else "varies",
                *(_starred(by_edit[edit]) if edit in by_edit else "-" for edit in edits),
            ]
        )
    of = f" of {visible(group)}" if group else ""
    nats = "; nll and kl in nats" if {"nll", "kl"} & set(effects["metric"]) else ""
    heads = ["<metric", "without", *(f">{shortened(visible(str(edit)), 24)}" for edit in edits)]
    title = f"Change by each edit{of} (*: zero is outside of the 95% interval{_stars_of(effects)}{nats})"
    return grid(title, heads, lines)


def _stars_of(effects: pd.DataFrame) -> str:
    """What a star means for quantities that move one way only."""
    mine = effects[effects["metric"].isin(ONE_SIDED)]
    if not len(mine):
        return ""
    names = listed([_spaced(m) for m in dict.fromkeys(mine["metric"])])
    if mine["random_low"].notna().any():
        return f", for {names} that of the difference to {CONTROL}"
    return f"; none for {names}, which are not compared with {CONTROL} here"


def _starred(row: pd.Series) -> str:
    return signed(row["delta"]) + ("*" if starred(row) else " ")


READING = Reading(effects_in_words, (section,), brief, figures={"effects": draw_effects}, table="effects",
                  in_brief=without_in_brief)  # fmt: skip
