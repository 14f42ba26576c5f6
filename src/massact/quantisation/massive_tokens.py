"""Massive tokens: which positions a scan found massive activations on, and the cluster of each.

Shapes: B rows of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from massact.corpora import Batch
from massact.corpora.masks import first_kept
from massact.records.clusters import KEYS, MASSIVE, passing
from massact.records.kinds.scan import ScanResult


@dataclass(frozen=True)
class MassiveTokens:
    """The tokens of a corpus that hold a massive activation at any layer.

    Args:
        clusters: names, the largest first, as 507@start.
        of: sequence -> position -> index of the cluster of its largest finding.
        left: outlier features that pass: they are on most tokens, so that no token can be spared for them.
        first: they are the first tokens that count, of whatever sequence.
    """

    clusters: tuple[str, ...] = ()
    of: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    first: bool = False

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.of.values()))

    def named(self) -> set[str]:
        """Clusters that have a token here."""
        return {self.clusters[c] for places in self.of.values() for c in places.values()}

    def before(self, end: int) -> MassiveTokens:
        """The same of the sequences before one."""
        return replace(self, of={s: places for s, places in self.of.items() if s < end})

    def behind(self, start: int) -> MassiveTokens:
        """The same of the sequences from one on, counted from it."""
        return replace(self, of={s - start: places for s, places in self.of.items() if s >= start})

    def first_of_each(self) -> MassiveTokens | None:
        """What holds of any text: first tokens are massive; None where others are too, or not all of these."""
        if not self.of or any(len(places) != 1 or 0 not in places for places in self.of.values()):
            return None
        return replace(self, of={}, first=True)

    def rows(self, batch: Batch, width: int) -> tuple[Tensor, Tensor]:
        """Of a batch: which positions count (B, T) bool, and the cluster of each (B, T) int64, -1 for none."""
        counts_BT = torch.zeros(len(batch.sequences), width, dtype=torch.bool)
        cluster_BT = torch.full((len(batch.sequences), width), -1)
        for b, (sequence, rows) in enumerate(zip(batch.sequences, batch.rows_of(width), strict=True)):
            counts_BT[b, slice(None) if rows is None else rows.cpu() if isinstance(rows, Tensor) else rows] = True
            for pos, cluster in self.of.get(sequence, {}).items():
                if 0 <= pos - batch.past < width:
                    cluster_BT[b, pos - batch.past] = cluster
        if self.first and not batch.past:
            start = first_kept(batch.inputs.get("attention_mask"), width)
            cluster_BT[torch.arange(len(cluster_BT)), 0 if start is None else start.cpu()] = 0
        return counts_BT, cluster_BT


def massive_tokens(scan: ScanResult, stack: str) -> MassiveTokens:
    """The massive tokens that a scan found in a stack."""
    known = passing(scan.clusters)
    known = known[(known["stack"] == stack) & (known["dim"] >= 0)]
    mine = known[known["label"] == MASSIVE].reset_index(drop=True)
    names = tuple(dict.fromkeys(mine["dim"].astype(str) + "@" + mine["position_class"]))
    others = known[known["label"] != MASSIVE]
    left = tuple(dict.fromkeys(others["dim"].astype(str) + "@" + others["position_class"]))
    rows = scan.findings.merge(mine[KEYS].drop_duplicates(), on=KEYS).sort_values("magnitude", ascending=False)
    of: dict[int, dict[int, int]] = {}
    for row in rows.itertuples():
        here = of.setdefault(int(row.sequence), {})
        here.setdefault(int(row.pos), names.index(f"{row.dim}@{row.position_class}"))
    return MassiveTokens(names, of, left)
