"""Search of the prefix: every candidate is measured on texts that begin with every class of token, none is assumed.

Shapes: N texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch

from massact.interventions.effects import LENIENT
from massact.interventions.predictions import arrays, ask, logits_of, predicted, task_of
from massact.models import Model, with_attention
from massact.prefixes.candidates import candidate_ids, spelled
from massact.prefixes.construction import Folded, build, refilled
from massact.prefixes.position_shift import Positions
from massact.prefixes.starts import TEXT, Texts
from massact.records.clusters import OUTLIER
from massact.records.errors import WorkError
from massact.records.kinds.scan import ScanResult
from massact.scans.criteria import Criterion, criterion
from massact.scans.evidence import evidence
from massact.scans.job import module_of
from massact.stats import HiddenStats, TokenMax
from massact.stats.intervals import mean_interval
from massact.trace import Measurements, Probe, observing, plan

Progress = Callable[[str, int, int], None]
Ids = tuple[int, ...]
LAST_LAYERS = 2  # of which the greatest |h| does not count: there it is undone
BATCH = 8
SAME_NATS = 0.01  # where one text gives no interval
TWICE = 2.0  # the greatest |h| of an outlier feature: what is larger is none of it
MOST_CHECKED = 4  # prefixes that clear the texts to choose by, checked on those held out


@dataclass(frozen=True)
class Judge:
    """What counts as massive: the rule of the scan, without what it calls outlier features, of many tokens.

    Args:
        limits: dim -> |h| up to which an entry is of that outlier feature, whatever token it is on: behind a slot the
            first token of a text is as any other.
    """

    rule: Criterion
    thresholds: dict[str, float]
    limits: dict[int, float]

    @classmethod
    def of(cls, scan: ScanResult) -> Judge:
        """By the rule and the clusters of a scan."""
        rule = criterion(str(scan.info.criterion["name"]))
        outliers = scan.clusters[(scan.clusters["dim"] >= 0) & (scan.clusters["label"] == OUTLIER)]
        limits = {int(dim): TWICE * float(size) for dim, size in outliers.groupby("dim")["max"].max().items()}
        return cls(rule, dict(scan.info.criterion["thresholds"]), limits)

    def massive(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those of the findings that are not of an outlier feature."""
        if not self.limits or not {"dim", "magnitude"} <= set(rows.columns):
            return rows
        return rows[rows["magnitude"] > rows["dim"].map(self.limits).fillna(0.0)]


@dataclass(frozen=True)
class Reading:
    """What a model says of texts, one number each.

    Args:
        n_findings: (N,) massive entries of all layers.
        greatest: (N,) greatest |h| of the layers below the last two.
        nll: (N,) mean loss of the targets.
        tokens: ids of the tokens that are massive, the most frequent first.
    """

    n_findings: np.ndarray
    greatest: np.ndarray
    nll: np.ndarray
    tokens: tuple[int, ...] = ()

    @property
    def score(self) -> tuple[int, int]:
        """Texts with a massive token, and massive entries: less is better."""
        return int((self.n_findings > 0).sum()), int(self.n_findings.sum())


@dataclass
class Search:
    """The prefix that was chosen, and what every candidate gave.

    Args:
        ids: of it.
        rows: of the table `prefixes`.
        fails: (prefix, class of text) where a prefix that clears some texts leaves a massive token.
        cleared: whether no massive token is left, in the texts to choose by and in those held out.
    """

    ids: Ids
    rows: list[dict[str, object]] = field(default_factory=list)
    fails: list[tuple[str, str]] = field(default_factory=list)
    cleared: bool = False


def read(model: Model, texts: Texts, judge: Judge) -> Reading:
    """Run a model on texts: findings, greatest |h|, loss."""
    probes = [Probe("hidden", "*.resid_post", partial(HiddenStats, top_k=32, mad="mad" in judge.rule.needs))]
    if "mlp_act" in judge.rule.needs:
        probes.append(Probe("spikes", "*.mlp_act", TokenMax))
    total, task, losses = Measurements(plan(model, probes).fresh()), task_of(model), []
    for batch in texts.corpus.batches(BATCH):
        asked = ask(batch, task)
        with torch.inference_mode(), observing(model, probes, batch=batch, lenient=LENIENT) as seen:
            logits = logits_of(model, asked.batch)
        for key, statistic in seen.statistics.items():
            total.statistics[key].merge(statistic)
        losses.append(arrays([p.numbers() for p in predicted(logits, asked, None, task)])["nll"])
    hidden, spikes = ({s: total.result(n, s) for s in total.sites(n)} for n in ("hidden", "spikes"))
    found = evidence(hidden, {s: module_of(model, s) for s in hidden}, spikes, "tokens" in judge.rule.needs)
    rows = judge.massive(judge.rule.passing(found, judge.thresholds))
    n = texts.corpus.n_sequences
    inside = rows[rows["sequence"] >= 0] if "sequence" in rows else rows.iloc[:0]
    counts = np.bincount(inside["sequence"].astype(int), minlength=n) if len(inside) else np.zeros(n, int)
    last = max(site.layer for site in hidden)
    below = [r.max for site, r in hidden.items() if site.layer <= max(1, last - LAST_LAYERS)]
    places = inside[["sequence", "pos"]].drop_duplicates() if len(inside) else inside
    tokens = [texts.corpus.token_id(int(s), int(p)) for s, p in places.to_numpy()] if len(places) else []
    ranked = pd.Series(tokens, dtype=int).value_counts().index
    return Reading(counts, np.max(below, axis=0), np.concatenate(losses), tuple(map(int, ranked)))


class Bench:
    """Prefixes of one model tried out as slots, on one copy of it for each number of them."""

    def __init__(self, model: Model, positions: Positions, judge: Judge) -> None:
        self.model, self.positions, self.judge = model, positions, judge
        self.seen = with_attention(model)
        self.made: Folded | None = None
        self.known: dict[tuple[int, Ids], Reading] = {}

    def folded(self, ids: Ids) -> Folded:
        """The model with a prefix as slots; another one's are overwritten."""
        if self.made is None or self.made.n != len(ids):
            self.made = None  # not two copies at a time
            self.made = build(self.model, ids, self.positions)
        elif self.made.ids != ids:
            self.made = refilled(self.made, self.seen, ids)
        return self.made

    def reading(self, ids: Ids, texts: Texts) -> Reading:
        """What a prefix gives on texts; nothing in front: the model itself."""
        key = (id(texts), ids)
        if key not in self.known:
            self.known[key] = read(self.folded(ids).model if ids else self.model, texts, self.judge)
        return self.known[key]


def search_prefix(bench: Bench, parts: tuple[Texts, Texts], scan: ScanResult, slots: int, progress: Progress) -> Search:
    """Choose a prefix: the token that clears most, then the one that clears most of what is left, up to `slots`.

    Of those that leave as little the least loss decides; of those whose loss is not told apart, the least |h|. One that
    clears these texts and leaves a massive token in those held out makes way for the next that clears both, if any.

    Args:
        bench: of the model.
        parts: texts to choose by, and texts held out.
        scan: of the model.
        slots: most tokens of the prefix.
        progress: called with (stage, candidates done, candidates in all).

    Raises:
        WorkError: no candidate takes anything over.
    """
    chosen, corpus = parts[0], parts[0].corpus
    before, left = bench.reading((), chosen), bench.reading((), chosen)
    ids: Ids = ()
    tried: list[Ids] = []
    order: list[Ids] = []
    while len(ids) < slots and (not ids or left.score[0]):
        more = candidate_ids(bench.model, corpus, scan)
        more += [i for i in (*chosen.lead, *left.tokens[:2]) if i not in more]
        round_of = [(*ids, i) for i in more]
        for k, one in enumerate(round_of, 1):
            bench.reading(one, chosen)
            progress(f"search of token {len(ids) + 1}", k, len(round_of))
        tried += round_of
        order = order_of({one: bench.reading(one, chosen) for one in round_of}, chosen)
        if ids and bench.reading(order[0], chosen).score >= left.score:
            break
        ids, left = order[0], bench.reading(order[0], chosen)
    checked = [one for one in order if bench.reading(one, chosen).score == left.score][:MOST_CHECKED]
    if not left.score[0]:
        ids = next((one for one in checked if not bench.reading(one, parts[1]).score[0]), ids)
    if before.score[0] and left.score >= before.score:
        raise WorkError(
            "No token in front takes the massive activation over.",
            f"Of {len(tried)} candidates the best leaves {left.score[0]} of {corpus.n_sequences} texts with a massive "
            f"token, as many as nothing in front.", "Give a prefix: --prefix IDS.",
        )  # fmt: skip
    return judged(bench, parts, ids, tried, () if left.score[0] else checked[: checked.index(ids)])


def order_of(readings: dict[Ids, Reading], texts: Texts) -> list[Ids]:
    """Prefixes, the best first."""
    left, order = dict(readings), []
    while left:
        order.append(best_of(left, texts))
        del left[order[-1]]
    return order


def judged(
    bench: Bench, parts: tuple[Texts, Texts], ids: Ids, tried: Sequence[Ids], passed: Sequence[Ids] = ()
) -> Search:
    """A chosen prefix on the texts held out, and the rows of all that were tried.

    Args:
        passed: prefixes that were passed over for what they leave in the texts held out.
    """
    made = Search(ids)
    base = tuple(parts[0].lead)
    for texts, part, every in ((parts[0], "search", [(), *tried]), (parts[1], "held out", [(), *passed, ids])):
        old = bench.reading(base, texts)
        for one in dict.fromkeys([*every, base]):
            made.rows += rows_of_reading(bench, texts, part, one, old)
    made.cleared = not any(bench.reading(ids, texts).score[0] for texts in parts)
    for row in made.rows:
        if row["n_massive"] and row["prefix"] and _clears_some(made.rows, row):
            made.fails.append((str(row["prefix"]), str(row["text_class"])))
    made.fails = list(dict.fromkeys(made.fails))
    return made


def _clears_some(rows: Sequence[dict[str, object]], row: dict[str, object]) -> bool:
    """Whether a prefix leaves nothing massive in another class of texts, which has something without it."""

    def left(prefix: object) -> dict[str, int]:
        mine = [r for r in rows if r["prefix"] == prefix and r["part"] == row["part"]]
        return {str(r["text_class"]): int(str(r["n_massive"])) for r in mine}

    bare = left("")
    return any(bare.get(name, 0) and not n for name, n in left(row["prefix"]).items())


def best_of(readings: dict[Ids, Reading], texts: Texts) -> Ids:
    """The prefix that leaves least massive; of several the least loss, of losses not told apart the least |h|."""
    least = min(r.score for r in readings.values())
    left = {ids: r for ids, r in readings.items() if r.score == least}
    text_N = np.array([name == TEXT for name in texts.classes])
    best = min(left, key=lambda ids: float(np.nanmean(left[ids].nll[text_N])))
    alike = []
    for ids, r in left.items():
        d_N = (r.nll - left[best].nll)[text_N]
        low = float(mean_interval(d_N).low) if len(d_N) > 1 else float(d_N.mean()) - SAME_NATS
        if ids == best or low <= 0:
            alike.append(ids)
    return min(alike, key=lambda ids: float(left[ids].greatest.max()))


def rows_of_reading(bench: Bench, texts: Texts, part: str, ids: Ids, old: Reading) -> list[dict[str, object]]:
    """Rows of the table `prefixes`: one for each class of texts.

    Args:
        part: which texts these are.
        old: the same texts as the scan had them, which losses are compared with.
    """
    new, rows = bench.reading(ids, texts), []
    for name in dict.fromkeys(texts.classes):
        at_N = np.array([mine == name for mine in texts.classes])
        known_N = at_N & ~np.isnan(new.nll) & ~np.isnan(old.nll)
        change = mean_interval((new.nll - old.nll)[known_N])
        rows.append({
            "prefix": spelled(texts.corpus, ids), "ids": ",".join(map(str, ids)), "part": part, "text_class": name,
            "n_sequences": int(at_N.sum()), "n_massive": int((new.n_findings[at_N] > 0).sum()),
            "n_findings": int(new.n_findings[at_N].sum()), "greatest": float(new.greatest[at_N].max()),
            "nll": float(new.nll[known_N].mean()) if known_N.any() else np.nan,
            "delta_nll": float(change.estimate), "ci_low": float(change.low), "ci_high": float(change.high),
        })  # fmt: skip
    return rows
