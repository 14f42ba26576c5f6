"""The claims of E1 to E9, and of E19: how large massive activations are, where, and how constant."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from massact.records.kinds.scan import ScanResult
from massact.reproductions.claims import Claim, Part, averaged, bounded, counted, shared, untold
from massact.reproductions.entries import Finished, Nothing, answers, at, massive
from massact.reproductions.main_cluster import (
    MOST_CLUSTERS,
    constant,
    handful,
    inside,
    main,
    massive_clusters,
    n_sequences,
    spans,
    values_at,
)
from massact.stats.intervals import Interval, mean_interval, needed, summary_interval

TOWERS = 10.0  # times the tenth largest |h|: LLaMA2-7B 57, LLaMA2-13B 29, Mixtral 39 (Table 1)
EARLY, LATE = 1 / 3, 2 / 3  # of the layers
FLAT = 1.25  # greatest |h| over the least, in between: LLaMA2-7B 1.01, GPT-2 1.22; Phi-2, which accumulates, 4.4
BY_ONE_LAYER = 0.5  # of the greatest |h|: LLaMA2-7B 0.99; Phi-2, which accumulates, at most 0.23
FEW_DIMS = 9
FIXED = 0.9  # of the massive activations of a sequence
LEAST_SIGNS = 12  # values of one size and either sign are alike by chance in 1 of 8 fours, in 1 of 2,048 twelves
OTHER_RANKS = ("top 1%", "top 10%", "median")


def towering(f: Finished) -> list[Part]:
    """E1: of every prompt the greatest |h| over the tenth greatest, and on which class of token it is."""
    ratios, placed = [], 0
    for scan, _ in f.looked().values():
        if not scan.portrait:
            continue
        stack = str(scan.portrait["stack"])
        layer = next(s for s in answers(scan) if s.stack == stack).shown_layer
        h_TD = scan.portrait["magnitude"][scan.portrait["layers"].tolist().index(layer)]
        top = np.sort(h_TD, axis=None)[::-1]
        ratios.append(float(top[0] / top[9]) if len(top) > 9 and top[9] > 0 else math.nan)
        found = at(scan.findings, stack=stack, layer=layer, sequence=0, rank=1)
        placed += bool(found["position_class"].isin(("start", "delimiter")).any())
    if not ratios:
        raise Nothing("The scan has no portrait.")
    return [averaged("greatest |h| over the tenth", ratios, log=True, least=TOWERS, of="prompts", unit="times"),
            shared("a massive one is the greatest, at the start or a delimiter", placed, len(ratios),
                   of="prompts")]  # fmt: skip


def few_values(f: Finished) -> list[Part]:
    """E2: how many values of a hidden state are massive, at the layer that shows most."""
    s = answers(f.scan)[0]
    return handful(f.scan, at(f.scan.findings, stack=s.stack, site=s.site, layer=s.shown_layer), s.stack)


def few_anywhere(f: Finished) -> list[Part]:
    """E3: the same at the layer of the stack that has most of them."""
    s = answers(f.scan)[0]
    rows = at(f.scan.findings, stack=s.stack, site=s.site)
    most = rows["layer"].value_counts().idxmax() if len(rows) else s.shown_layer
    return handful(f.scan, at(rows, layer=most), s.stack)


def plateau(f: Finished) -> list[Part]:
    """E4: from an early layer to one of the last, near constant in between."""
    c, s = main(f.scan), massive(f.scan)[0]
    span = spans(f.scan, c) / s.n_layers
    line = {"stack": c.stack, "unit": "of the layers"}
    told = [averaged("first layer", span["min"], most=EARLY, **line),
            averaged("last layer", span["max"], least=LATE, **line)]  # fmt: skip
    name = "greatest |h| over the least in between"
    layers = list(range(c.onset, c.offset + 1))
    if len(layers) == 1:
        return [*told, untold(name, "It is at one layer: there is nothing in between.", stack=c.stack)]
    rows = inside(f.scan, c)
    by = rows.pivot_table(index="sequence", columns="layer", values="magnitude", aggfunc="mean").reindex(columns=layers)
    known = by.dropna()
    if len(known) < len(by) / 2:
        why = "In most sequences it is not among what the scan keeps at every layer in between."
        return [*told, untold(name, why, n=len(known), stack=c.stack)]
    ratio = known.max(axis=1) / known.min(axis=1)
    return [*told, averaged(name, ratio, log=True, most=FLAT, stack=c.stack, unit="times")]


def abrupt(f: Finished) -> list[Part]:
    """E5: what share of its greatest |h| the block at the first layer writes.

    Before that block the value of a sequence is known where it is listed; else it is between nothing and the greatest
    |h| of that layer, mean over sequences: the interval goes from the lower end of the one to the upper of the other.
    """
    c = main(f.scan)
    name = "share of the greatest |h| that the first layer writes"
    before = at(f.scan.layers, stack=c.stack, site=c.site, layer=c.onset - 1)
    if not len(before):
        return [untold(name, "They are there before the first block that is seen.", stack=c.stack)]
    rows = inside(f.scan, c).groupby(["sequence", "layer"])["magnitude"].mean().unstack()
    own = values_at(f.scan, c, c.onset - 1).abs().reindex(rows.index)
    now, top = rows[c.onset], rows.max(axis=1)
    least = ((now - own.fillna(float(before["top1"].iloc[0]))) / top).dropna()
    most = ((now - own.fillna(0.0)) / top).dropna()
    under, over = mean_interval(least), mean_interval(most)
    found = Interval(under.estimate, under.low, over.high)
    return [bounded(name, found, len(least), least=BY_ONE_LAYER, unit="share", stack=c.stack)]


def _fixed_dims(scan: ScanResult) -> list[Part]:
    """How many dims there are, and whether they are the same in every sequence, at the layer of the main cluster."""
    c = main(scan)
    rows = at(scan.findings, stack=c.stack, site=c.site, layer=c.peak_layer)
    near = at(scan.near_misses, stack=c.stack, site=c.site, layer=c.peak_layer)
    having = (
        pd.concat([rows, near]).groupby("dim")["sequence"].nunique()
    )  # a dim may pass in some, and be near in others
    n = rows["sequence"].nunique()
    fixed = rows.assign(fixed=rows["dim"].isin(having[having > n / 2].index))
    return [counted("dims", rows["dim"].nunique(), n, most=FEW_DIMS, stack=c.stack),
            averaged("share at dims that most sequences have", fixed.groupby("sequence")["fixed"].mean(), least=FIXED,
                     unit="share", stack=c.stack)]  # fmt: skip


def placed(f: Finished) -> list[Part]:
    """E6: a few fixed dims, and the starting token."""
    c = main(f.scan)
    name = "sequences with one at the start"
    told = _fixed_dims(f.scan)
    if f.scan.info.corpus.get("kind") != "tokens":
        return [*told, untold(name, "It is about text: images and sound have no starting token.", stack=c.stack)]
    rows = at(f.scan.findings, stack=c.stack, site=c.site, layer=c.peak_layer, position_class="start")
    return [*told, shared(name, rows["sequence"].nunique(), n_sequences(f.scan), stack=c.stack)]


def no_outlier_features(f: Finished) -> list[Part]:
    """E7: none of the dims of outlier features is a massive one."""
    stack = massive(f.scan)[0].stack
    outcome = (f.classics.info.outcomes if f.classics else {}).get("outlier-features") or {}
    inputs = (outcome.get(stack) or {}).get("at", {}).get("inputs")
    name = "dims of outlier features that are massive"
    if inputs is None:
        return [untold(name, "Outlier features of the inputs of linear layers were not measured.", stack=stack)]
    if not inputs["n"]:
        return [untold(name, "There are no outlier features, whose dims could be massive.", stack=stack)]
    return [counted(name, len(inputs["massive"]), n_sequences(f.scan), most=0, stack=stack)]


def varying(f: Finished) -> list[Part]:
    """E8: the main one varies by a few per cent; values at low ranks by more than themselves."""
    c = main(f.scan)
    told = [constant("of the largest", f.scan, c, c.peak_layer)]
    ranks = at(f.scan.ranks, stack=c.stack, site=c.site, source="corpus")
    for r in ranks[ranks["rank"].isin(OTHER_RANKS)].itertuples():
        n, name = int(r.n_sequences), f"of {r.rank}"
        line = {"stack": c.stack, "unit": "std / |mean|"}
        if n < LEAST_SIGNS:
            why = f"{n} sequences are too few for values of either sign: {LEAST_SIGNS} would do (reproduce scans 16)."
            told.append(untold(name, why, n=n, n_needed=LEAST_SIGNS, **line))
            continue
        std = r.value_std * math.sqrt(n / (n - 1))
        size = abs(r.value_mean) / std if std else math.inf
        found = summary_interval(size, 1.0, n)  # the mean in standard deviations
        with np.errstate(all="ignore"):
            low, value, high = (float(np.divide(1.0, max(x, 0.0))) for x in (found.high, size, found.low))
        would = needed(size - 1.0, 1.0, 0.0, LEAST_SIGNS)
        told.append(bounded(name, Interval(value, low, high), n, least=1.0, n_needed=would, **line))
    return told


def constants(f: Finished) -> list[Part]:
    """E9: every massive activation is nearly the same in all sequences, at its first layer."""
    rows = massive_clusters(f.scan).head(MOST_CLUSTERS)
    return [constant(f"{c.position_class}, dim {c.dim}", f.scan, c, c.onset) for c in rows.itertuples()]


def of_images(f: Finished) -> list[Part]:
    """E19: fixed dims, tokens that vary with the image, in the later layers only."""
    c, s = main(f.scan), massive(f.scan)[0]
    rows = at(f.scan.findings, stack=c.stack, site=c.site, layer=c.peak_layer)
    largest = rows.loc[rows.groupby("sequence")["magnitude"].idxmax(), "pos"]
    elsewhere = int((largest != largest.mode().iloc[0]).sum())
    line = {"stack": c.stack, "of": "images"}
    dims = [p | {"of": "images"} for p in _fixed_dims(f.scan)]
    begins = spans(f.scan, c)["min"] / s.n_layers
    return [*dims, shared("images with the largest at another token than most", elsewhere, len(largest), **line),
            averaged("first layer", begins, least=0.5, unit="of the layers", **line)]  # fmt: skip


TOWERING = Claim(
    "On most prompts the greatest |h| is less than ten times the tenth, or it is at another token.", towering
)
FEW_VALUES = Claim("Most sequences have none, or more than nine, at the layer of the largest.", few_values)
FEW_ANYWHERE = Claim("Most sequences have none, or more than nine at the layer with most.", few_anywhere)
PLATEAU = Claim("They begin behind the first third of the layers, end before the last, or the greatest |h| in between "
                "is more than 1.25 times the least.", plateau)  # fmt: skip
ABRUPT = Claim("The block at the first layer writes less than half of the greatest |h|.", abrupt)
PLACED = Claim("There are ten dims or more, they differ between sequences, or most sequences have none at the start.",
               placed)  # fmt: skip
NO_OUTLIERS = Claim("A dim of an outlier feature is a massive one.", no_outlier_features)
VARYING = Claim(
    "The largest varies by more than 10 % of itself, or a value at a low rank by less than itself.", varying
)
CONSTANTS = Claim("One of them varies by more than 10 % of itself.", constants)
OF_IMAGES = Claim("Their dims differ between images, most images have them at one token, or they begin in the first "
                  "half of the layers.", of_images)  # fmt: skip
