"""Whether padding changes what a model makes of a text: seen on one padded sequence, with its padding and without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.records.errors import MassactError
from massact.records.sites import Site
from massact.stats import Keep
from massact.trace import Probe, measure

# Median over tokens of |difference| / |hidden state|. Rounding: another length takes other kernels, in all layers.
_FIRST = 64.0  # of eps, where the first block begins
_LAST = {torch.float32: 1e-2, torch.float64: 1e-2}  # behind the last block
_LAST_16_BITS = 0.25


def padding_notes(model: Model, corpus: Corpus, stacks: Iterable[str]) -> list[str]:
    """A sentence for each stack in which the padding of a sequence changes the hidden states of its tokens.

    Learned positions count from the left of the row unless a model is told otherwise (`position_ids`), so that padding
    before a text gives it the positions of another place; a model that does not read its mask reads the padding.
    """
    if corpus.mask is None or "input_ids" not in corpus.inputs:
        return []
    row, kept = _padded_row(corpus.mask)
    if row is None:
        return []
    # Not `corpus.batches`, which cuts the columns of a batch that no row counts.
    inputs = {k: x.clone() for k, x in corpus.rows(row, row + 1).items()} | {
        "attention_mask": corpus.mask[row : row + 1].long()
    }
    batch, width = Batch(inputs, (row,), (kept,)), corpus.mask.shape[1]
    bare = {k: x[:, kept] if x.ndim > 1 and x.shape[1] == width else x for k, x in batch.inputs.items()}
    told = []
    for name in stacks:
        stack = model.anatomy.stack(name)
        if model.reads(stack) not in (None, "input_ids"):  # None: a module of one's own
            continue
        ends = [Site(name, 0, "resid_post"), Site(name, stack.n_layers, "resid_post")]
        try:
            first, last = _differences(model, batch, replace(batch, inputs=bare, rows=(None,)), ends)
        except MassactError:  # it does not run on such a length
            continue
        at_start = first > _FIRST * torch.finfo(model.dtype).eps
        if at_start or last > _LAST.get(model.dtype, _LAST_16_BITS):
            told.append(_words(name, row, (first, last), at_start, kept.start > 0))
    return told


def jump_notes(corpus: Corpus) -> list[str]:
    """A sentence where positions of the user's own do not go up by one at tokens that count."""
    at_NT = corpus.inputs.get("position_ids")
    if at_NT is None or at_NT.ndim != 2:
        return []
    jumps_NT = at_NT.diff(dim=1) != 1
    if corpus.mask is not None and corpus.mask.shape == at_NT.shape:
        jumps_NT &= corpus.mask[:, 1:] & corpus.mask[:, :-1]
    n = int(jumps_NT.any(1).sum())
    if not n:
        return []
    return [f"position_ids of {n:,} sequences do not go up by one everywhere: in a pass without a cache, as all of "
            "these are, transformers takes what stands behind a jump for another text, which sees nothing of the one "
            "before, unless there is padding beside it."]  # fmt: skip


def _padded_row(mask_NT: torch.Tensor) -> tuple[int | None, slice]:
    """The sequence with most padding before it, else behind it, and what counts of it; holes are not looked at."""
    best, kept = (0, 0), slice(0)
    row = None
    for i, mask_T in enumerate(mask_NT):
        at = mask_T.nonzero().flatten()
        first, stop = int(at[0]), int(at[-1]) + 1
        size = (first, len(mask_T) - stop)
        if stop - first == len(at) and len(at) > 1 and size > best:
            row, best, kept = i, size, slice(first, stop)
    return row, kept


def _differences(model: Model, padded: Batch, bare: Batch, sites: list[Site]) -> list[float]:
    """Of each site the median over tokens of |difference| / |hidden state|."""
    probes = [Probe("h", str(site), Keep) for site in sites]
    runs = [measure(model, [batch], probes) for batch in (padded, bare)]
    found = []
    for site in sites:
        mine_TD, bare_TD = (np.asarray(run.result("h", site).values[0], np.float64) for run in runs)
        if mine_TD.shape != bare_TD.shape:
            return [0.0] * len(sites)  # its positions are not those of the mask
        size_T = np.linalg.norm(bare_TD, axis=1)
        off_T = np.linalg.norm(mine_TD - bare_TD, axis=1) / np.where(size_T > 0, size_T, 1)
        found.append(float(np.nanmedian(off_T)) if np.isfinite(off_T).any() else 0.0)
    return found


def _words(stack: str, row: int, off: tuple[float, float], at_start: bool, before: bool) -> str:
    where = f" of {stack}" if stack else ""
    first, last = (f"{x:.1%}" if x < 1 else f"{x:.0%}" for x in off)
    told = (
        f"Padding changes the hidden states{where}: those of sequence {row} differ from those of the same tokens "
        f"without padding by {last} behind the last layer (median over tokens)"
    )
    if at_start and before:
        return (
            f"{told}, and by {first} before the first: padding before a text shifts its positions, and the numbers are "
            "those of shifted positions. Pad behind the text, or give position_ids that begin with it."
        )
    return f"{told}. The numbers are those with padding: give sequences of one length, or one at a time."
