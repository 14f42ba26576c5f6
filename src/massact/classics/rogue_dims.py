"""Rogue dimensions: how few dims make the vectors of all tokens point alike (Timkey and van Schijndel 2021).

Anisotropy is the mean cosine of random tokens; it is the sum of what each dim adds to it. Where one to five dims add
nearly all, cosines say little about the others. What such a dim does to the predictions is another question, asked by
setting it to zero.

Shapes: N sampled tokens, P pairs of them, D dims, K dims that are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from massact.classics.behaviour import behaviour
from massact.classics.works import Classic, Ground, Outcome, Unavailable, row
from massact.interventions.catalogue import zero_dims
from massact.interventions.effects import effect_rows
from massact.records.sites import Site
from massact.stats import TokenMax
from massact.stats.groups import Gather
from massact.trace import Edit, Probe, measure

N_TOKENS = 1000
N_PAIRS = 10_000
MOST_VALUES = 1 << 28  # of sampled vectors held at once, all layers of all stacks: 1 GiB in fp32
TOP = 5  # dims told of each layer
WITHOUT = (1, 3, 5)  # dims left out, for r^2
LAST_LAYERS = 4  # whose dims are set to zero
TESTED = 3  # dims of each kind, per layer
CHUNK = 1 << 22  # values multiplied at once
CONSTANT = 1e-12  # a dim's std over its greatest |x|: below it only rounding varies
POINT = "resid_post"  # what a block gives, in post-LN models too


# --------------------------------------------------------------------------------------------- of one layer
@dataclass(frozen=True)
class Geometry:
    """How alike the directions of some tokens are, and which dims make them so.

    Args:
        n_pairs: pairs of tokens that it is over.
        anisotropy: A, mean cosine.
        contributions: (D,) CC_i, with sum A.
        r2: K -> squared correlation of the cosines with those without the K dims of greatest CC_i.
        fixed: name of a published fix -> mean cosine under it.
        live: (D,) bool, whether the dim is other than zero for any of the tokens.
    """

    n_pairs: int
    anisotropy: float
    contributions: np.ndarray
    r2: dict[int, float]
    fixed: dict[str, float]
    live: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Dims by their contribution, greatest first: (D,)."""
        return np.argsort(-self.contributions, kind="stable")

    def shares(self, dims: Sequence[int]) -> list[float]:
        """CC_i / A; NaN where A is not positive: there is nothing to share."""
        return [float(self.contributions[d]) / self.anisotropy if self.anisotropy > 0 else np.nan for d in dims]


def geometry(x_ND: np.ndarray, pairs_P2: np.ndarray) -> Geometry:
    """Anisotropy A = mean cos(x, y), contributions CC_i = mean x_i y_i / (|x| |y|), and what the fixes leave of A.

    Pairs with a token that is zero or not finite have no cosine and are left out.

    Args:
        x_ND: vectors of tokens, float64.
        pairs_P2: rows of them.
    Source: Timkey and van Schijndel 2021, Sections 3 to 6.
    """
    D = x_ND.shape[1]
    good_N = np.isfinite(x_ND).all(1) & (x_ND != 0).any(1)
    pairs_P2 = pairs_P2[good_N[pairs_P2].all(1)]
    if not len(pairs_P2):
        return Geometry(0, np.nan, np.full(D, np.nan), {}, {}, np.zeros(D, bool))
    x_ND, pairs_P2 = x_ND[good_N], (np.cumsum(good_N) - 1)[pairs_P2]
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    sum_D = np.zeros(D)
    for a_Q, b_Q in _chunks(pairs_P2, D):
        sum_D += np.einsum("qd,qd->d", unit_ND[a_Q], unit_ND[b_Q])
    added_D = sum_D / len(pairs_P2)
    made = Geometry(len(pairs_P2), float(added_D.sum()), added_D, {}, {}, (x_ND != 0).any(0))
    cos_P = cosines(x_ND, pairs_P2)
    for k in (k for k in WITHOUT if k < D):
        less_ND = x_ND.copy()
        less_ND[:, made.order[:k]] = 0
        made.r2[k] = squared_correlation(cos_P, cosines(less_ND, pairs_P2))
    fixes = {"standardised": standardised, "all but the top": all_but_the_top, "spearman": ranked}
    for name, fix in fixes.items():
        left_P = cosines(fix(x_ND), pairs_P2)
        made.fixed[name] = float(np.nanmean(left_P)) if np.isfinite(left_P).any() else np.nan
    return made


def _chunks(pairs_P2: np.ndarray, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    step = max(1, CHUNK // width)
    return [(part[:, 0], part[:, 1]) for part in (pairs_P2[i : i + step] for i in range(0, len(pairs_P2), step))]


def cosines(x_ND: np.ndarray, pairs_P2: np.ndarray) -> np.ndarray:
    """Cosine of every pair of rows, (P,); NaN where one of the two is zero."""
    norm_N = np.linalg.norm(x_ND, axis=1)
    unit_ND = x_ND / np.where(norm_N > 0, norm_N, np.nan)[:, None]
    chunks = _chunks(pairs_P2, x_ND.shape[1])
    return np.concatenate([np.einsum("qd,qd->q", unit_ND[a], unit_ND[b]) for a, b in chunks])


def standardised(x_ND: np.ndarray) -> np.ndarray:
    """(x - mean) / std of every dim over the tokens; 0 where a dim is constant."""
    centred_ND, std_D = x_ND - x_ND.mean(0), x_ND.std(0)
    varies_D = std_D > CONSTANT * np.abs(x_ND).max(0)
    return np.where(varies_D, centred_ND / np.where(varies_D, std_D, 1), 0)


def all_but_the_top(x_ND: np.ndarray) -> np.ndarray:
    """x - mean, without the first max(1, round(D / 100)) principal components (Mu and Viswanath 2018)."""
    N, D = x_ND.shape
    centred_ND = x_ND - x_ND.mean(0)
    k = max(1, round(D / 100))
    if N < D:  # X = U S V^T: the same components, out of the smaller of the two Gram matrices
        left_NK = np.linalg.eigh(centred_ND @ centred_ND.T)[1][:, -k:]
        return centred_ND - left_NK @ (left_NK.T @ centred_ND)
    right_DK = np.linalg.eigh(centred_ND.T @ centred_ND)[1][:, -k:]
    return centred_ND - (centred_ND @ right_DK) @ right_DK.T


def ranked(x_ND: np.ndarray) -> np.ndarray:
    """Ranks of the dims inside every vector, centred: their cosine is Spearman's correlation of the vectors."""
    rank_ND = pd.DataFrame(x_ND).rank(axis=1).to_numpy()
    return rank_ND - rank_ND.mean(1, keepdims=True)


def squared_correlation(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """r^2 (Pearson) of the pairs that both know; NaN where one of the two is constant or fewer than 3 are known."""
    known_P = np.isfinite(a_P) & np.isfinite(b_P)
    r = _correlation(a_P[known_P], b_P[known_P])
    return r * r


def spearman(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """Spearman's correlation; NaN where one is constant or there are fewer than 3."""
    return _correlation(pd.Series(a_P).rank().to_numpy(), pd.Series(b_P).rank().to_numpy())


def _correlation(a_P: np.ndarray, b_P: np.ndarray) -> float:
    if len(a_P) < 3:
        return float("nan")
    a_P, b_P = a_P - a_P.mean(), b_P - b_P.mean()
    norm = np.linalg.norm(a_P) * np.linalg.norm(b_P)
    return float(a_P @ b_P / norm) if norm > 0 else float("nan")


# --------------------------------------------------------------------------------------------- of a model
@dataclass
class _Known:
    """What is known of one stack."""

    layers: dict[int, Geometry] = field(default_factory=dict)
    tested: list[dict[str, Any]] = field(default_factory=list)  # one for every dim set to zero, and kind
    why_not: str = "no layer has dims to set to zero"


def _rogue_dims(ground: Ground) -> Outcome:
    outcome = Outcome()
    sites = _sites(ground)
    places = {stack: _places(ground, of_stack) for stack, of_stack in sites.items()}
    draw = np.random.default_rng((ground.seed, 0))
    n_tokens = _affordable(ground, sites)
    chosen = {s: _sample(at_M2, n_tokens, draw) for s, at_M2 in places.items()}
    if any(len(at_N2) < 2 for at_N2 in chosen.values()):
        raise Unavailable("There are fewer than two tokens to compare.")
    probes = [
        Probe("tokens", str(site), partial(Gather, _by_sequence(chosen[stack])))
        for stack, of_stack in sites.items()
        for site in of_stack
    ]
    measured = measure(ground.model, ground.corpus, probes)
    known = {stack: _Known() for stack in sites}
    for stack, of_stack in sites.items():
        pairs_P2 = _pairs(len(chosen[stack]), draw)
        for site in of_stack:
            held = measured.result("tokens", site)
            g = geometry(np.stack(list(held.values())), pairs_P2)
            known[stack].layers[site.layer] = g
            outcome.rows += _rows(g, site)
            if not g.n_pairs:
                outcome.notes.append(f"No pair of tokens at {site} has a cosine: all are zero or not finite.")
    _set_to_zero(ground, known, outcome)
    for stack, found in known.items():
        outcome.numbers[stack] = _numbers(ground, stack, found) | {"n_tokens": len(chosen[stack])}
    return outcome


def _sites(ground: Ground) -> dict[str, list[Site]]:
    """The hidden states that the scan saw, layers in order, by stack."""
    t = ground.scan.layers
    t = t[t["site"] == POINT]
    return {
        stack: [Site(stack, layer, POINT) for layer in sorted(map(int, t.loc[t["stack"] == stack, "layer"].unique()))]
        for stack in ground.stacks()
    }


def _places(ground: Ground, sites: list[Site]) -> np.ndarray:
    """(sequence, position) of every token that a stack has: (M, 2). The pass ends at its first layer."""
    r = measure(ground.model, ground.corpus, [Probe("at", str(sites[0]), TokenMax)]).result("at", sites[0])
    return np.stack([np.repeat(r.sequence, r.n_tokens), r.token_pos], 1)


def _affordable(ground: Ground, sites: dict[str, list[Site]]) -> int:
    width = sum(len(of_stack) * ground.model.anatomy.stack(s).d_model for s, of_stack in sites.items())
    return max(2, min(N_TOKENS, MOST_VALUES // max(1, width)))


def _sample(at_M2: np.ndarray, n: int, draw: np.random.Generator) -> np.ndarray:
    """Some of the tokens, in order: (N, 2)."""
    return at_M2[np.sort(draw.choice(len(at_M2), min(n, len(at_M2)), replace=False))]


def _by_sequence(at_N2: np.ndarray) -> dict[int, list[int]]:
    chosen: dict[int, list[int]] = {}
    for sequence, pos in at_N2.tolist():
        chosen.setdefault(sequence, []).append(pos)
    return chosen


def _pairs(n: int, draw: np.random.Generator) -> np.ndarray:
    """Pairs of different tokens (P, 2): all there are, where these are few enough, else drawn."""
    if n * (n - 1) // 2 <= N_PAIRS:
        return np.stack(np.triu_indices(n, 1), 1)
    first_P = draw.integers(0, n, N_PAIRS)
    return np.stack([first_P, (first_P + draw.integers(1, n, N_PAIRS)) % n], 1)


def _rows(g: Geometry, site: Site) -> list[dict[str, object]]:
    at: dict[str, Any] = {"stack": site.stack, "site": site.point, "layer": site.layer}
    rows = [row("anisotropy", g.anisotropy, g.n_pairs, **at)]
    rows += [row("anisotropy", value, g.n_pairs, subject=fix, **at) for fix, value in g.fixed.items()]
    rows += [row("r2", value, g.n_pairs, subject=f"without top {k}", **at) for k, value in g.r2.items()]
    top = g.order[:TOP].tolist() if g.n_pairs else []
    for rank, (dim, share) in enumerate(zip(top, g.shares(top), strict=True), 1):
        told = at | {"dim": dim, "subject": f"rank {rank}"}
        rows += [row("contribution", g.contributions[dim], g.n_pairs, **told), row("share", share, g.n_pairs, **told)]
    return rows


# --------------------------------------------------------------------------------------------- behaviour
def _set_to_zero(ground: Ground, known: dict[str, _Known], outcome: Outcome) -> None:
    """I(i, l) = mean KL(P || P with dim i of layer l set to zero at all tokens), of some dims of the last layers."""
    draw = np.random.default_rng((ground.seed, 1))
    edits: dict[Site, dict[int, Edit]] = {}
    for stack, of_stack in known.items():
        n_layers = ground.model.anatomy.stack(stack).n_layers
        for layer, g in of_stack.layers.items():
            if layer < 1 or layer <= n_layers - LAST_LAYERS or not g.n_pairs:
                continue
            site, kinds = Site(stack, layer, POINT), _kinds(ground, stack, g, draw)
            # A dim may be rogue and massive: it is set to zero once and told twice.
            dims = sorted({d for of_kind in kinds.values() for d in of_kind})
            edits[site] = {d: replace(zero_dims([d], str(site)), name=f"dim {d} of {site} to zero") for d in dims}
            of_stack.tested += [{"site": site, "dim": d, "kind": k} for k, of_kind in kinds.items() for d in of_kind]
    if not edits:
        return
    try:
        paired = behaviour(ground, [e for of_site in edits.values() for e in of_site.values()])
    except Unavailable as error:
        outcome.notes.append(f"What the dims do to predictions is unavailable: {error.what}")
        for of_stack in known.values():
            of_stack.tested, of_stack.why_not = [], error.what
        return
    kl: dict[str, tuple[float, int]] = {}
    for site, of_site in edits.items():
        here = replace(paired, fired={e.name: paired.fired[e.name] for e in of_site.values()})
        rows = effect_rows(here, stack=site.stack, layer=site.layer)
        kl |= {str(r["edit"]): (r["edited"], r["n_sequences"]) for r in rows if r["metric"] == "kl"}  # type: ignore[misc]
        outcome.effects += rows
    for stack, of_stack in known.items():
        for test in of_stack.tested:
            site = test["site"]
            test["kl"], n = kl.get(edits[site][test["dim"]].name, (np.nan, 0))
            outcome.rows.append(row("kl", test["kl"], n, stack=stack, site=site.point, layer=site.layer,
                                    dim=test["dim"], subject=test["kind"]))  # fmt: skip


def _kinds(ground: Ground, stack: str, g: Geometry, draw: np.random.Generator) -> dict[str, list[int]]:
    """Dims to set to zero: those that are zero anyway would change nothing."""
    f = ground.scan.findings
    counts = f.loc[(f["stack"] == stack) & (f["dim"] >= 0), "dim"].value_counts()
    massive = sorted(map(int, counts.index), key=lambda d: (-int(counts[d]), d))
    live = set(np.flatnonzero(g.live).tolist())
    rogue = [d for d in g.order.tolist() if d in live][:TESTED]
    tested = [d for d in massive if d in live][:TESTED]
    others = sorted(live - set(rogue) - set(massive))
    control = draw.choice(others, min(TESTED, len(others)), replace=False).tolist() if others else []
    return {"rogue": rogue, "massive": tested, "random": control}


def _numbers(ground: Ground, stack: str, known: _Known) -> dict[str, Any]:
    massive = ground.massive_dims(stack)
    layers = {layer: g for layer, g in known.layers.items() if g.n_pairs}
    numbers: dict[str, Any] = {"n_layers": len(layers), "massive_dims": sorted(massive)}
    if layers:
        worst = max(layers, key=lambda layer: layers[layer].anisotropy)
        g = layers[worst]
        top = g.order[:TOP].tolist()
        numbers |= {
            "mean_anisotropy": float(np.mean([h.anisotropy for h in layers.values()])),
            "layer": worst,
            "anisotropy": g.anisotropy,
            "fixed": g.fixed,
            "rogue_dims": top,
            "shares": g.shares(top),
            "r2": g.r2,
            "n_pairs": g.n_pairs,
            "rogue_and_massive": [d for d in top if d in massive],
            "layers_led_by_massive": sum(int(h.order[0]) in massive for h in layers.values()),
        }
    if not known.tested:
        return numbers | {"kl": {"unavailable": known.why_not}}
    each = {(t["site"], t["dim"]): t["kl"] for t in known.tested}
    added = [known.layers[site.layer].contributions[dim] for site, dim in each]
    of_kind = {k: [t["kl"] for t in known.tested if t["kind"] == k] for k in ("rogue", "massive", "random")}
    return numbers | {
        "kl": {k: float(np.mean(x)) if x else None for k, x in of_kind.items()},
        "kl_correlation": spearman(np.array(added), np.array(list(each.values()))),
        "n_kl": len(each),
    }


ROGUE_DIMS = Classic(
    "rogue-dims", "Timkey and van Schijndel 2021", "Which dims make all tokens alike, and does the model need them?",
    _rogue_dims,
)  # fmt: skip
