"""What a fold changes layer by layer: greatest |h|, findings, head-room, and what attention gives to the slots.

Shapes: N sequences, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd

from massact.corpora import Corpus
from massact.explanations.targets import positions_of
from massact.models import Model, with_attention
from massact.records.formats import MAXIMA
from massact.records.kinds.scan import ScanResult
from massact.records.tables import frame
from massact.stats.heads import HeadOptions, HeadStats, Targets
from massact.trace import Probe, measure

N_SEQUENCES = 8  # whose attention is looked at


def layers_table(before: ScanResult, after: ScanResult, heads: pd.DataFrame) -> pd.DataFrame:
    """The table `fold_layers`: a row for each layer of both scans.

    Args:
        heads: the table `fold_heads`.
    """
    keys = ["stack", "site", "layer"]
    columns = {"max": "max", "n_findings": "findings", **{f"headroom_{name}": f"headroom_{name}" for name in MAXIMA}}
    old, new = (
        scan.layers[[*keys, "n_sequences", *columns]].rename(
            columns={c: f"{name}_{side}" for c, name in (columns | {"n_sequences": "n_sequences"}).items()})
        for scan, side in ((before, "before"), (after, "after"))
    )  # fmt: skip
    both = old.merge(new, on=keys, how="inner")
    mean = heads.groupby("layer")[["massive_before", "slots_after"]].mean()
    both["massive_before"] = both["layer"].map(mean["massive_before"]).astype(float)
    both["slots_after"] = both["layer"].map(mean["slots_after"]).astype(float)
    return frame("fold_layers", both.to_dict("list"))


def heads_table(before: tuple[Model, Corpus], after: tuple[Model, Corpus], scan: ScanResult) -> pd.DataFrame:
    """The table `fold_heads`: of every head the attention on massive tokens before, and on the slots after.

    Args:
        before: the model and what was scanned; after: the folded model and the texts without a prefix.
    """
    old, new = (_masses(model, corpus, scan, name) for (model, corpus), name in
                ((before, "mass_findings"), (after, "slot_mass")))  # fmt: skip
    rows = [
        {"layer": layer, "head": head, "massive_before": float(old[layer][head]) if layer in old else np.nan,
         "slots_after": float(new[layer][head])}
        for layer, mine in sorted(new.items()) for head in range(len(mine))
    ]  # fmt: skip
    return frame("fold_heads", rows)


def _masses(model: Model, corpus: Corpus, scan: ScanResult, name: str) -> Mapping[int, np.ndarray]:
    """Layer -> (H,) attention, mean over the queries and the sequences."""
    seen, few = with_attention(model), corpus.head(min(N_SEQUENCES, corpus.n_sequences))
    found = positions_of(scan.findings, few.n_sequences) if name == "mass_findings" else {}
    make = partial(HeadStats, Targets(found, {}, {}), HeadOptions(columns=False, bias=False))
    sites = list(seen.anatomy.attentions)
    measured = measure(seen, few, [Probe("heads", str(site), make) for site in sites])
    made = {}
    for site in sites:
        of_NH = measured.result("heads", site).per_head[name]
        known_NH = of_NH[~np.isnan(of_NH).all(1)]
        made[site.layer] = np.nanmean(known_NH, axis=0) if len(known_NH) else np.full(of_NH.shape[1], np.nan)
    return made
