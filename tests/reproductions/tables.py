"""Tables of finished runs, written by hand: what is not given is empty, unknown or zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from massact.records.answer import Answer, Peak, StackAnswer
from massact.records.kinds.explanation import ExplainInfo, Explanation
from massact.records.kinds.intervention import InterveneInfo, Intervention
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.tables import columns_of, frame

GOLDEN = Path(__file__).parents[1] / "golden"
UNSAID: dict[str, Any] = {"string": "", "float64": np.nan, "int64": 0, "bool": False}
L, DIM = 12, 7


def filled(table: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A declared table of which only some columns are given."""
    unsaid = {c: UNSAID[dtype] for c, (dtype, _) in columns_of(table).items()}
    return frame(table, [unsaid | r for r in rows])


def planted(
    n: int = 8, onset: int = 2, offset: int = 10, size: float = 500.0, spread: float = 0.01, grow: float = 1.0,
    per: int = 1, where: Sequence[str] = ("start",), before: float = 1.0, **more: Any,
) -> ScanResult:  # fmt: skip
    """A scan of n sequences and 12 layers with values of dim 7 that are there from the onset to the offset.

    Args:
        size: at the onset; grow: by which factor at each later layer; spread: std / mean over sequences.
        per: tokens of a sequence that have it; where: class of the first one, of each sequence in turn.
        before: greatest |h| of all other layers.
        more: dims (of each sequence in turn), positions (of each sequence in turn), kind, bos, median.
    """
    kind, bos, dims = more.get("kind", "tokens"), more.get("bos", {}), more.get("dims", (DIM,))
    z = np.linspace(-1, 1, n) / np.std(np.linspace(-1, 1, n)) if n > 1 else np.zeros(1)
    at = more.get("positions", (0,))
    rows = []
    for s in range(n):
        for layer in range(onset, offset + 1):
            value = size * (1 + spread * z[s]) * grow ** (layer - onset)
            rows += [{"site": "resid_post", "sequence": s, "layer": layer, "pos": at[s % len(at)] + k,
                      "dim": dims[s % len(dims)], "value": value, "magnitude": value, "median": 0.1,
                      "ratio": value / 0.1, "token": f"token {s}", "criterion": "sun2024", "rank": k + 1,
                      "position_class": where[s % len(where)] if k == 0 else "other"} for k in range(per)]  # fmt: skip
    found = filled("findings", rows)
    top = found.groupby("layer")["magnitude"].max() if rows else pd.Series(dtype=float)
    layers = [{"site": "resid_post", "layer": i, "top1": top.get(i, before), "max": top.get(i, before),
               "median": 0.1, "n_sequences": n} for i in range(L + 1)]  # fmt: skip
    result = open_run(GOLDEN / "explained_1")
    info = replace(result.info, answer=_answer(found, bos).as_dict(), corpus={"kind": kind, "n_sequences": n})
    return ScanResult(info, filled("layers", layers), found, ranks=filled("ranks", more.get("ranks", [])),
                      portrait=more.get("portrait", {}))  # fmt: skip


def _answer(found: pd.DataFrame, bos: dict[str, Any]) -> Answer:
    peak = Peak(L, 0, DIM, 1.0, 1.0, 0.1, 10.0, "", 0, "start")
    if len(found):
        r = found.loc[found["magnitude"].idxmax()]
        peak = Peak(int(r.layer), int(r.pos), int(r.dim), r.value, r.magnitude, 0.1, r.ratio, "", 0, r.position_class)
    layers = sorted({int(x) for x in found["layer"]})
    stack = StackAnswer("", "resid_post", L, len(found), layers, layers[0] if layers else None,
                        layers[-1] if layers else None, None, None, [(DIM, 1.0)] if layers else [], [], "start", 1.0,
                        peak if layers else None, None, peak, peak, {}, 0)  # fmt: skip
    return Answer(bool(layers), [stack], bos=bos)


def explanation(**tables: Any) -> Explanation:
    """An explanation of which only some tables have rows; maps as they are."""
    maps = tables.pop("maps", {})
    return Explanation(ExplainInfo(), maps=maps, **{name: filled(name, rows) for name, rows in tables.items()})


def effects(rows: Sequence[dict[str, Any]], text: str = "embedded") -> Intervention:
    """Effects on all of a group, of eight sequences, whose interval is finite."""
    usual = {"layer": 2, "group": "all", "baseline": 10.0, "edited": 10.0, "ci_low": -1.0, "ci_high": 1.0, "n_calls": 1,
             "n_elements": 4, "n_sequences": 8}  # fmt: skip
    return Intervention(InterveneInfo(corpus={"name": text}), filled("effects", [usual | r for r in rows]))
