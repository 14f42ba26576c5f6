"""From the scans of several checkpoints: one table, where findings emerge, and the curve of every layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from massact.records.answer import Answer, StackAnswer
from massact.records.kinds.scan import ScanResult
from massact.records.kinds.trajectory import CheckpointRecord, Emergence, StackSummary
from massact.records.tables import columns_of, frame
from massact.stats import fit_dynamics

KEYS = ["stack", "site", "layer"]


def rows_of(results: list[tuple[CheckpointRecord, ScanResult]]) -> pd.DataFrame:
    """The table "revisions", in the order given."""
    parts = []
    for record, result in results:
        layers, found = result.layers, result.findings
        whole = bool(len(found)) and bool((found["sequence"] < 0).all())  # rules of whole dims or layers
        having = found.groupby(KEYS)["sequence"].nunique()
        counts = np.array([having.get(k, 0) for k in layers[KEYS].itertuples(index=False, name=None)], float)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = counts / layers["n_sequences"].to_numpy(float)
        taken = {c: layers[c].to_numpy() for c in columns_of("revisions") if c in layers}
        parts.append(frame("revisions", taken | {
            "revision": [record.name] * len(layers), "step": np.full(len(layers), record.step),
            "share": np.full(len(layers), np.nan) if whole else share,
            "found": layers["n_findings"].to_numpy() > 0,
        }))  # fmt: skip
    parts = [p for p in parts if len(p)]
    return pd.concat(parts, ignore_index=True) if parts else frame("revisions")


def summaries(result: ScanResult) -> list[StackSummary]:
    """What a scan says about each stack."""
    answer = Answer.from_dict(result.info.answer)
    return [_summary(result.layers, stack) for stack in answer.stacks]


def _summary(layers: pd.DataFrame, of: StackAnswer) -> StackSummary:
    mine = layers[(layers["stack"] == of.stack) & (layers["site"] == of.site)].set_index("layer")
    finite = mine["ratio"][np.isfinite(mine["ratio"].to_numpy(float))]
    peak = int(finite.idxmax()) if len(finite) else None

    def at_peak(column: str) -> float:
        return float("nan") if peak is None else float(mine[column][peak])

    dims = [d for d, _ in of.dims if d >= 0]
    most = float(mine["ratio_max"].max()) if len(mine) else float("nan")
    return StackSummary(of.stack, of.site, of.n_findings, of.onset, of.offset, dims, peak,
                        at_peak("top1"), at_peak("median"), at_peak("ratio"), most)  # fmt: skip


def emergence(scanned: list[CheckpointRecord]) -> list[Emergence]:
    """Where findings first appear in each stack, and whether they stay; checkpoints in the order of training."""
    found = []
    for stack, site in dict.fromkeys((s.stack, s.site) for c in scanned for s in c.stacks):
        seen = [(c.name, s) for c in scanned for s in c.stacks if (s.stack, s.site) == (stack, site)]
        having = [i for i, (_, s) in enumerate(seen) if s.n_findings]
        if not having:
            continue
        i, last = having[0], having[-1]
        first = seen[i][1]
        assert first.onset is not None  # it has findings
        found.append(Emergence(
            stack, site, seen[i][0], seen[i - 1][0] if i else None, first.onset, first.dims, seen[last][1].dims,
            [name for name, s in seen[i:] if not s.n_findings],
            seen[last + 1][0] if last + 1 < len(seen) else None,
        ))  # fmt: skip
    return found


def dynamics(revisions: pd.DataFrame) -> list[dict[str, Any]]:
    """The Hidden-Dynamics curve of the ratio of every layer; NaN with the reason where there is none."""
    return [
        dict(zip(KEYS, (str(key[0]), str(key[1]), int(key[2])), strict=True))
        | fit_dynamics(part["step"].to_numpy(), part["ratio"].to_numpy()).as_dict()
        for key, part in revisions.groupby(KEYS, sort=False)
    ]


def alike(scanned: list[CheckpointRecord]) -> list[str]:
    """What a reader must know of checkpoints that are not of one training, or that are the same one twice."""
    notes: list[str] = []
    by_weights: dict[Any, list[str]] = {}
    for c in scanned:
        by_weights.setdefault(c.model.get("weights_sha256"), []).append(c.name)
    for names in by_weights.values():
        if len(names) > 1:
            more = [f"{len(names) - 4:,} more"] if len(names) > 4 else []
            shown = [*names[:4], *more]
            notes.append(f"{', '.join(shown[:-1])} and {shown[-1]} have the very same weights.")
    for what in ("architecture", "n_layers", "d_model", "dtype"):
        kinds = list(dict.fromkeys(str(c.model.get(what)) for c in scanned))
        if len(kinds) > 1:
            notes.append(f"The checkpoints differ in {what}: {', '.join(kinds[:4])}.")
    return notes
