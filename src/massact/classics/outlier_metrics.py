"""The outlier metrics of quantisation: infinity norm, kurtosis and values beyond six sigma (Bondarenko 2023).

Per layer and point, of all values x of a sequence, averaged over sequences: max|x|; kurtosis m4 / m2^2 (Gaussian: 3);
the count of |x - mean x| > 6 std x. The work reports the greatest infinity norm of any layer, and the mean over layers
of the kurtosis of what attention adds.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from massact.classics.works import Classic, Ground, Outcome, row
from massact.records.sites import MIXERS, Site
from massact.stats import HiddenStats
from massact.stats.hits import CountResult, TailCounts
from massact.trace import Probe, measure

SIGMAS = 6.0
POINTS = (*(f"{kind}_out" for kind in MIXERS), "mlp_out", "resid_mid")  # and the hidden state of the scan
N_DIMS = 10  # that are named, of those with outliers


def _outlier_metrics(ground: Ground) -> Outcome:
    outcome, points = Outcome(), (*POINTS, *dict.fromkeys(ground.scan.layers["site"]))
    sites = [s for s in ground.model.anatomy.sites() if s.stack in ground.stacks() and _kind(s) in points]
    probes = [Probe("values", str(s), HiddenStats) for s in sites]
    probes += [Probe("tail", str(s), lambda: TailCounts(SIGMAS)) for s in sites]
    measured = measure(ground.model, ground.corpus, probes)
    by_point: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    tails: dict[tuple[str, str], list[CountResult]] = {}
    for site in sites:
        values, tail = measured.result("values", site), measured.result("tail", site)
        some = tail.n_tokens > 0
        found = {"inf_norm": values.max, "kurtosis": values.kurtosis, "outliers": tail.count.sum(1)[some]}
        here = by_point.setdefault((site.stack, site.point), {}).setdefault(site.layer, {})
        for metric, x_N in found.items():
            here[metric], n = _mean(x_N)
            outcome.rows.append(row(metric, here[metric], n, stack=site.stack, site=site.point, layer=site.layer))
        if site.layer >= 1:
            tails.setdefault((site.stack, site.point), []).append(tail)
    for name in ground.stacks():
        outcome.numbers[name] = {}
    for (stack, point), layers in by_point.items():
        outcome.numbers[stack][point] = _summary(ground, stack, point, layers, tails[stack, point], outcome)
    _say_what_lacks(ground, points, outcome)
    return outcome


def _kind(site: Site) -> str:
    """The point without its number: a block may have several writes of a kind."""
    return re.sub(r"_[23]$", "", site.point)


def _mean(x_N: np.ndarray) -> tuple[float, int]:
    """(mean over the sequences that have the number, how many these are)."""
    known = x_N[~np.isnan(x_N)]
    return (float(known.mean()) if len(known) else float("nan")), len(known)


def _summary(
    ground: Ground,
    stack: str,
    point: str,
    layers: dict[int, dict[str, float]],
    tails: list[CountResult],
    outcome: Outcome,
) -> dict[str, Any]:
    """Numbers of one point over the layers from 1 on, and rows of the dims with most outliers."""
    blocks = {layer: m for layer, m in layers.items() if layer >= 1}
    norms = {layer: m["inf_norm"] for layer, m in blocks.items() if not np.isnan(m["inf_norm"])}
    peak = max(norms, key=lambda layer: norms[layer]) if norms else -1
    total_D = sum(t.count.sum(0) for t in tails)
    n = int(total_D.sum())
    first = np.argsort(-total_D, kind="stable")[:N_DIMS]
    dims = [int(d) for d in first if total_D[d] > 0]
    for dim in dims:
        outcome.rows.append(row("outliers_of_dim", total_D[dim], len(tails[0].sequence), stack=stack, site=point,
                                dim=dim))  # fmt: skip
    return {
        "inf_norm": norms.get(peak, float("nan")), "inf_norm_layer": peak,
        "kurtosis": _mean(np.array([m["kurtosis"] for m in blocks.values()]))[0],
        "outliers": _mean(np.array([m["outliers"] for m in blocks.values()]))[0],
        "dims": dims, "dims_share": float(total_D[dims].sum() / n) if n else float("nan"),
        "massive": sorted(set(dims) & ground.massive_dims(stack)), "n_massive": len(ground.massive_dims(stack)),
    }  # fmt: skip


def _say_what_lacks(ground: Ground, points: tuple[str, ...], outcome: Outcome) -> None:
    lacking: dict[tuple[str, str, str], list[str]] = {}
    for site, reason in ground.model.anatomy.unavailable():
        if site.stack in ground.stacks() and _kind(site) in points:
            lacking.setdefault((site.stack, site.point, reason), []).append(str(site.layer))
    for (stack, point, reason), layers in lacking.items():
        where = f"stack {stack}: " if stack else ""
        outcome.notes.append(f"{where}{point} is unavailable at layers {', '.join(layers)}: {reason}.")


OUTLIER_METRICS = Classic(
    "outlier-metrics", "Bondarenko 2023", "How hard to quantise are the activations: how far do outliers reach?",
    _outlier_metrics,
)  # fmt: skip
