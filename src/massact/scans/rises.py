"""Where massive activations rise in a model whose layers mix tokens in several ways, and what is kept of them.

In models of state-space and attention layers a spike may come right before attention and be gone behind it. All of
it is read off what a scan has: the greatest |h| of a dim at each layer, and the mixer of each block.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from massact.records.anatomy import Anatomy
from massact.records.clusters import passing
from massact.records.sites import MIXERS
from massact.records.tables import frame

RISE = 0.25  # of the greatest |h| that the dim has at any layer: a step up of the writers' account, too


def with_mixers(layers: pd.DataFrame, anatomy: Anatomy) -> pd.DataFrame:
    """The table `layers` with what mixes tokens in each block."""
    known = {(stack.name, block.layer): block.mixer for stack in anatomy.stacks for block in stack.blocks}
    keys = zip(layers["stack"], layers["layer"], strict=True)
    return layers.assign(mixer=pd.array([known.get(key, "") for key in keys], dtype="string"))


def attends(mixer: str) -> bool:
    """Whether attention is among what mixes the tokens of a layer."""
    return MIXERS["attn"] in mixer.split("+")


def rises_table(layers: pd.DataFrame, dims: pd.DataFrame, clusters: pd.DataFrame) -> pd.DataFrame:
    """Every rise of the dims of clusters, in stacks whose layers do not all mix tokens alike.

    With v_l the greatest |h| of a dim at layer l, layer l is a rise where v_l - v_(l-1) >= max(v) / 4.

    Args:
        layers, dims, clusters: tables of a scan; of the clusters those that pass, where any does.
    """
    rows: list[dict[str, object]] = []
    chosen = passing(clusters) if len(passing(clusters)) else clusters
    for (stack, site, dim), _ in chosen[chosen["dim"] >= 0].groupby(["stack", "site", "dim"], sort=False):
        here = layers[(layers["stack"] == stack) & (layers["site"] == site)].sort_values("layer")
        mixer = {int(n): str(m) for n, m in zip(here["layer"], here["mixer"], strict=True) if n > 0}
        if len(set(mixer.values())) < 2:
            continue
        mine = dims[(dims["stack"] == stack) & (dims["site"] == site) & (dims["dim"] == dim)].sort_values("layer")
        v = {int(n): float(x) for n, x in zip(mine["layer"], mine["max"], strict=True)}
        rows += [{"stack": stack, "site": site, "dim": int(dim)} | row for row in _rises(v, mixer)]
    return frame("rises", rows)


def _rises(v: dict[int, float], mixer: dict[int, str]) -> list[dict[str, object]]:
    """Of one dim: its greatest |h| and the mixer by layer."""
    finite = [x for x in v.values() if np.isfinite(x)]
    layers = [n for n in sorted(v) if n - 1 in v and v[n] - v[n - 1] >= RISE * max(finite, default=0) > 0]
    rows: list[dict[str, object]] = []
    for n, behind in zip(layers, [*layers[1:], -1], strict=False):
        attention = next((m for m in sorted(mixer) if m > n and attends(mixer[m])), -1)
        between = [v[m] for m in v if n <= m and (m < behind or behind < 0)]
        rows.append({
            "layer": n, "mixer": mixer.get(n, ""), "before": v[n - 1], "value": v[n],
            "next_mixer": mixer.get(n + 1, ""), "next_attention": attention,
            "kept": v.get(attention - 1, np.nan) / v[n] if attention > 0 else np.nan,
            "next_rise": behind, "kept_between": min(between) / v[n],
        })  # fmt: skip
    return rows
