"""E1 to E9: how large massive activations are, where, and how constant (Sun 2024, Sections 2 and 3)."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd

from massact.records.answer import StackAnswer
from massact.records.kinds.scan import ScanResult
from massact.reproductions.entries import Entry, Finished, Nothing, Row, answers, at, massive, plain, row
from massact.reproductions.place_claims import (
    ABRUPT,
    CONSTANTS,
    FEW_ANYWHERE,
    FEW_VALUES,
    NO_OUTLIERS,
    PLACED,
    PLATEAU,
    TOWERING,
    VARYING,
)

MOST_TOKENS = 12
MAGNITUDE = "|h|"


# ---------------------------------------------------------------------------- E1, E2
def magnitudes(f: Finished) -> list[Row]:
    """E1: the largest |h| of every prompt, at the layer that shows most."""
    rows = []
    for name, (scan, _) in f.looked().items():
        if scan.portrait:
            rows += _peaks(name, scan)
    if not rows:
        raise Nothing("The scan has no portrait; its notes say why.")
    return rows


def _peaks(prompt: str, scan: ScanResult) -> list[Row]:
    h_PTD, stack = scan.portrait["magnitude"], str(scan.portrait["stack"])
    answer = next(s for s in answers(scan) if s.stack == stack)
    layer = answer.shown_layer
    h_TD = h_PTD[scan.portrait["layers"].tolist().index(layer)]
    found = at(scan.findings, stack=stack, site=answer.site, layer=layer, sequence=0)
    line = partial(row, stack=stack, layer=layer, unit=MAGNITUDE)
    rows = [
        line(f"peak, {prompt}", h_TD[r.pos, r.dim], place=f"{r.position_class}, dim {r.dim}", headline=r.rank == 1,
             text=str(r.token))
        for r in found.itertuples() if r.dim >= 0
    ]  # fmt: skip
    pos, dim = np.unravel_index(int(h_TD.argmax()), h_TD.shape)
    where = f"position {pos}, dim {dim}"
    token = str(scan.portrait["tokens"][pos])
    return rows or [line(f"largest, {prompt}", h_TD[pos, dim], place=where, text=token, headline=True)]


def ranks_of_a_prompt(f: Finished) -> list[Row]:
    """E2: |h| at fixed ranks of one hidden state."""
    name, (scan, _) = next(iter(f.looked().items()))
    rows = [
        row(str(r.rank), r.magnitude, stack=str(r.stack), layer=r.layer, unit=MAGNITUDE,
            place=name, headline=r.rank in ("top 1", "top 2", "median"))
        for r in at(scan.ranks, source="prompt").itertuples()
    ]  # fmt: skip
    if not rows:
        raise Nothing("The scan has no ranks; its notes say why.")
    return rows


# ---------------------------------------------------------------------------- E3 to E5
def detected(f: Finished) -> list[Row]:
    """E3: what passes the definition, and what is near it."""
    rows = []
    for s in answers(f.scan):
        largest = s.largest
        rows += [
            row("massive activations", s.n_findings, stack=s.stack, unit="count", headline=True),
            row("near misses", len(at(f.scan.near_misses, stack=s.stack, site=s.site)), stack=s.stack, unit="count"),
        ]
        if s.n_findings:
            here = at(f.scan.findings, stack=s.stack, site=s.site)
            rows += [
                row("a sequence has", s.per_sequence, stack=s.stack, layer=s.shown_layer, unit="count", headline=True),
                row("dims", text=plain(here["dim"]), stack=s.stack, headline=True),
            ]
        if largest is not None:
            rows.append(row("largest ratio", largest.ratio, stack=s.stack, layer=largest.layer, headline=True,
                            place=f"position {largest.pos}, dim {largest.dim}", unit="|h| / median"))  # fmt: skip
    for name, (scan, _) in f.prompts.items():
        s = answers(scan)[0]
        n = len(at(scan.findings, stack=s.stack, site=s.site, layer=s.shown_layer))
        rows.append(row("of one prompt", n, stack=s.stack, layer=s.shown_layer, place=name, unit="count"))
    null = f.scan.info.answer.get("null") or {}
    if "n_findings" in null:
        rows.append(row("of a random-init twin", null["n_findings"], unit="count"))
    if not any(s.n_findings for s in answers(f.scan)):
        try:
            massive(f.scan)
        except Nothing as nothing:
            rows.insert(0, row("", reason=nothing.reason))
    return rows


def curves(f: Finished) -> list[Row]:
    """E4: the three largest |h| and the median of every layer, means over sequences."""
    rows, shown = [], {s.stack: s.shown_layer for s in answers(f.scan)}
    for r in f.scan.layers.itertuples():
        for name in ("top1", "top2", "top3", "median"):
            head = name in ("top1", "median") and shown.get(str(r.stack)) == r.layer
            label = "median" if name == "median" else f"top {name[3:]}"
            rows.append(row(label, getattr(r, name), stack=str(r.stack), layer=r.layer, unit=MAGNITUDE,
                            place="" if r.site == "resid_post" else str(r.site), headline=head))  # fmt: skip
    return rows


def onset(f: Finished) -> list[Row]:
    """E5: first and last layer, and the jump at the first."""
    rows = []
    for s in massive(f.scan):
        rows += [
            row("first layer", s.onset or 0, stack=s.stack, unit="layer", text=s.onset_module or "", headline=True),
            row("last layer", s.offset or 0, stack=s.stack, unit="layer", headline=True),
            row("layers of the model", s.n_layers, stack=s.stack, unit="layer", headline=True),
        ]
        if s.onset_jump is not None:
            rows.append(row("jump at the first layer", s.onset_jump, stack=s.stack, layer=s.onset or 0, headline=True,
                            unit="max |h| / that of the layer before"))  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- E6
def census(f: Finished) -> list[Row]:
    """E6: dims, classes of positions and tokens of the findings at the layer of the largest."""
    rows = []
    for s in massive(f.scan):
        layer = s.shown_layer
        here = at(f.scan.findings, stack=s.stack, site=s.site, layer=layer)
        line = partial(row, stack=s.stack, layer=layer)
        rows += [
            line("positions", text=s.group, headline=True),
            line("dims", text=plain(here["dim"]), headline=True),
            line("tokens", text=json.dumps([t for t, *_ in s.tokens[:MOST_TOKENS]], ensure_ascii=False)),
        ]
        for quantity, column in (("findings at", "position_class"), ("findings at dim", "dim")):
            counts = here[column].value_counts()
            rows += [line(quantity, n, place=str(v), unit="count", headline=column == "position_class")
                     for v, n in counts.items()]  # fmt: skip
        tokens = here["token"].value_counts().head(MOST_TOKENS)
        rows += [line("findings on token", n, place=str(t), unit="count") for t, n in tokens.items()]
    return rows


# ---------------------------------------------------------------------------- E7
def outlier_features(f: Finished) -> list[Row]:
    """E7: outlier features by the rule of Dettmers, and how many of them are massive dims."""
    outcome = (f.classics.info.outcomes if f.classics else {}).get("outlier-features")
    if outcome is None:
        raise Nothing("They were not measured.")
    if "unavailable" in outcome:
        raise Nothing(str(outcome["unavailable"]))
    rows = []
    for stack, numbers in outcome.items():
        for where, found in numbers["at"].items():
            place = "linear inputs" if where == "inputs" else f"hidden state ({where})"
            line = partial(row, stack=stack, place=place, unit="count", headline=True)
            rows += [line("outlier features", found["n"], text=plain(found["dims"]))]
            of_them = "of them massive dims"
            rows.append(line(of_them, len(found["massive"]), text=plain(found["massive"])) if found["n"] else
                        line(of_them, reason="there are none that could be massive"))  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- E8, E9
def spread(f: Finished) -> list[Row]:
    """E8: mean and standard deviation over sequences of the signed value at fixed ranks."""
    ranks, rows = at(f.scan.ranks, source="corpus"), []
    for s in massive(f.scan):
        for r in at(ranks, stack=s.stack, site=s.site).itertuples():
            top = str(r.rank) == "top 1"
            why = "" if r.same_dim == 1 else f"at one dim in {r.same_dim:.0%} of {r.n_sequences} sequences"
            line = partial(row, stack=s.stack, layer=r.layer, headline=top, reason=why)
            rows += [line(f"{r.rank}, mean", r.value_mean, unit="h"), line(f"{r.rank}, std", r.value_std, unit="h")]
            if r.value_mean:
                rows.append(line(f"{r.rank}, spread", r.value_std / abs(r.value_mean), unit="std / |mean|"))
    if not rows:
        raise Nothing("The scan has no ranks over sequences; its notes say why.")
    return rows


def means(f: Finished) -> list[Row]:
    """E9: the constants of set-to-mean: mean of every coordinate with findings at the first layer that has any."""
    rows = []
    for s in massive(f.scan):
        here = at(f.scan.coordinates, stack=s.stack, site=s.site, layer=s.onset)
        here = here[here["dim"] >= 0].sort_values("count", ascending=False, kind="stable")
        rows += [_constant(s, r, i == 0) for i, r in enumerate(here.itertuples())]
    if not rows:
        raise Nothing("The rule is of whole tokens or layers: there is no value of a coordinate.")
    return rows


def _constant(s: StackAnswer, r: pd.Series, first: bool) -> Row:
    return row("mean", r.mean, stack=s.stack, layer=r.layer, place=f"{r.position_class}, dim {r.dim}", unit="h",
               text=f"std {r.std:.4g} over {r.count}", headline=first)  # fmt: skip


FIGURES_OF_PROMPTS = tuple(f"prompts/{p}/figures/magnitudes.png" for p in ("warm-cold", "warm-cold-newline", "why"))
PLACES = (
    Entry("E1", "1, 2; Figs. 1 to 3", "Magnitudes in 3-D", "language", ("scan", "prompts"),
          "|h| over tokens and dims of the paper's prompts at the layer of the largest finding.",
          "A few peaks tower over everything: at the starting token, in some models at the first delimiter.",
          magnitudes, TOWERING, (*FIGURES_OF_PROMPTS, "figures/magnitudes.png")),
    Entry("E2", "2, Table 1", "The largest values of one hidden state", "language", ("scan", "prompts"),
          "|h| of one prompt, sorted: ranks 1 to 5, 10, 100, ceil(1 %), ceil(10 %) and the median.",
          "Fewer than ten values are thousands of times the median.", ranks_of_a_prompt,
          FEW_VALUES),
    Entry("E3", "2", "Detector", "any", ("scan",),
          "Every (token, dim) with |h| > 100 and |h| >= 1,000 x the median |h| of its hidden state, in all layers.",
          "A handful of activations among tens of millions pass.", detected, FEW_ANYWHERE),
    Entry("E4", "2.1, Fig. 4, App. A.4", "Magnitudes over layers", "language", ("scan",),
          "The three largest |h| and the median of every layer, means over sequences.",
          "They are there from an early layer to one of the last, near constant in between.", curves, PLATEAU,
          ("figures/layers.png",)),
    Entry("E5", "2.1", "First and last layer", "any", ("scan",),
          "First and last layer that passes E3, and max |h| there over that of the layer before.",
          "They come abruptly, by one layer, not by slow accumulation.", onset, ABRUPT, ("figures/layers.png",)),
    Entry("E6", "2.2, Fig. 3", "Dims, positions and tokens", "any", ("scan",),
          "E3 on every sequence, counted by dim, by class of position and by token.",
          "A few fixed dims; the starting token, in some models delimiters and words of little meaning.", census,
          PLACED, ("figures/census.png",)),
    Entry("E7", "2.3", "Not outlier features", "any", ("scan", "classics"),
          "Dims with |x| >= 6 at >= 6 % of the tokens in >= 25 % of the layers of >= 90 % of the sequences.",
          "LLaMA2 has outlier features, and none of their dims is a massive one.", outlier_features, NO_OUTLIERS),
    Entry("E8", "3, Table 2", "How constant", "any", ("scan",),
          "The signed value at fixed ranks of |h|, mean and standard deviation over sequences.",
          "The largest values vary by a few per cent of themselves, all others by more than themselves.", spread,
          VARYING),
    Entry("E9", "3", "Means of the massive activations", "any", ("scan",),
          "Mean over sequences of h at every dim and class of position with findings, at the first layer.",
          "They are constants, which the intervention sets.", means, CONSTANTS),
)  # fmt: skip
