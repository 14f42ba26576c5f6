"""What edits do to attention sinks: every statistic of `HeadStats`, of the layers behind an edit.

Shapes: B batch, T tokens, J dims, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor

from massact.corpora import Batch
from massact.corpora.batch import counted
from massact.interventions.catalogue import Massive
from massact.models import Model
from massact.records.anatomy import AttentionPlace
from massact.records.sites import Site
from massact.stats.heads import HeadOptions, HeadStats, Queries, Targets
from massact.stats.protocol import Where
from massact.trace import AttentionEdit
from massact.trace.as_proved import check_calls
from massact.trace.attention import AttentionCall, attending
from massact.trace.edits import AnyEdit, parts_of
from massact.trace.hooks import tapped
from massact.trace.measurements import attended_sequences
from massact.trace.text_rows import TextRows

# metric -> the statistic of `HeadStats` that it is the mean of, over heads and layers.
METRICS = {
    "attention_first": "mass_first", "attention_findings": "mass_findings", "slot_mass": "slot_mass",
    "value_norm_first": "value_norm_first", "value_norm_ratio": "value_norm_findings",
    "alpha_first": "alpha_first", "sink_secondary": "secondary", "entropy_nats": "entropy",
}  # fmt: skip
_OF_VALUES = ("value_norm_first", "value_norm_ratio")
SINK_METRICS = (*METRICS, "sink_rate", "update_stable_rank")


@dataclass(frozen=True)
class Sinks:
    """Which sink statistics are wanted.

    Args:
        target: the massive activations; their tokens are looked for in the unedited run. None: the first token only.
        all_keys: also alpha, sink rate and entropy: one more call of the attention kernel.
        eps: a head has a sink if alpha_first exceeds this (Gu 2025: 0.3).
    """

    target: Massive | None = None
    all_keys: bool = True
    eps: float = 0.3

    def finds(self, site: Site) -> bool:
        """Whether the tokens with massive activations are known there."""
        at = None if self.target is None else self.target.site
        return at is not None and at.stack == site.stack and at.layer < site.layer


@dataclass
class Masses:
    """Sink statistics of one forward pass: layer -> metric -> (B,); and the queries that they are means over."""

    layers: dict[Site, dict[str, np.ndarray]] = field(default_factory=dict)
    queries: dict[Site, Queries] = field(default_factory=dict)
    once_more: Callable[[Masses], AbstractContextManager[Masses]] = nullcontext  # this pass, among another's queries

    def behind(self, where: tuple[str, int] | None, unseen: Collection[Site] = ()) -> dict[str, np.ndarray]:
        """Means over the layers behind one, or over all: metric -> (B,); NaN where no layer has it.

        Of the calls in `unseen` only their values are known.
        """
        mine = [
            {name: x * np.nan if s in unseen and name not in _OF_VALUES else x for name, x in m.items()}
            for s, m in self.layers.items()
            if where is None or (s.stack == where[0] and s.layer > where[1])
        ]
        return {name: _nanmean([m[name] for m in mine]) for name in SINK_METRICS} if mine else {}


def unseen_attention(model: Model, edit: AnyEdit) -> set[Site]:
    """Calls whose output an edit writes anew: they are seen before it, not with the probabilities that it makes."""
    return {s for e in parts_of(edit) if isinstance(e, AttentionEdit) for s in model.anatomy.select_attention(e.site)}


@contextmanager
def finding_tokens(model: Model, batch: Batch, target: Massive | None) -> Iterator[dict[int, list[int]]]:
    """Inside, a forward pass without edits; afterwards, which positions of every sequence were massive."""
    found: dict[int, list[int]] = {}

    def look(h_BTD: Tensor) -> None:
        assert target is not None
        if h_BTD.ndim == 2:
            h_BTD = h_BTD.reshape(len(batch.sequences), -1, h_BTD.shape[-1])
        for sequence, mask_TJ in zip(batch.sequences, target.mask(h_BTD, batch), strict=True):
            found[sequence] = mask_TJ.any(-1).nonzero().flatten().tolist()

    taps = [] if target is None else [(p, look) for p in model.anatomy.select(str(target.site)).values()]
    with tapped(model.module, taps) as state:  # type: ignore[arg-type]
        state.begin()
        yield found


@contextmanager
def watching_sinks(
    model: Model,
    batch: Batch,
    wanted: Sinks | None,
    tokens: dict[int, list[int]],
    rows: Sequence[TextRows] = (),
    among: Masses | None = None,
) -> Iterator[Masses]:
    """Inside, one forward pass of a batch; afterwards, its sink statistics.

    Up to the layer where they are found, the tokens with massive activations are not known, so the statistics about
    them are of the layers behind it, with an edit and without.

    Args:
        tokens: sequence -> positions with massive activations.
        rows: filled in that pass: where an edit of the inputs has put the tokens.
        among: of another pass: means are over those of its queries, by their position in the text, that can see the key
            here as well. Where `rows` stay empty no token has moved, and all count.
    """
    masses, made = Masses(), list[tuple[Site, HeadStats]]()
    masses.once_more = partial(watching_sinks, model, batch, wanted, tokens, ())

    def see(site: Site, place: AttentionPlace) -> Callable[[AttentionCall], None]:
        def look(call: AttentionCall) -> None:
            assert wanted is not None
            known = tokens if wanted.finds(site) else {}
            moved = rows[-1] if rows and rows[-1].positions_BR.shape[1] == call.shape[2] else None
            others = None if among is None or site not in among.queries else among.queries[site].used
            queries = masses.queries.setdefault(site, Queries(others))
            for b, (a, where) in enumerate(attended_sequences(call, place, _moved(batch, moved))):
                if moved is not None:  # a token is known by its place in the text as it was
                    where = Where(where.sequence, positions=moved.positions_BR[b][where.rows(a.shape[1]).cpu()])
                options = HeadOptions(wanted.all_keys, wanted.eps, bias=False, queries=queries)
                made.append((site, HeadStats(Targets(known, {}, {}), options)))
                made[-1][1].update(a, where)

        return look

    places = {s: p for s, p in model.anatomy.attentions.items() if s.point == "attention"} if wanted else {}
    with attending(model.module, {p: see(s, p) for s, p in places.items()}) as heads:
        heads.begin()
        yield masses
        check_calls(heads.calls, model.proof.calls, whole=False)
    for site in dict.fromkeys(site for site, _ in made):
        assert wanted is not None
        rows = [_numbers(h, wanted) for s, h in made if s == site]
        masses.layers[site] = {name: np.array([row[name] for row in rows]) for name in SINK_METRICS}


def _moved(batch: Batch, rows: TextRows | None) -> Batch:
    """The batch of a pass that an edit has moved tokens in: which rows count there."""
    if rows is None:  # a decoder's own ids stay where they are
        return batch
    mask, n = rows.counted_BR, len(rows.positions_BR)
    kept = (None,) * n if mask is None else tuple(counted(m) if bool(m.any()) else slice(0, 0) for m in mask)
    return replace(batch, inputs={"input_ids": rows.positions_BR}, rows=kept)


def _numbers(stats: HeadStats, wanted: Sinks) -> dict[str, float]:
    """The statistics of one sequence in one layer, mean over heads; NaN where one is unavailable."""
    r = stats.result()
    found = {name: float(_nanmean(r.per_head[of][0])) for name, of in METRICS.items()}
    alpha_H = r.per_head["alpha_first"][0]
    known = alpha_H[~np.isnan(alpha_H)]
    found["sink_rate"] = float((known > wanted.eps).mean()) if len(known) else float("nan")
    found["update_stable_rank"] = float(_nanmean(r.stable_rank))
    return found


def _nanmean(values: np.ndarray | Sequence[float]) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    x = np.asarray(values, float)
    known = ~np.isnan(x)
    n = known.sum(0)
    return np.where(n > 0, np.where(known, x, 0).sum(0) / np.maximum(n, 1), np.nan)
