"""Growth of residual norms over the layers, position 0 apart (Heimersheim and Turner 2023).

The mean L2 norm of the residual stream grows about exponentially with depth: |h_l| ~ a g^l. Position 0 does not: with
massive activations it is large from the onset on, and would hide the growth of all others in an average.
"""

from __future__ import annotations

import numpy as np

from massact.classics.works import Classic, Ground, Outcome, row
from massact.records.sites import MIXERS
from massact.stats import HiddenStats
from massact.trace import Probe, measure

WRITES = (*(f"{kind}_out" for kind in MIXERS), "mlp_out")


def _norm_growth(ground: Ground) -> Outcome:
    outcome = Outcome()
    sites = [s for s in ground.model.anatomy.sites() if s.stack in ground.stacks()]
    wanted = [s for s in sites if s.point in (*_stream(ground), *WRITES)]
    measured = measure(ground.model, ground.corpus, [Probe("norms", str(s), HiddenStats) for s in wanted])
    norms: dict[tuple[str, str, str], dict[int, float]] = {}
    for site in wanted:
        r = measured.result("norms", site)
        first = np.zeros(len(r.token_pos), bool)
        first[r.token_offsets[:-1]] = True  # the first position that counts, of every sequence
        for subject, mine in (("first", first), ("rest", ~first)):
            known = r.token_norm[mine]
            if len(known):
                norms.setdefault((site.stack, site.point, subject), {})[site.layer] = float(known.mean())
                outcome.rows.append(row("norm", known.mean(), len(known), stack=site.stack, site=site.point,
                                        layer=site.layer, subject=subject))  # fmt: skip
    for (stack, point, subject), by_layer in norms.items():
        factor, r2, n = growth(by_layer)
        for metric, value in (("growth_factor", factor), ("growth_r2", r2)):
            outcome.rows.append(row(metric, value, n, stack=stack, site=point, subject=subject))
        if subject == "rest" and point == _stream(ground)[0]:
            first_of = norms.get((stack, point, "first"), {})
            peak = max((value / by_layer[layer] for layer, value in first_of.items() if by_layer.get(layer)), default=0)
            outcome.numbers[stack] = {"factor": factor, "r2": r2, "layers": n, "first_over_rest": peak or np.nan}
    return outcome


def _stream(ground: Ground) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ground.scan.layers["site"]))


def growth(norms: dict[int, float]) -> tuple[float, float, int]:
    """(g, R^2, layers) of the least-squares line log |h_l| = log a + l log g, over the layers from 1 on.

    Args:
        norms: layer -> mean norm.
    """
    layers = [layer for layer in sorted(norms) if layer >= 1 and norms[layer] > 0]
    if len(layers) < 3:  # two points are always on a line
        return float("nan"), float("nan"), len(layers)
    x, y = np.array(layers, float), np.log([norms[layer] for layer in layers])
    slope, intercept = np.polyfit(x, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    r2 = 1 - ((y - slope * x - intercept) ** 2).sum() / spread if spread > 0 else float("nan")
    return float(np.exp(slope)), float(r2), len(layers)


NORM_GROWTH = Classic(
    "norm-growth", "Heimersheim and Turner 2023", "How fast do norms grow with depth, position 0 apart?", _norm_growth
)
