"""A fold in words: which tokens became slots, the proof, what changes, what stays, and what to do with the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from massact.records.kinds.fold import Fold
from massact.records.verdicts import MARGIN
from massact.reports.kinds.intervention import effects_panel, with_verdicts
from massact.reports.panels import Color, Line, Panel, Sheet, column, headed, layer_axis, log_axis, parts_in
from massact.reports.parts import Facts, Section, Words, grid, parts_of, table_of
from massact.reports.readings import Reading
from massact.reports.spelling import (
    cell,
    counted,
    listed,
    noted,
    number,
    or_dash,
    percent,
    quoted,
    real,
    signed,
    visible,
)

AGAINST_FOLDED = "super weights to zero, against folded"
MOST_TOLD = 6
MOST_LAYERS = 40


def fold_in_words(f: Fold) -> list[str]:
    """What was folded, the numbers of the proof, what stays and what the files are for, in sentences.

    Args:
        f: fresh, or read from a run directory.
    """
    i = f.info
    lead = " (each text was scanned with it in front)" if i.lead and list(i.lead) == list(i.ids) else ""
    what = f"{counted(len(i.ids), 'slot')} of keys and values in every block: those of {_tokens(i)}{lead}."
    said = [what, _change(f), *_proof(i.proof, i.positions)]
    said += [s for s in (_loss(f), _attention(f.fold_heads), _fails(f), _stays(f), _pruned(i.pruned)) if s]
    if i.files:
        said.append(
            f"Files, in {listed([visible(x) for x in i.files])}: model/ is read by massact (scan, explain, train) and, "
            "with load_variant, by transformers; prefix_kv.safetensors goes into the cache of a serving engine; where "
            "neither is taken, the ids in prefix.json stand in front of every prompt. Text is given without the prefix."
        )
    return said + noted(i.notes)


def _tokens(info: Any) -> str:
    return listed([f"{quoted(t)} (id {i})" for t, i in zip(info.tokens, info.ids, strict=False)])


def _change(f: Fold) -> str:
    before, after = f.info.before, f.info.after
    n, left = int(before.get("n_findings", 0)), int(after.get("n_findings", 0))
    return (
        f"Findings: {n:,} before, {left:,} after; greatest |h| below the last two layers: "
        f"{number(before.get('greatest'))} before, {number(after.get('greatest'))} after."
    )


def _proof(proof: Mapping[str, Any], positions: str) -> list[str]:
    """How near the folded model is to the one with the prefix in front, and up to which length."""
    if not proof:
        return []
    longest = max((int(length) for length, _ in proof.get("lengths") or [(0, 0.0)]), default=0)
    said = (
        f"Proved against the prefix in front of the text: logits differ by {number(proof.get('error'))} of the "
        f"greatest (allowed {number(proof.get('allowed'))}), in texts of up to {longest:,} tokens"
    )
    n, ties = int(proof.get("n_generated") or 0), int(proof.get("ties") or 0)
    if n:
        said += f"; {counted(n, 'token')} generated with a cache and without are the same"
        said += f" but for {counted(ties, 'tie')} within rounding" if ties else ""
    windows = sorted(set((proof.get("windows") or {}).values()))
    more = []
    if windows:
        crossed = "longer texts among them" if proof.get("crossed") else "beyond which it is not proved"
        more.append(
            f"Slots leave a sliding window as tokens do ({listed([f'{w:,}' for w in windows])} keys, {crossed})."
        )
    if positions == "table":
        more.append("The table of positions was shifted, so that the context is shorter by the prefix.")
    return [f"{said}.", *more]


def _row(f: Fold, edit: str, metric: str) -> pd.Series | None:
    rows = f.fold_effects
    mine = rows[(rows["edit"] == edit) & (rows["metric"] == metric) & (rows["group"] == "all")]
    return mine.iloc[0] if len(mine) else None


def _loss(f: Fold) -> str:
    """Perplexity before and after, on texts that the prefix was not chosen by."""
    row = _row(f, "folded", "perplexity")
    if row is None:
        return ""
    low, high = real(row["nats_low"]), real(row["nats_high"])
    within = "no interval" if math.isnan(low) else f"95% interval {signed(low)} to {signed(high)}"
    return (
        f"Perplexity on held-out text {number(row['baseline'], 4)} before, {number(row['edited'], 4)} after: "
        f"{signed(row['delta_nats'])} nats ({within}), {row['verdict']}."
    )


def _attention(heads: pd.DataFrame) -> str:
    known = heads[heads["massive_before"].notna() & heads["slots_after"].notna()]
    if not len(known):
        return ""
    before, after = (percent(known[name].mean()) for name in ("massive_before", "slots_after"))
    return f"Attention, mean over all heads: {before} on massive tokens before, {after} on the slots after."


def _fails(f: Fold) -> str:
    """Where chosen and other prefixes leave a massive token in some texts and clear others."""
    by: dict[str, list[str]] = {}
    for prefix, name in f.info.fails:
        by.setdefault(quoted(prefix), []).append(visible(name))
    told = [f"{prefix} on texts that begin with {listed(names, MOST_TOLD)}" for prefix, names in by.items()]
    mine = "" if f.info.cleared else "A token is still massive in some texts. "
    return f"{mine}Clears some texts and fails on others: {'; '.join(told[:MOST_TOLD])}." if told else mine.strip()


def _stays(f: Fold) -> str:
    """The clusters that the folded model still has."""
    by: dict[str, list[str]] = {}
    for one in f.info.stays:
        by.setdefault(visible(str(one.get("label"))), []).append(
            f"{visible(str(one.get('cluster')))} ({number(one.get('max'))})"
        )
    told = [f"{label}s {listed(names, MOST_TOLD)}" for label, names in by.items()]
    note = " Outlier features are of many tokens: no slot takes them over." if "outlier feature" in by else ""
    return f"What stays: {'; '.join(told)}.{note}" if told else "No cluster passes in the folded model."


def _pruned(pruned: Mapping[str, Any]) -> str:
    weights = pruned.get("weights") or []
    if not weights:
        return ""
    names = listed([f"{visible(str(w['parameter']))}{w['entry']}" for w in weights], MOST_TOLD)
    if pruned.get("zero"):
        return f"Super weights at zero in the folded model, which changes nothing ({pruned.get('verdict')}): {names}."
    return f"Super weights left as they are, {visible(str(pruned.get('why')))}: {names}."


# ---- the figure
def draw_fold(f: Fold) -> Sheet | None:
    """Greatest |h| of every layer before and after, on a logarithmic axis."""
    panels = []
    for stack, rows in f.fold_layers.groupby("stack", sort=False):
        rows = rows[rows["site"] == rows["site"].iloc[0]].sort_values("layer")
        before, after = column(rows, "max_before"), column(rows, "max_after")
        lines = [
            Line(rows["layer"], before, "before", Color.LIMIT, "square"),
            Line(rows["layer"], after, "folded", Color.BLUE, "circle"),
        ]
        axis = log_axis([*before, *after], "Greatest |h|")
        title = headed(visible(str(stack)), "Greatest |h|, before and folded")
        sees = "Before and after fixed slots take their place: the fold works where the curve has lost its top."
        panels.append(Panel(title, lines, layer_axis(int(rows["layer"].max())), axis, sees=sees, width="full"))
    return Sheet(panels) or None


def section(f: Fold) -> Section:
    """What became slots, and what that changes."""
    effects = f.fold_effects[f.fold_effects["edit"] != AGAINST_FOLDED]
    margin = real(f.info.config.get("margin"))
    margin = margin if margin >= 0 else MARGIN
    held = f.prefixes.sort_values(["part", "prefix"], kind="stable")
    return Section("fold", "Folding", parts_of(
        Words(fold_in_words(f)), *parts_in(draw_fold(f)),
        Facts(_facts(f), "The prefix"),
        effects_panel(effects, "Folding", margin) if len(effects) else None,
        table_of("prefixes", held, "Every candidate on every class of text", most=400),
        table_of("fold_layers", f.fold_layers, "Layer by layer"),
        table_of("fold_heads", f.fold_heads, "Attention of every head", most=600),
        table_of("fold_effects", with_verdicts(f.fold_effects, margin), "Effects on the same targets"),
    ))  # fmt: skip


def _facts(f: Fold) -> list[tuple[str, str]]:
    i = f.info
    names = {"relative": "only distances matter", "table": "a table, shifted", "unsaid": "none are given"}
    return [
        ("Tokens", _tokens(i)),
        ("In front when scanned", ", ".join(map(str, i.lead)) or "nothing"),
        ("Positions", names.get(i.positions, visible(i.positions))),
        ("Files", ", ".join(visible(x) for x in i.files) or "not written"),
    ]


def brief(f: Fold) -> list[Section]:
    """The candidates over all texts, and the layers."""
    lines = []
    for (prefix, ids), rows in f.prefixes[f.prefixes["part"] == "search"].groupby(["prefix", "ids"], sort=False):
        text = rows[rows["text_class"] == "text"]
        lines.append([
            quoted(str(prefix)) if ids else "nothing", f"{int(rows['n_massive'].sum())} of {rows['n_sequences'].sum()}",
            cell(rows["greatest"].max()), or_dash(text["nll"].iloc[0] if len(text) else math.nan),
            or_dash(text["delta_nll"].iloc[0] if len(text) else math.nan),
        ])  # fmt: skip
    heads = ("<in front", "texts with a\nmassive token", "greatest\n|h|", "loss\n(nats)", "change")
    layers = [
        [str(row["layer"]), *(cell(row[c]) for c in ("max_before", "max_after")),
         *(f"{int(row[c]):,}" for c in ("findings_before", "findings_after")),
         *(or_dash(row[c]) for c in ("massive_before", "slots_after"))]
        for _, row in f.fold_layers.head(MOST_LAYERS).iterrows()
    ]  # fmt: skip
    over = (
        "layer",
        "top |h|\nbefore",
        "after",
        "findings\nbefore",
        "after",
        "attention on\nmassive tokens",
        "on slots",
    )
    return [Section("fold", "", parts_of(grid("Prefixes, on the texts to choose by", heads, lines),
                                         grid("Layers before and after", over, layers)))]  # fmt: skip


READING = Reading(fold_in_words, (section,), brief, figures={"fold": draw_fold}, table="prefixes")
