"""Which published rules call this model what, and at which layers: all of them, from the statistics of one pass."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from massact.models import Model
from massact.records.errors import class_and_line
from massact.records.sites import Site
from massact.records.tables import frame
from massact.scans.criteria import CRITERIA, Criterion, Evidence, criteria
from massact.scans.evidence import norms_table, spikes_table
from massact.stats import HiddenResult, TokenMax, TokenMaxResult
from massact.trace import Probe

MOST_TOKENS = 4_000_000  # rows of a table of every token of every layer
MOST_DIMS = 8  # named
BLIND = "no MLP has a single output projection"
SITE = ["stack", "site"]
Row = dict[str, object]


def spike_probes(model: Model, stacks: Sequence[str]) -> list[Probe]:
    """A look at the input of every down_proj, in the stacks that have one: what the rules on it need."""
    return [
        Probe("spikes", f"{name}/*.mlp_act" if name else "*.mlp_act", TokenMax)
        for name in stacks
        if any("mlp_act" in block.places for block in model.anatomy.stack(name).blocks)
    ]


def every_token(
    seen: Evidence, hidden: Mapping[Site, HiddenResult], spikes: Mapping[Site, TokenMaxResult]
) -> tuple[Evidence, dict[str, str]]:
    """What a scan has seen with the tokens of every layer, and for each need that is not met why it is not."""
    unmet = {}
    if not len(seen.candidates) or seen.candidates.mad.isna().all():
        unmet["mad"] = "the median absolute deviation is another pass over every hidden state"
    if "modality" not in seen.candidates:
        unmet["modality"] = "the modality of the tokens was not looked up"
    for need, results in (("tokens", hidden), ("mlp_act", spikes)):
        if (n := sum(int(r.token_offsets[-1]) for r in results.values())) > MOST_TOKENS:
            unmet[need] = f"{n:,} tokens of all layers are more than {MOST_TOKENS:,}"
    if not spikes:
        unmet["mlp_act"] = BLIND
    norms = seen.norms if "tokens" in unmet else norms_table(hidden, every_layer=True)
    return replace(seen, norms=norms, spikes=spikes_table({} if "mlp_act" in unmet else spikes)), unmet


def criteria_table(
    seen: Evidence, unmet: Mapping[str, str], own: Criterion, thresholds: Mapping[str, float]
) -> pd.DataFrame:
    """One row per rule and point of a stack: the table `criteria`.

    Args:
        seen: with the tokens of every layer and of the input of down_proj, where there are such.
        unmet: need -> why it is not met.
        own: the rule of the scan; thresholds: its constants in force. All others have their published ones.
    """
    rows: list[Row] = []
    known = {own.name: own} | criteria()
    for part, n_tokens in _parts(seen):
        for rule in known.values():
            if ("mlp_act" in rule.needs) != (part.layers.empty):
                continue
            constants = dict(thresholds if rule is own else rule.thresholds)
            looked = part.spikes if part.layers.empty else part.layers
            where = {"stack": looked["stack"].iloc[0], "site": looked["site"].iloc[0]}
            rows.append(where | _told(rule, constants, rule is own) | _verdict(rule, constants, part, unmet, n_tokens))
    blind = sorted(set(seen.layers["stack"]) - set(seen.spikes["stack"] if len(seen.spikes) else ()))
    for rule in known.values():
        if "mlp_act" in rule.needs:
            told = _told(rule, rule.thresholds, rule is own) | _nothing(
                "unavailable", f"{unmet.get('mlp_act', BLIND)}."
            )
            rows += [{"stack": stack, "site": "mlp_act"} | told for stack in blind]
    order = list(known)
    return frame("criteria", sorted(rows, key=lambda r: (str(r["stack"]), order.index(str(r["criterion"])))))


def _parts(seen: Evidence) -> Iterator[tuple[Evidence, int]]:
    """The evidence of each hidden state, and of each stack's inputs of down_proj (without layers); their tokens."""
    for key in dict.fromkeys(seen.layers[SITE].itertuples(index=False, name=None)):
        mine = [t[(t["stack"] == key[0]) & (t["site"] == key[1])] if len(t) else t for t in
                (seen.candidates, seen.layers, seen.dims, seen.norms)]  # fmt: skip
        norms = mine[3]
        yield Evidence(*mine), int((norms.layer == norms.layer.max()).sum()) if len(norms) else 0
    if len(seen.spikes):
        for _, spikes in seen.spikes.groupby(SITE, sort=False):
            none = (seen.candidates[:0], seen.layers[:0], seen.dims[:0], seen.norms[:0])
            yield Evidence(*none, spikes), int((spikes.layer == spikes.layer.max()).sum())


def _told(rule: Criterion, constants: Mapping[str, float], own: bool) -> Row:
    published = {name: value for name, value in constants.items() if not np.isnan(value)}
    return {"criterion": rule.name, "kind": rule.kind, "own": own, "thresholds": json.dumps(published),
            "source": rule.source}  # fmt: skip


def _nothing(verdict: str, reason: str) -> Row:
    return {
        "verdict": verdict, "reason": reason, "n_findings": np.nan, "at_least": False, "layers": "[]", "dims": "[]",
        "n_dims": np.nan, "n_tokens": np.nan, "token_share": np.nan, "statistic": "", "greatest": np.nan,
        "greatest_layer": -1,
    }  # fmt: skip


def _verdict(
    rule: Criterion, constants: Mapping[str, float], e: Evidence, unmet: Mapping[str, str], n_tokens: int
) -> Row:
    """What a rule says of one part of the evidence."""
    if any(np.isnan(value) for value in constants.values()):
        return _reported(rule, e)
    missing = [need for need in rule.needs if need in unmet and need not in rule.bounded]
    if missing:
        reason = f"{unmet[missing[0]]}: asked for by --criterion {rule.name}."
        return _nothing("unavailable", reason)
    try:
        rows, open_ = _passing(rule, constants, e, unmet)
        kept = int(e.candidates["rank"].max()) if len(e.candidates) else 0
        more = rule.lacks(e, constants, rows, kept) if kept else False
    except Exception as error:
        if rule.name in CRITERIA:
            raise
        return _nothing("unavailable", f"it failed: {class_and_line(error)}.")
    if not len(rows) and (open_ or more):
        reason = "what is near its bounds would have to be measured" if open_ else f"only {kept:,} values were kept"
        return _nothing("undecided", f"{reason}: --criterion {rule.name}.")
    told = _nothing("yes" if len(rows) else "no", "")
    dims = rows["dim"].value_counts() if "dim" in rows else pd.Series(dtype=int)
    if {"sequence", "pos"} <= set(rows):
        n = float(len(rows[["sequence", "pos"]].drop_duplicates()))
        told |= {"n_tokens": n, "token_share": n / n_tokens if n_tokens else np.nan}
    return told | {
        "n_findings": float(len(rows)), "at_least": bool(len(rows)) and (open_ or more),
        "layers": json.dumps(sorted({int(x) for x in rows["layer"]})),
        "dims": json.dumps([int(d) for d in dims.index[:MOST_DIMS]]),
        "n_dims": float(len(dims)) if "dim" in rows else np.nan,
    }  # fmt: skip


def _passing(
    rule: Criterion, constants: Mapping[str, float], e: Evidence, unmet: Mapping[str, str]
) -> tuple[pd.DataFrame, bool]:
    """The rows that pass, and whether more may where only bounds are known.

    MAD <= median, always: of magnitudes, the half that is no greater than the median is no further from it than that.
    """
    if "mad" not in unmet or "mad" not in rule.needs:
        return rule.passing(e, constants), False
    c = e.candidates
    surely = rule.passing(replace(e, candidates=c.assign(mad=c["median"])), constants)
    maybe = rule.passing(replace(e, candidates=c.assign(mad=0.0)), constants)
    return surely, len(maybe) > len(surely)


def _reported(rule: Criterion, e: Evidence) -> Row:
    """The statistic of a source that sets no threshold, where it is greatest."""
    told: dict[str, Any] = _nothing("reported", "The source sets no threshold: it reports the statistic.")
    if rule.statistic not in e.layers or e.layers[rule.statistic].isna().all():
        return told | {"verdict": "unavailable", "reason": "its source sets no threshold."}
    row = e.layers.loc[e.layers[rule.statistic].idxmax()]
    return told | {"statistic": rule.statistic, "greatest": float(row[rule.statistic]),
                   "greatest_layer": int(row["layer"])}  # fmt: skip
