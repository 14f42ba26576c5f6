"""What quantisation did to the massive activations: the clusters of a model beside those of its quantised form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from massact.records.clusters import passing
from massact.records.kinds.comparison import ComparedRun
from massact.records.kinds.scan import ScanResult
from massact.records.tables import frame
from massact.records.weight_types import packing_in_words, packing_of
from massact.reports.parts import UNAVAILABLE
from massact.reports.spelling import listed, number, percent, visible

KEPT, STRONGER, WEAKER, MOVED, GONE, NEW = "kept", "stronger", "weaker", "moved", "gone", "new"
NOT_JUDGED = "not judged"  # scanned on different inputs, or by different rules
VERDICTS = (KEPT, STRONGER, WEAKER, MOVED, GONE, NEW, NOT_JUDGED)
LEAST = 0.8  # of its value and of its share of the sequences: below it is weaker; above 1 / LEAST stronger
NEAR = 1  # layers by which an onset may differ: it is where half of the sequences have it
_PLACE = ["stack", "site", "dim", "position_class"]
_NAMED = 3  # clusters that are told one by one


@dataclass(frozen=True)
class Pair:
    """A run and that of its quantised form.

    Args:
        original, quantised: the runs.
        same: whether norms and biases are the same; None where an older run does not tell.
    """

    original: ComparedRun
    quantised: ComparedRun
    same: bool | None


def pairs(runs: Sequence[ComparedRun]) -> list[Pair]:
    """Which runs are of a model and of a quantised form of it, from what they record.

    Those of the same shape, where the norms and biases are the same; where none has the same ones, or they are not
    recorded, the only run of that shape in full precision.
    """
    scanned = [run for run in runs if run.scan is not None]
    full = [run for run in scanned if packing_of(_model(run)) is None]
    found = []
    for run in scanned:
        if packing_of(_model(run)) is None:
            continue
        alike = [other for other in full if _shape(other) == _shape(run)]
        sure = [other for other in alike if _same(other, run)]
        chosen = sure[:1] or (alike if len(alike) == 1 else [])
        found += [Pair(other, run, _same(other, run)) for other in chosen]
    return found


def _model(run: ComparedRun) -> dict[str, Any]:
    return run.scan.info.model if run.scan is not None else {}


def _shape(run: ComparedRun) -> tuple[str, ...]:
    model = _model(run)
    return tuple(str(model.get(name)) for name in ("architecture", "n_layers", "d_model"))


def _same(one: ComparedRun, other: ComparedRun) -> bool | None:
    ours, theirs = (_model(run).get("vectors_sha256") for run in (one, other))
    return ours == theirs if ours and theirs else None


def survival_table(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """A row for every cluster of a model, with what became of it in each of its quantised forms; and the new ones."""
    rows: list[dict[str, Any]] = []
    for pair in pairs(runs):
        assert pair.original.scan is not None and pair.quantised.scan is not None
        names = {"original": pair.original.label, "quantised": pair.quantised.label}
        rows += [names | row for row in _clusters(pair.original.scan, pair.quantised.scan)]
    return frame("survival", rows)


def _clusters(original: ScanResult, quantised: ScanResult) -> list[dict[str, Any]]:
    alike = original.info.corpus.get("sha256") == quantised.info.corpus.get("sha256") and (
        original.info.criterion == quantised.info.criterion
    )
    before, after, left = passing(original.clusters), quantised.clusters, passing(quantised.clusters)
    rows = []
    for _, old in before.iterrows():
        there = after[(after[_PLACE] == old[_PLACE]).all(axis=1)]
        new = there.loc[there["n_findings"].idxmax()] if len(there) else None
        left = left[~(left[_PLACE] == old[_PLACE]).all(axis=1)]
        rows.append((old, new))
    known = before.set_index(_PLACE).index
    left = left.loc[[key not in known for key in left.set_index(_PLACE).index]]
    made = []
    for old, new in rows:
        if new is None:  # at another dim of the same tokens, where it has taken the place of this one
            others = left[(left[["stack", "site", "position_class", "label"]]
                           == old[["stack", "site", "position_class", "label"]]).all(axis=1)]  # fmt: skip
            elsewhere = others.iloc[0] if len(others) else None
            left = left.drop(index=[] if elsewhere is None else [elsewhere.name])
            made.append(_row(old, elsewhere, MOVED if elsewhere is not None else GONE, alike))
        else:
            made.append(_row(old, new, _verdict(old, new), alike))
    return made + [_row(None, new, NEW, alike) for _, new in left.iterrows()]


def _verdict(old: pd.Series, new: pd.Series) -> str:
    """What became of a cluster that is at the same dim and on the same class of tokens."""
    size = abs(new["mean"]) / abs(old["mean"]) if old["mean"] else math.inf
    share = new["share"] / old["share"] if old["share"] else math.nan
    if not new["n_findings"] or size < LEAST or share < LEAST:
        return WEAKER
    if old["mean"] * new["mean"] < 0 or abs(int(new["onset"]) - int(old["onset"])) > NEAR:
        return MOVED
    return STRONGER if size > 1 / LEAST else KEPT


def _row(old: pd.Series | None, new: pd.Series | None, verdict: str, judged: bool) -> dict[str, Any]:
    at: Any = old if old is not None else new
    row = {name: at[name] for name in ("stack", "site", "label", "dim", "position_class")}
    row |= {"cluster": 0 if old is None else old["cluster"], "verdict": verdict if judged else NOT_JUDGED}
    row["dim_quantised"] = -1 if new is None else new["dim"]
    row["n_findings_quantised"] = 0 if new is None else new["n_findings"]
    for name, column in (("onset", "onset"), ("value", "mean"), ("spread", "spread"), ("share", "share")):
        row[name] = math.nan if old is None else float(old[column])
        row[f"{name}_quantised"] = math.nan if new is None else float(new[column])
    return row


# ------------------------------------------------------------------------------------------------ words
def survival_in_words(runs: Sequence[ComparedRun], table: pd.DataFrame) -> list[str]:
    """What each quantised form is, how many clusters it kept, and the largest of them one by one."""
    said = []
    for pair in pairs(runs):
        mine = table[(table["original"] == pair.original.label) & (table["quantised"] == pair.quantised.label)]
        said += [_form(pair), *packing_in_words(packing_of(_model(pair.quantised)))]
        old = mine[mine["cluster"] > 0]
        if not len(mine):
            said.append("Neither of the two has massive activations.")
            continue
        counts = Counter(mine["verdict"])
        told = listed([f"{counts[v]:,} {v}" for v in VERDICTS if counts[v]])
        said.append(f"Of the {len(old):,} clusters of {visible(pair.original.label)}: {told}.")
        if counts[NOT_JUDGED]:
            said.append("They are not judged: the two runs are of different inputs, or by different rules.")
        said += [_cluster(row) for _, row in mine.head(_NAMED).iterrows()]
    return said


def _form(pair: Pair) -> str:
    method = (packing_of(_model(pair.quantised)) or {}).get("method")
    why = {
        True: "norms and biases are the same",
        False: "of the same shape; its norms or biases are others: something was folded into them, or it is another "
        "model",
        None: "of the same shape; whether it is the same model an older run does not record",
    }[pair.same]
    return f"{visible(pair.quantised.label)} is a quantised form ({method}) of {visible(pair.original.label)} ({why})."


def _cluster(row: pd.Series) -> str:
    """Dim 507 (start): onset 12 -> 12, value 23,128 -> 22,900, spread 0.01 -> 0.01, 100 % -> 100 %: kept."""
    spelled = {"onset": lambda x: f"{int(x)}", "value": number, "spread": number, "share": percent}
    parts = [f"{name} {' -> '.join(_spelled(row[c], spell) for c in (name, f'{name}_quantised'))}"
             for name, spell in spelled.items()]  # fmt: skip
    dim, other = int(row["dim"]), int(row["dim_quantised"])
    passes = row["verdict"] != WEAKER or row["n_findings_quantised"] > 0
    verdict = row["verdict"] if passes else f"{row['verdict']} (it no longer passes)"
    where = f"dim {dim}" + (f", then {other}" if other not in (dim, -1) else "") if dim >= 0 else "tokens"
    return f"{visible(row['label'])} at {where} ({visible(row['position_class'])}): {', '.join(parts)}: {verdict}."


def _spelled(value: float, spell: Any) -> str:
    return UNAVAILABLE if math.isnan(value) else spell(value)
