"""The greatest |h| of each token of short texts, at every layer and point: what a strip of the text is coloured by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from massact.corpora import Corpus
from massact.models import Model
from massact.positions import tokens_of
from massact.records.sites import mixes
from massact.stats.token_peaks import TokenPeaks
from massact.trace import Probe, measure

TOKENS = 128  # of one text
POINTS = ("resid_post", "resid_post_prenorm", "mlp_out")  # and what mixes tokens


def strip(model: Model, texts: Sequence[Corpus], stack: str) -> dict[str, np.ndarray]:
    """The arrays of a strip, see `massact.records.arrays.STRIP`; {} where a stack reads no tokens of a text.

    Args:
        texts: of each the first tokens of the first sequence are read, and of two that are the same the first.
        stack: the one to look at.
    """
    sites = [s for s in model.anatomy.sites() if s.stack == stack and (s.point in POINTS or mixes(s.point))]
    points, layers = list(dict.fromkeys(s.point for s in sites)), sorted({s.layer for s in sites})
    probes = [Probe("peaks", str(site), TokenPeaks) for site in sites]
    parts: list[tuple[np.ndarray, ...]] = []
    read_before: list[Corpus] = []
    for text in texts:
        first = text.head(1)
        first = first.cut(TOKENS) or first
        if any(_same(first, other) for other in read_before):
            continue
        read_before.append(first)
        measured = measure(model, first, probes)
        seen = {site: measured.result("peaks", site) for site in sites}
        position_T = seen[sites[0]].positions[0][:TOKENS]
        read = tokens_of(model, first, stack, int(seen[sites[0]].positions[0].max(initial=0)))
        if read.kind != "tokens":
            return {}
        shape = (len(points), len(layers), len(position_T))
        value_PLT, dim_PLT = np.full(shape, np.nan, np.float32), np.full(shape, -1, np.int32)
        median_PL1 = np.full((*shape[:2], 1), np.nan, np.float32)
        for site, of in seen.items():
            at = points.index(site.point), layers.index(site.layer)
            value_PLT[at], dim_PLT[at], median_PL1[at] = of.value[0][:TOKENS], of.dim[0][:TOKENS], of.median[0]
        tokens = np.array([read.token(0, int(pos)) for pos in position_T], str)
        parts.append((value_PLT, dim_PLT, median_PL1, tokens, position_T, np.full(len(position_T), len(parts))))
    names = ("value", "dim", "median", "tokens", "position", "text")
    joined = {name: np.concatenate(arrays, -1) for name, arrays in zip(names, zip(*parts, strict=True), strict=True)}
    return joined | {"points": np.array(points, str), "layers": np.array(layers), "stack": np.array(stack)}


def _same(one: Corpus, other: Corpus) -> bool:
    return one.inputs.keys() == other.inputs.keys() and all(
        torch.equal(t, other.inputs[k]) for k, t in one.inputs.items()
    )
