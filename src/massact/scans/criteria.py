"""Published rules for what counts as massive, each a pure function of measured statistics.

Continuous statistics come first; a criterion is a view over them. Every rule has a name, a formula, its
constants and its source, and is selected by name; its constants can be overridden and are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from massact.records import rules
from massact.records.errors import UserError, near
from massact.records.extensions import extensions


@dataclass(frozen=True)
class Evidence:
    """The statistics of one scan that criteria may look at.

    Args:
        candidates: one row per (stack, site, sequence, layer) and rank: the greatest |h| of that hidden state,
            with columns pos, dim, value, magnitude, rank, median, ratio, mean_abs, mad (NaN unless asked for)
            and token_rms, the RMS of that token's hidden vector; where asked for ("modality"), also modality and
            position_class of the token.
        layers: the table `layers`.
        dims: the table `dims`.
        norms: one row per token of the last layer of each stack, of every layer where asked for ("tokens"):
            stack, site, layer, sequence, pos, norm (its L2 norm), rms (of its hidden vector), max (its max|h|).
        spikes: one row per token of the input of down_proj: stack, layer, sequence, pos, max (max|x|); empty
            unless asked for.
    """

    candidates: pd.DataFrame
    layers: pd.DataFrame
    dims: pd.DataFrame
    norms: pd.DataFrame
    spikes: pd.DataFrame = field(default_factory=pd.DataFrame)


Rule = Callable[[Evidence, Mapping[str, float]], pd.DataFrame]
STATE = ["stack", "site", "layer", "sequence"]  # the columns that name one hidden state


@dataclass(frozen=True)
class Criterion:
    """A named published rule.

    Args:
        name: how it is selected.
        formula: the rule, in words and symbols.
        thresholds: its constants; NaN where the source sets none, so that the user must.
        source: paper, page or code it comes from.
        kind: what a finding is: "element" (one scalar), "token", "dim" or "layer".
        rule: pure function of evidence and thresholds; gives the rows that pass.
        needs: statistics beyond the default ones ("mad", "mlp_act", "tokens", "modality").
        at_most: constants that are upper bounds; a near miss keeps them.
        bounded: needs that a bound replaces where they were not measured: what passes with MAD = median, its upper
            bound, passes, and what fails with MAD = 0 fails.
        statistic: of rules without a published constant, the column of the table `layers` that the source reports.
        floor: for rules that do not go by |h| alone: of each hidden state, a magnitude that all that passes exceeds.
    """

    name: str
    formula: str
    thresholds: Mapping[str, float]
    source: str
    kind: str
    rule: Rule
    needs: tuple[str, ...] = ()
    at_most: tuple[str, ...] = ()
    floor: Callable[[Evidence, Mapping[str, float]], pd.Series] | None = None
    bounded: tuple[str, ...] = ()
    statistic: str = ""

    def resolved(self, overrides: Mapping[str, float] | None = None) -> dict[str, float]:
        """The constants in force.

        Raises:
            UserError: an override names no constant of this rule, is no number, or one is missing.
        """
        values = dict(self.thresholds)
        for name, value in (overrides or {}).items():
            if name not in values:
                raise UserError(f"Criterion {self.name!r} has no threshold {name!r}.", do=near(name, values))
            if not np.isfinite(value) or value < 0:
                raise UserError(f"Threshold {name}={value} is not a number from 0 on.")
            values[name] = float(value)
        unset = [n for n, v in values.items() if np.isnan(v)]
        if unset:
            raise UserError(
                f"Criterion {self.name!r} has no published value for {', '.join(unset)}.",
                f"Its source reports the statistic only ({self.source}); massact shows it for every layer.",
                f"Set one: --threshold {unset[0]}=VALUE",
            )
        return values

    def passing(self, evidence: Evidence, thresholds: Mapping[str, float]) -> pd.DataFrame:
        """The rows of evidence that pass."""
        return self.rule(evidence, thresholds)

    def near_misses(self, evidence: Evidence, thresholds: Mapping[str, float]) -> pd.DataFrame:
        """Rows that reach half of every threshold (upper bounds as they are) but do not pass."""
        halved = self.rule(evidence, {k: v if k in self.at_most else v / 2 for k, v in thresholds.items()})
        return halved.loc[halved.index.difference(self.rule(evidence, thresholds).index)]

    def lacks(self, evidence: Evidence, thresholds: Mapping[str, float], passing: pd.DataFrame, top_k: int) -> bool:
        """Whether values beyond the `top_k` kept of a hidden state may pass too; they are no greater than the kept."""
        if self.kind != "element":
            return False
        if self.floor is None:  # a greater |h| of the same hidden state passes first
            return bool((passing["rank"] == top_k).any())
        floor, tops = self.floor(evidence, thresholds), evidence.candidates
        least = tops[tops["rank"] == top_k].set_index(STATE).magnitude
        return bool((least > floor.reindex(least.index)).any())  # NaN where nothing can pass

    def as_dict(self, thresholds: Mapping[str, float]) -> dict[str, object]:
        return {
            "name": self.name,
            "formula": self.formula,
            "thresholds": dict(thresholds),
            "published": dict(self.thresholds),
            "source": self.source,
            "kind": self.kind,
        }


def _sun2024(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    c = e.candidates
    return c[rules.massive(c.magnitude, c["median"], t["magnitude"], t["ratio"])]


def _gallego2025(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    c = e.candidates
    return c[(c.magnitude >= t["ratio"] * c["median"]) & (c.magnitude > 0)]


def _an2025(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    c = e.candidates
    return c[c.magnitude > t["ratio"] * c.mean_abs]


def _chen2026(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    c = e.candidates
    return c[c.magnitude > t["magnitude"]]


def _heretic2025(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    c = _sun2024(e, t)
    c = c[((c.magnitude - c["median"]).abs() >= t["mad"] * c["mad"]) & (c["rank"] <= t["cluster"])]
    c = c[c.layer > 0]
    where = ["stack", "site"]
    depth = e.layers[e.layers.layer > 0].groupby(where).layer.nunique()
    layers = c.groupby([*where, "dim"]).layer.transform("nunique")
    share = layers / c.set_index(where).index.map(depth).to_numpy() if len(c) else layers
    return c.loc[layers.index[np.asarray(share >= t["layers"])]] if len(c) else c


def _kang2025(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    c = e.candidates
    return c[c.magnitude > t["tau"] * c.token_rms]


def _kang2025_floor(e: Evidence, t: Mapping[str, float]) -> pd.Series:
    """tau x the least RMS of the tokens that have a finding: small values of quiet tokens pass, too."""
    having = e.norms[e.norms["max"] > t["tau"] * e.norms.rms]
    return t["tau"] * having.groupby(STATE).rms.min()


def sink_dims(e: Evidence, t: Mapping[str, float]) -> set[tuple[str, int]]:
    """(stack, dim) where the first token of a text has |h_j| / rms(h) > tau, at any layer of any sequence."""
    c = _kang2025(e, t)
    c = c[(c.position_class == "start") & (c.modality == "text")]
    return set(zip(c["stack"], c.dim, strict=True))


def _kang2025_visual(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    c, dims = _kang2025(e, t), sink_dims(e, t)
    at_sink_dim = [place in dims for place in zip(c["stack"], c.dim, strict=True)]
    return c[np.array(at_sink_dim, bool) & (c.modality == "image").to_numpy()]


def _dettmers2022(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    d = e.dims[e.dims.layer > 0]
    d = d[d.hit_rate >= t["tokens"]]
    where = ["stack", "site"]
    depth = e.layers[e.layers.layer > 0].groupby(where).layer.nunique()
    n_layers = d.groupby([*where, "dim"]).layer.transform("nunique")
    needed = t["layers"] * d.set_index(where).index.map(depth).to_numpy() if len(d) else n_layers
    return d[np.asarray(n_layers >= needed)] if len(d) else d


def _last_layer_norms(e: Evidence) -> pd.DataFrame:
    last = e.norms.groupby(["stack", "site"]).layer.transform("max")
    return e.norms[e.norms.layer == last]


def _darcet2024(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    n = _last_layer_norms(e)
    return n[n.norm > t["norm"]]


def _prefixquant2024(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
    s = e.spikes
    if not len(s):
        return s
    typical = s.groupby(["stack", "layer", "sequence"])["max"].transform("median")
    return s[s["max"] > t["ratio"] * typical]


def _layer_rule(column: str) -> Rule:
    def rule(e: Evidence, t: Mapping[str, float]) -> pd.DataFrame:
        return e.layers[e.layers[column] > t[column]]

    return rule


_NONE = float("nan")
SUN2024 = {"magnitude": rules.MAGNITUDE, "ratio": rules.RATIO}

CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion(
            "sun2024",
            "|h| > magnitude and |h| >= ratio x median|h| of that hidden state (all its tokens and dims)",
            SUN2024,
            "Sun et al. 2024, arXiv 2402.17762, Section 2",
            "element",
            _sun2024,
        ),
        Criterion(
            "gallego2025",
            "|h| >= ratio x median|h|, no absolute gate; the source reports the ratio itself, 1000 is Sun's",
            {"ratio": 1000.0},
            "Gallego-Feliciano et al. 2025, arXiv 2508.03616",
            "element",
            _gallego2025,
        ),
        Criterion(
            "an2025",
            "|h| > ratio x mean|h| of that hidden state",
            {"ratio": 1000.0},
            "An et al. 2025, arXiv 2502.06415",
            "element",
            _an2025,
        ),
        Criterion(
            "chen2026",
            "M = max|h|; |h| > magnitude (the source reports M itself)",
            {"magnitude": _NONE},
            "Chen et al. 2026, arXiv 2605.15572",
            "element",
            _chen2026,
            statistic="max",
        ),
        Criterion(
            "heretic2025",
            "sun2024 and ||h| - median| >= mad x MAD and rank <= cluster and its dim in >= layers of the layers",
            {**SUN2024, "mad": 1000.0, "cluster": 3.0, "layers": 0.25},
            "p-e-w/heretic pull request 154",
            "element",
            _heretic2025,
            needs=("mad",),
            at_most=("cluster",),
            bounded=("mad",),
        ),
        Criterion(
            "kang2025",
            "|h_j| / rms(h of that token) > tau",
            {"tau": rules.TAU},
            "Kang et al. 2025, arXiv 2503.03321 (there for the sink dims of the language model)",
            "element",
            _kang2025,
            needs=("tokens",),
            floor=_kang2025_floor,
        ),
        Criterion(
            "kang2025_visual",
            "image tokens of a language model with |h_j| / rms(h of that token) > tau at a sink dim j: one where the "
            "first token of the text has it, at any layer",
            {"tau": rules.TAU},
            "Kang et al. 2025, arXiv 2503.03321 (visual attention sinks)",
            "element",
            _kang2025_visual,
            needs=("tokens", "modality"),
            floor=_kang2025_floor,
        ),
        Criterion(
            "dettmers2022",
            "dims with |h| >= 6 at >= tokens of the positions, in >= layers of the layers (on the "
            "residual stream; the source looks at the inputs of linear layers)",
            {"tokens": rules.OF_TOKENS, "layers": rules.OF_LAYERS},
            "Dettmers et al. 2022, arXiv 2208.07339, Section 4",
            "dim",
            _dettmers2022,
        ),
        Criterion(
            "darcet2024",
            "tokens with L2 norm > norm after the last block, before the final norm; 150 was read off DINOv2-g",
            {"norm": 150.0},
            "Darcet et al. 2024, arXiv 2309.16588",
            "token",
            _darcet2024,
        ),
        Criterion(
            "jiang2025",
            "as darcet2024, with the default of test-time registers",
            {"norm": 30.0},
            "Jiang et al. 2025, arXiv 2506.08010",
            "token",
            _darcet2024,
        ),
        Criterion(
            "prefixquant2024",
            "tokens whose max|input of down_proj| > ratio x its median over the tokens",
            {"ratio": 64.0},
            "Chen et al. 2024, arXiv 2410.05265",
            "token",
            _prefixquant2024,
            needs=("mlp_act",),
        ),
        Criterion(
            "he2024_kurtosis",
            "layers with kurtosis of the per-dim RMS > rms_kurtosis (1: even, D: one dim)",
            {"rms_kurtosis": _NONE},
            "He et al. 2024, NeurIPS",
            "layer",
            _layer_rule("rms_kurtosis"),
            statistic="rms_kurtosis",
        ),
        Criterion(
            "he2024_mmr",
            "layers with mean over tokens of max|h| / median|h| of the hidden state > token_max_median "
            "(the source takes each token's own median)",
            {"token_max_median": _NONE},
            "He et al. 2024, NeurIPS",
            "layer",
            _layer_rule("token_max_median"),
            statistic="token_max_median",
        ),
        Criterion(
            "osp2025",
            "layers with mean over tokens of relu(mean(x^4) / std(x)^4 - 3) > token_kurtosis",
            {"token_kurtosis": _NONE},
            "Park et al. 2025, arXiv 2506.19697",
            "layer",
            _layer_rule("token_kurtosis"),
            statistic="token_kurtosis",
        ),
    )
}


def criteria() -> dict[str, Criterion]:
    """Name -> criterion: ours, and those that other packages name (entry point `massact.criteria`).

    Raises:
        UserError: what another package names is no criterion, or is called like another.
    """
    return extensions("massact.criteria", Criterion, CRITERIA)


def criterion(name: str) -> Criterion:
    """A criterion by name.

    Raises:
        UserError: unknown; says which are near.
    """
    known = criteria()
    if name not in known:
        raise UserError(f"Unknown criterion {name!r}.", do=near(name, known))
    return known[name]
