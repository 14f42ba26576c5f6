"""A text that the model went on with: the tokens that it generated beside those that it was given.

The control of "massive tokens among the generated ones" are the tokens of the prompts, but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from massact.corpora import GENERATED, PROMPT, Corpus
from massact.models import Model
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats import HiddenResult
from massact.stats.intervals import UNKNOWN, mean_interval, share_interval
from massact.stats.prefix_medians import PrefixMedians
from massact.trace import Probe, measure

BEHIND = "behind"  # all tokens but the first
EVERY = -1  # of all layers
Medians = Mapping[Site, Mapping[int, Mapping[int, float]]]  # site -> sequence -> position -> median so far


def classes_of(text: Corpus, sequence: int, positions: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """(origin, class of position, which of the positions are of both) of one sequence."""
    cls = np.array([text.position_class(sequence, int(p)) for p in positions], dtype=object)
    origin = np.array([text.written_by(sequence, int(p)) for p in positions], dtype=object)
    for name in (PROMPT, GENERATED):
        for one in ("start", "delimiter", "other", BEHIND):
            mine = (origin == name) & ((cls == one) if one != BEHIND else (cls != "start"))
            if mine.any():
                yield name, one, mine


def medians_so_far(
    model: Model, corpus: Corpus, hidden: Mapping[Site, HiddenResult], listed: pd.DataFrame, batch_size: int | str
) -> Medians:
    """The median |h| so far at the tokens that are listed, and at the greatest of every origin and class.

    Args:
        listed: findings and near misses.
    """
    probes = []
    for site, seen in hidden.items():
        known: dict[int, set[int]] = {}
        here = (listed["stack"] == site.stack) & (listed["site"] == site.point) & (listed["layer"] == site.layer)
        for s, p in listed.loc[here & (listed["sequence"] >= 0), ["sequence", "pos"]].itertuples(index=False):
            known.setdefault(int(s), set()).add(int(p))
        for i, sequence in enumerate(map(int, seen.sequence)):
            positions, _, size = seen.tokens(i)
            for _, _, mine in classes_of(corpus, sequence, positions):
                if np.isfinite(size[mine]).any():
                    known.setdefault(sequence, set()).add(int(positions[mine][np.nanargmax(size[mine])]))
        chosen = {s: sorted(p) for s, p in known.items()}
        probes.append(Probe("so far", str(site), lambda chosen=chosen: PrefixMedians(chosen)))  # type: ignore[misc]
    measured = measure(model, corpus, probes, batch_size=batch_size)
    return {site: measured.result("so far", site) for site in hidden}


def with_medians(rows: pd.DataFrame, medians: Medians) -> pd.DataFrame:
    """Findings with the median so far."""
    places = zip(rows["stack"], rows["layer"], rows["site"], rows["sequence"], rows["pos"], strict=True)
    found = [medians.get(Site(stack, layer, site), {}).get(s, {}).get(p, np.nan) for stack, layer, site, s, p in places]
    return rows.assign(median_so_far=np.array(found, float))


def origins_table(
    corpus: Corpus, hidden: Mapping[Site, HiddenResult], findings: pd.DataFrame, medians: Medians
) -> pd.DataFrame:
    """The table `origins`: of every layer, origin and class how large its tokens are, and how many are massive."""
    rows: list[dict[str, Any]] = []
    for stack, point in dict.fromkeys((site.stack, site.point) for site in hidden):
        sites = {site: seen for site, seen in hidden.items() if (site.stack, site.point) == (stack, point)}
        here = findings[(findings["stack"] == stack) & (findings["site"] == point)]
        every: dict[tuple[str, str], list[dict[int, _Tokens]]] = {}
        for site, seen in sites.items():
            places = here.loc[here["layer"] == site.layer, ["sequence", "pos"]]
            groups = _grouped(corpus, seen, set(places.itertuples(index=False, name=None)), medians[site])
            head = {"stack": stack, "site": point, "layer": site.layer}
            rows += [head | {"origin": o, "position_class": c} | _row(list(g.values())) for (o, c), g in groups.items()]
            for key, group in groups.items():
                every.setdefault(key, []).append(group)
        for (origin, cls), layers in every.items():
            of = [_over_layers([layer[s] for layer in layers if s in layer]) for s in layers[0]]
            head = {"stack": stack, "site": point, "layer": EVERY}
            rows.append(head | {"origin": origin, "position_class": cls} | _row(of))
    return frame("origins", rows)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one origin and class in one sequence: how many, which are massive, and how large the largest is."""

    n: int
    massive: frozenset[int]
    most: float
    ratio: float
    so_far: float


def _grouped(
    corpus: Corpus, seen: HiddenResult, massive: set[tuple[int, int]], medians: Mapping[int, Mapping[int, float]]
) -> dict[tuple[str, str], dict[int, _Tokens]]:
    """(origin, class) -> sequence -> its tokens, of one site."""
    groups: dict[tuple[str, str], dict[int, _Tokens]] = {}
    for i, sequence in enumerate(map(int, seen.sequence)):
        positions, _, size = seen.tokens(i)
        so_far = medians.get(sequence, {})
        for origin, cls, mine in classes_of(corpus, sequence, positions):
            known = zip(size[mine].tolist(), positions[mine].tolist(), strict=True)
            ratios = [m / so_far[p] for m, p in known if so_far.get(p, 0) > 0]
            most = _greatest(size[mine])
            places = frozenset(p for p in positions[mine].tolist() if (sequence, p) in massive)
            ratio = most / float(seen.median[i]) if seen.median[i] > 0 else np.nan
            groups.setdefault((origin, cls), {})[sequence] = _Tokens(
                int(mine.sum()), places, most, ratio, _greatest(np.array(ratios, float))
            )
    return groups


def _over_layers(layers: list[_Tokens]) -> _Tokens:
    """The same tokens at all layers: massive where they are at any."""
    most, ratio, so_far = (_greatest(np.array([getattr(t, name) for t in layers])) for name in _SIZES)
    return _Tokens(layers[0].n, frozenset().union(*(t.massive for t in layers)), most, ratio, so_far)


_SIZES = ("most", "ratio", "so_far")


def _row(group: list[_Tokens]) -> dict[str, Any]:
    """One row, of the sequences that have any of these tokens."""
    most, ratio, so_far = (np.array([getattr(t, name) for t in group]) for name in _SIZES)
    n, having = len(group), sum(bool(t.massive) for t in group)
    size = mean_interval(most) if n > 1 else UNKNOWN
    share = share_interval(having, n)
    return {
        "n_tokens": sum(t.n for t in group), "n_sequences": n, "max": float(most.mean()), "max_low": float(size.low),
        "max_high": float(size.high), "greatest": _greatest(most), "ratio": _greatest(ratio),
        "ratio_so_far": _greatest(so_far), "n_massive": sum(len(t.massive) for t in group), "share": having / n,
        "share_low": float(share.low), "share_high": float(share.high),
    }  # fmt: skip


def _greatest(x: np.ndarray) -> float:
    known = x[np.isfinite(x)]
    return float(known.max()) if len(known) else float("nan")
