"""E13 to E17: attention concentrates, and adds a bias (Sun 2024, Sections 4.1 and 4.2)."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.reproductions.attention_claims import ALIKE_IN_ALL, BIASED, CONCENTRATING, LOOKING, SPARSE, explained
from massact.reproductions.entries import Entry, Finished, Nothing, Row, at, massive, row

STAGES = {"hidden": "hidden state", "normed": "after the norm", "q": "queries", "k": "keys", "v": "values"}
DECOMPOSED = {"constancy": "|u - mean| / |mean|", "cosine": "mean of pairs", "energy_share": "share"}
IN_MASSIVE = "share of |x|^2 in the massive dims"
GROUPS = {"findings": "massive tokens", "random": "random tokens", "others": "other tokens"}


def logits(f: Finished) -> list[Row]:
    """E13: mean logit and probability on the massive tokens of every prompt, before and after the first layer."""
    rows: list[Row] = []
    for name, (scan, explanation) in f.looked().items():
        if explanation is not None and explanation.maps:
            mapped = _mapped(name, scan, explanation)
            rows += [r | {"headline": r["headline"] and not any(x["headline"] for x in rows)} for r in mapped]
    if not rows:
        raise Nothing("There is no attention map; the notes of the explanation say why.")
    return rows


def _mapped(prompt: str, scan: ScanResult, explanation: Explanation) -> list[Row]:
    """The rows of one prompt; the layer after the first, or else the last one, is told."""
    maps, rows = explanation.maps, []
    stack, n = str(maps["stack"]), maps["logits"].shape[1]
    found = at(scan.findings, stack=stack, sequence=0)
    massive_C = sorted({int(p) for p in found["pos"] if 0 <= p < n})
    keys_C, what = (massive_C, "massive tokens") if massive_C else ([0], "position 0")
    rest = [p for p in range(n) if p not in keys_C]
    layers, first = maps["layers"].tolist(), int(found["layer"].min()) if len(found) else -1
    for z_TS, p_TS, layer in zip(maps["logits"], maps["probs"], layers, strict=True):
        queries = [q for q in rest if q > max(keys_C)]
        if not queries or not rest:
            continue
        line = partial(row, stack=stack, layer=layer, place=prompt)
        after = layer == (first + 1 if first + 1 in layers else layers[-1])
        for label, keys in ((what, keys_C), ("other tokens", rest)):
            seen = z_TS[np.ix_(queries, keys)]
            value = float(np.nanmean(seen)) if np.isfinite(seen).any() else math.nan
            rows.append(line(f"logit on {label}", value, unit="logit", headline=after))
        rows.append(line(f"attention on {what}", p_TS[np.ix_(queries, keys_C)].sum(1).mean(), unit="share",
                         headline=after))  # fmt: skip
    return rows


def concentration(f: Finished) -> list[Row]:
    """E14: attention on the massive tokens in every layer, beside as many random ones."""
    axes, rows = explained(f).axes, []
    if not len(axes):
        raise Nothing("The attention of this model is not seen; the notes of the explanation say why.")
    some = bool(axes["concentration"].notna().any())
    for stack in dict.fromkeys(axes["stack"]):
        mine = at(axes, stack=stack)
        if some:
            for name, side in _sides(f.scan, str(stack), mine):
                if side["concentration"].notna().any():
                    what = f"attention on massive tokens, layers {name}"
                    rows.append(row(what, side["concentration"].mean(), stack=str(stack), unit="share", headline=True))
        for r in mine.itertuples():
            line = partial(row, stack=str(stack), layer=r.layer, unit="share")
            told = (
                *([("massive tokens", r.concentration), ("massive tokens, uniform head", r.concentration_uniform),
                   ("random tokens", r.concentration_null)] if some else ()),
                ("position 0", r.concentration_first), ("position 0, uniform head", r.concentration_first_uniform),
            )  # fmt: skip
            last = not some and r.layer == mine["layer"].max()
            rows += [line(f"attention on {what}", x, headline=last and what == "position 0") for what, x in told
                     if not math.isnan(x)]  # fmt: skip
    if not some:
        rows.insert(0, row("", reason="The scan has no findings: there are no massive tokens to attend to."))
    return rows


def _sides(scan: ScanResult, stack: str, axes: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The layers of a stack by whether they read the main cluster: not yet, so, or no longer."""
    main = at(scan.clusters, stack=stack).head(1)
    if not len(main):
        return []
    onset, offset = int(main["onset"].iloc[0]), int(main["offset"].iloc[0])
    layer = axes["layer"]
    return [("up to the first", axes[layer <= onset]),
            ("that read them", axes[(layer > onset) & (layer <= offset + 1)]),
            ("behind the last", axes[layer > offset + 1])]  # fmt: skip


def _reading(scan: ScanResult, explanation: Explanation) -> list[tuple[str, int]]:
    """(stack, layer) of the first block that reads a hidden state with findings, where there is one."""
    found = [(s.stack, (s.onset or 0) + 1) for s in massive(scan)]
    return [(stack, layer) for stack, layer in found if len(at(explanation.trajectory, stack=stack, layer=layer))]


def stages(f: Finished) -> list[Row]:
    """E15: from the hidden state over the norm to queries, keys and values, in the block that reads it first."""
    rows = []
    for name, (scan, explanation) in f.looked().items():
        if explanation is None or not scan.found:
            continue
        for stack, layer in _reading(scan, explanation):
            for r in at(explanation.trajectory, stack=stack, layer=layer).itertuples():
                place = f"{name}: {STAGES[str(r.stage)]}, {GROUPS[str(r.group)]}"
                line = partial(row, stack=stack, layer=layer, place=place)
                told = r.group == "findings" and name == next(iter(f.looked()))
                rows += [line(what, x, unit=unit, headline=told and what == IN_MASSIVE)
                         for what, x, unit in (("largest", r.max, "|x|"), ("norm", r.norm, "|x|"),
                                               ("sparsity", r.sparsity, "Hoyer, 0 to 1"),
                                               (IN_MASSIVE, r.massive_share, "share"))
                         if not math.isnan(x)]  # fmt: skip
    if not rows:
        massive(f.scan)
        raise Nothing("No prompt has a massive activation that a later block reads.")
    return rows


def similarity(f: Finished) -> list[Row]:
    """E16: how alike the massive tokens are after the norm and as queries, keys and values, beside others."""
    explanation, rows = explained(f), []
    for stack, layer in _reading(f.scan, explanation):
        for r in at(explanation.trajectory, stack=stack, layer=layer).itertuples():
            place = f"{STAGES[str(r.stage)]}, {GROUPS[str(r.group)]}"
            line = partial(row, stack=stack, layer=layer, place=place)
            told = r.stage in ("k", "v") and r.group != "random"
            rows += [line(what, x, unit=unit, headline=told and what == "cosine")
                     for what, x, unit in (("cosine", r.cosine, "mean of pairs"),
                                           ("row variance", r.row_variance, "0 for equal rows"),
                                           ("norm", r.norm, "|x|")) if not math.isnan(x)]  # fmt: skip
    if not rows:
        raise Nothing("Nothing is massive before a block that is seen.")
    return rows


def decomposition(f: Finished) -> list[Row]:
    """E17: what the massive tokens add to the output of attention, and whether it is a constant."""
    explanation, rows = explained(f), []
    for s in massive(f.scan):
        mine = at(explanation.decomposition, stack=s.stack, part="concat")
        after = mine[mine["layer"] > (s.onset or 0)]["layer"]
        shown = int(after.iloc[len(after) // 2]) if len(after) else -1
        for r in mine.itertuples():
            line = partial(row, stack=s.stack, layer=r.layer)
            told = r.layer == shown
            for name, unit in DECOMPOSED.items():
                what = name.replace("_", " ")
                for label, x in (("", getattr(r, name)), (", random tokens", getattr(r, f"null_{name}"))):
                    if not math.isnan(x):
                        rows.append(line(f"{what}{label}", x, unit=unit, headline=told and what != "cosine"))
            if not math.isnan(r.residual_error):
                rows.append(line("error of the sum", r.residual_error, unit="of the output"))
    if not rows:
        raise Nothing("The attention of this model is not seen; the notes of the explanation say why.")
    return rows


ATTENTION = (
    Entry("E13", "4.1, Figs. 5 and 6, App. B.1", "Attention maps", "language", ("scan", "prompts", "explain"),
          "Mean over heads of q.k / sqrt(d) and of its softmax, on the paper's prompts.",
          "From the layer after on, attention goes to the massive tokens; logits elsewhere are mostly negative.",
          logits, LOOKING,
          ("prompts/choices/figures/attention_maps.png", "prompts/warm-cold/figures/attention_maps.png",
           "figures/attention_maps.png")),
    Entry("E14", "4.1", "Attention on massive tokens", "any", ("scan", "explain"),
          "Probability on the massive tokens, mean over heads and over the queries that are none, by layer.",
          "It concentrates on them from the layer after they appear.", concentration, CONCENTRATING,
          ("figures/attention_axes.png",)),
    Entry("E15", "4.2, Fig. 7, App. B.2", "From the hidden state to Q, K, V", "language",
          ("scan", "prompts", "explain"),
          "The massive tokens as hidden states, after the norm, and as queries, keys and values.",
          "The norm turns them into sparse vectors in which the massive dims dominate.", stages, SPARSE,
          ("prompts/warm-cold/figures/trajectory.png", "figures/trajectory.png")),
    Entry("E16", "4.2", "Massive tokens are alike", "any", ("scan", "explain"),
          "Mean cosine and variance of the rows of massive tokens at each stage of E15, beside other tokens.",
          "After the norm they are nearly one vector, and so are their keys and values.", similarity, ALIKE_IN_ALL,
          ("figures/trajectory.png",)),
    Entry("E17", "4.2, Eq. 2, Fig. 8, App. B.3", "Implicit bias", "any", ("scan", "explain"),
          "u_k = sum over the massive tokens i of p_ki v_i, heads side by side, and how it varies over queries k.",
          "What they add is essentially the same for every later token: a bias.", decomposition, BIASED,
          ("figures/attention_bias.png",)),
)  # fmt: skip
