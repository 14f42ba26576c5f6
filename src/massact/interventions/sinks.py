"""What edits do to attention sinks: every statistic of `HeadStats`, of the layers behind an edit.

Shapes: B batch, T tokens, J dims, H heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Batch
from massact.interventions.massive_entries import Massive
from massact.interventions.reach import Reach
from massact.models import Model
from massact.records.rules import SINK, is_sink
from massact.records.sites import Site
from massact.stats.attention_call import Attended
from massact.stats.groups import Chosen
from massact.stats.heads import HeadOptions, HeadStats, Queries, Targets
from massact.stats.protocol import PerSequence, Where
from massact.trace import AttentionEdit, Measurements, Probe
from massact.trace.edits import AnyEdit, parts_of

# metric -> the statistic of `HeadStats` that it is the mean of, over heads and layers.
METRICS = {
    "attention_first": "mass_first", "attention_findings": "mass_findings", "slot_mass": "slot_mass",
    "value_norm_first": "value_norm_first", "value_norm_ratio": "value_norm_findings",
    "alpha_first": "alpha_first", "sink_secondary": "secondary", "entropy_nats": "entropy",
}  # fmt: skip
Among = Mapping[int, Mapping[str, Set[int]]]  # sequence -> name -> positions of queries, see `Queries`
_OF_VALUES = ("value_norm_first", "value_norm_ratio")
SINK_METRICS = (*METRICS, "sink_rate", "update_stable_rank")


@dataclass(frozen=True)
class Sinks:
    """Which sink statistics are wanted.

    Args:
        target: the massive activations; their tokens are looked for in the unedited run. None: the first token only.
        all_keys: also alpha, sink rate and entropy: one more call of the attention kernel.
        eps: a head has a sink if alpha_first exceeds this (Gu 2025: 0.3).
        stack: that has the attention; None: that of the target.
    """

    target: Massive | None = None
    all_keys: bool = True
    eps: float = SINK
    stack: str | None = None

    def finds(self, site: Site) -> bool:
        """Whether the tokens with massive activations are known there."""
        at = None if self.target is None else self.target.site
        return at is not None and (self.stack or at.stack) == site.stack and at.layer < site.layer


@dataclass
class Masses:
    """Sink statistics of one forward pass: layer -> metric -> (B,); and the queries that they are means over."""

    layers: dict[Site, dict[str, np.ndarray]] = field(default_factory=dict)
    queries: dict[Site, Queries] = field(default_factory=dict)

    @classmethod
    def of(cls, seen: Measurements) -> Masses:
        """What the probes of `sink_probes` have seen."""
        found = {site: seen.statistics[NAME, site] for site in seen.sites(NAME)}
        known = {site: s for site, s in found.items() if isinstance(s, SinkStats) and s.rows}
        return cls({site: s.result() for site, s in known.items()}, {site: s.queries for site, s in known.items()})

    def behind(self, where: Reach | None, unseen: Collection[Site] = ()) -> dict[str, np.ndarray]:
        """Means over the layers that an edit reaches, or over all: metric -> (B,); NaN where no layer has it.

        Of the calls in `unseen` only their values are known.
        """
        mine = [
            {name: x * np.nan if s in unseen and name not in _OF_VALUES else x for name, x in m.items()}
            for s, m in self.layers.items()
            if where is None or (s.stack == where.stack and s.layer >= where.attends)
        ]
        return {name: _nanmean([m[name] for m in mine]) for name in SINK_METRICS} if mine else {}


def unseen_attention(model: Model, edit: AnyEdit) -> set[Site]:
    """Calls whose output an edit writes anew: they are seen before it, not with the probabilities that it makes."""
    return {s for e in parts_of(edit) if isinstance(e, AttentionEdit) for s in model.anatomy.select_attention(e.site)}


class MassiveTokens(PerSequence):
    """Positions with massive activations.

    Args:
        target: what is massive.
        found: gets the positions of every sequence, for statistics of later layers in the same pass.
        ids: sequence -> ids of its tokens, where the target tells delimiters from others.
    """

    def __init__(
        self, target: Massive, found: dict[int, list[int]] | None = None, ids: Mapping[int, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.target, self.rows, self.ids = target, {} if found is None else found, ids or {}

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the hidden state of one sequence."""
        if self.target.only is not None:
            self.rows[where.sequence] = sorted({p for s, p, _ in self.target.only if s == where.sequence})
            return
        at_T, class_T = torch.arange(len(h_TD), device=h_TD.device), None
        if not self.target.all_classes:
            ids_T = self.ids.get(where.sequence)
            class_T = self.target.classes_of(
                at_T == 0, None if ids_T is None else ids_T[where.positions_of(at_T).cpu()]
            )
        rows = self.target.entries(h_TD, class_T).any(-1).nonzero().flatten()
        self.rows[where.sequence] = where.positions_of(rows).tolist()


class SinkStats(PerSequence):
    """Sink statistics of one layer, mean over its heads: metric -> one number for each sequence.

    Args:
        wanted: which.
        tokens: sequence -> positions with massive activations.
        among: of another pass: means are over those of its queries, by their position in the text, that can see the key
            here as well.
    """

    def __init__(self, wanted: Sinks, tokens: Chosen, among: Among | None = None) -> None:
        super().__init__()
        self.wanted, self.tokens, self.queries = wanted, tokens, Queries(among)

    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence."""
        options = HeadOptions(self.wanted.all_keys, self.wanted.eps, bias=False, queries=self.queries)
        self.rows[where.sequence] = HeadStats(Targets(self.tokens, {}, {}), options)
        self.rows[where.sequence].update(a, where)

    def merge(self, other: Self) -> None:
        """Add the sequences of another one."""
        super().merge(other)
        self.queries.used |= other.queries.used

    def result(self) -> dict[str, np.ndarray]:
        """Metric -> (N,); NaN where one is unavailable."""
        rows = [_numbers(stats, self.wanted) for stats in self.in_order()]
        return {name: np.array([row[name] for row in rows]) for name in SINK_METRICS}


NAME, FOUND = "sinks", "massive tokens"


def sink_probes(
    model: Model,
    wanted: Sinks | None,
    tokens: dict[int, list[int]],
    *,
    find: Batch | None = None,
    among: Masses | None = None,
) -> list[Probe]:
    """Probes of the sink statistics of one forward pass of a batch; none where none are wanted.

    Up to the layer where they are found, the tokens with massive activations are not known, so the statistics about
    them are of the layers behind it, with an edit and without.

    Args:
        tokens: sequence -> positions with massive activations.
        find: they are found in this pass, which is one of that batch without edits.
        among: of another pass, see `SinkStats`.
    """
    if wanted is None:
        return []
    probes = []
    if find is not None and wanted.target is not None:
        rows = find.inputs.get(wanted.target.reads)
        ids = None if rows is None else dict(zip(find.sequences, rows, strict=True))
        probes.append(Probe(FOUND, str(wanted.target.site), partial(MassiveTokens, wanted.target, tokens, ids)))
    for site in model.anatomy.attentions:
        if site.point == "attention":
            others = None if among is None or site not in among.queries else among.queries[site].used
            known: dict[int, list[int]] = tokens if wanted.finds(site) else {}
            probes.append(Probe(NAME, str(site), partial(SinkStats, wanted, known, others)))
    return probes


def _numbers(stats: HeadStats, wanted: Sinks) -> dict[str, float]:
    """The statistics of one sequence in one layer, mean over heads; NaN where one is unavailable."""
    r = stats.result()
    found = {name: float(_nanmean(r.per_head[of][0])) for name, of in METRICS.items()}
    alpha_H = r.per_head["alpha_first"][0]
    known = alpha_H[~np.isnan(alpha_H)]
    found["sink_rate"] = float(is_sink(known, wanted.eps).mean()) if len(known) else float("nan")
    found["update_stable_rank"] = float(_nanmean(r.stable_rank))
    return found


def _nanmean(values: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    x = np.asarray(values, float)
    known = ~np.isnan(x)
    n = known.sum(0)
    return np.where(n > 0, np.where(known, x, 0).sum(0) / np.maximum(n, 1), np.nan)
