"""The catalogue of edits: each a small pure function of a hidden state, of weights, of inputs or of attention.

Shapes: B batch, T tokens, D dims, J massive dims, C classes of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.corpora import Batch
from massact.corpora.masks import first_kept
from massact.interventions.massive_entries import (
    CLASSES,
    Massive,
    in_all_streams,
    massive,
    massive_everywhere,
    meant,
    targets_of,
)
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.stats.attention_call import Attended
from massact.trace import AttentionEdit, Edit, InputEdit, Together, WeightEdit
from massact.trace.edits import AnyEdit, past_of
from massact.trace.text_rows import TEXT_POSITIONS

Meant: TypeAlias = "Massive | ScanResult | pd.DataFrame"


def _in_streams(make: Callable[..., Edit]) -> Callable[..., Any]:
    """An edit of what a scan means: of several streams one edit of all of them, as `intervene` makes it."""

    @wraps(make)
    def made(target: Meant, *options: Any, **named: Any) -> AnyEdit:
        if not isinstance(target, ScanResult):
            return make(target, *options, **named)
        chosen = in_all_streams(meant(target.findings, clusters=target.clusters), target)
        edits = tuple(make(one, *options, **named) for one in targets_of(chosen))
        return edits[0] if len(edits) == 1 else Together(edits[0].name, edits)

    return made


# ---- edits of massive entries
@_in_streams
def zero(target: Meant) -> Edit:
    """h = 0 at massive entries (Sun 2024, Table 3).

    Args:
        target: a scan: its largest cluster at its onset, as `intervene` edits it; or the place itself. All edits here
            take the same. A bare table of findings has neither near misses nor the length of the sequences: what its
            clusters are is judged without them. A scan has no tokenizer, so that the delimiters known here are those
            that findings are on; `intervene` tells all delimiters of its texts from other tokens.
    """
    return _of(target, "zero", lambda h_BTD, batch: 0.0)


@_in_streams
def scale(target: Meant, factor: float) -> Edit:
    """h = factor x h at massive entries."""
    known = _known(target)
    return _of(known, f"scale {factor:g}", lambda h_BTD, batch: h_BTD[..., list(known.dims)] * factor)


@_in_streams
def clip(target: Meant, limit: float) -> Edit:
    """|h| <= limit at massive entries, the sign kept."""
    known = _known(target)
    return _of(known, f"clip {limit:g}", lambda h_BTD, batch: h_BTD[..., list(known.dims)].clamp(-limit, limit))


@_in_streams
def fixed(target: Meant, value: float) -> Edit:
    """h = value at massive entries."""
    return _of(target, f"value {value:g}", lambda h_BTD, batch: value)


@_in_streams
def mean(target: Meant) -> Edit:
    """h = its mean over the scanned sequences, of its position class and dim (Sun 2024, Table 3; Owen 2025)."""
    known = _known(target)

    def means(h_BTD: Tensor, batch: Batch) -> Tensor:
        means_CJ = torch.tensor([known.means[c] for c in CLASSES], device=h_BTD.device, dtype=h_BTD.dtype)
        return means_CJ[known.classes(h_BTD, batch)]

    return _of(known, "mean", means)


@_in_streams
def shuffle(target: Meant, seed: int = 0) -> Edit:
    """h = the value that another sequence of the scan had there: of the same position class and dim, at random."""
    known = _known(target)

    def drawn(h_BTD: Tensor, batch: Batch) -> Tensor:
        draw = np.random.default_rng((seed, *batch.sequences))
        pools = [[np.array(pool or [np.nan]) for pool in known.values[c]] for c in CLASSES]
        values_CBTJ = torch.from_numpy(
            np.stack([np.stack([draw.choice(pool, h_BTD.shape[:2]) for pool in of_dims], -1) for of_dims in pools])
        ).to(h_BTD)
        return values_CBTJ.gather(0, known.classes(h_BTD, batch)[None, ..., None].expand(1, *values_CBTJ.shape[1:]))[0]

    return _of(known, "shuffle", drawn)


@_in_streams
def matched_random(target: Meant) -> Edit:
    """The control: as many entries of each sequence, those whose |h| is nearest to the median, set to zero."""
    known = _known(target)

    def apply(h_BTD: Tensor, batch: Batch) -> Tensor:
        count_B = known.mask(h_BTD, batch).sum((1, 2))
        new = h_BTD.clone().reshape(len(h_BTD), -1)
        magnitude = new.abs().float()
        off = (magnitude - magnitude.median(1, keepdim=True).values).abs()
        off.view(h_BTD.shape)[..., list(known.dims)] = torch.inf  # another dim than the massive ones
        nearest = off.topk(int(count_B.max()) if len(count_B) else 0, largest=False).indices
        hit = torch.arange(nearest.shape[1], device=h_BTD.device) < count_B[:, None]
        return new.scatter(1, nearest, torch.where(hit, 0.0, new.gather(1, nearest))).view(h_BTD.shape)

    return Edit("random", str(known.site), apply, known.mask)


def _known(target: Meant) -> Massive:
    assert not isinstance(target, ScanResult)  # see `_in_streams`
    return target if isinstance(target, Massive) else massive(target)


def _of(given: Meant, name: str, new_values: Callable[[Tensor, Batch], Any]) -> Edit:
    """An edit that puts new values (broadcast to (B, T, J)) at massive entries."""
    target = _known(given)
    dims = list(target.dims)

    def apply(h_BTD: Tensor, batch: Batch) -> Tensor:
        old = h_BTD[..., dims]
        value = torch.as_tensor(new_values(h_BTD, batch), device=h_BTD.device).to(h_BTD.dtype)
        new = h_BTD.clone()
        new[..., dims] = torch.where(target.mask(h_BTD, batch), value.expand_as(old), old)
        return new

    return Edit(name, str(target.site), apply, target.mask)


# ---- edits of whole dims, directions, inputs, weights, attention
def zero_dims(dims: Sequence[int], site: str) -> Edit:
    """Whole dims set to zero at all tokens: outlier features (Dettmers 2022), rogue dims (Timkey 2021)."""
    chosen = list(dims)

    def apply(h_BTD: Tensor, batch: Batch) -> Tensor:
        new = h_BTD.clone()
        new[..., chosen] = 0
        return new

    return Edit(f"dims {', '.join(map(str, chosen[:4]))}{' ...' * (len(chosen) > 4)} to zero", site, apply)


def remove_direction(direction_D: Tensor, site: str) -> Edit:
    """h - (h.u) u with u the unit vector of a direction (D,), at all tokens."""

    def apply(h_BTD: Tensor, batch: Batch) -> Tensor:
        u_D = (direction_D / direction_D.norm()).to(h_BTD)
        return h_BTD - (h_BTD @ u_D)[..., None] * u_D

    return Edit("direction removed", site, apply)


_OF_TOKENS = ("input_ids", "position_ids", "token_type_ids", "labels", TEXT_POSITIONS)


def drop_first(n: int = 1) -> InputEdit:
    """The first n tokens that count are taken away (BOS, where there is one) from every row; padding stays.

    Behind a cache they are gone already: only the mask, which is about all positions, loses them again.
    """

    def apply(inputs: dict[str, Any]) -> dict[str, Any]:
        mask = inputs.get("attention_mask")
        first = None if mask is None else first_kept(mask, mask.shape[-1])
        cut = {"attention_mask", *(() if past_of(inputs) else _OF_TOKENS)}
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise UserError("The first tokens are dropped from ids and their mask.",
                            f"The attention_mask is one of queries and keys, {tuple(mask.shape)}.",
                            "Give the mask of tokens (sequences, tokens), or none.")  # fmt: skip
        kept: slice | Tensor = slice(n, None)
        # Where rows begin at different places, of each its own columns are left.
        if mask is not None and first is not None and not bool(mask[:, :n].all()):
            at_BT = torch.arange(mask.shape[1] - n, device=mask.device)[None].expand(len(mask), -1)
            kept = at_BT + n * (at_BT >= first[:, None])
        new = inputs | {
            k: v[:, kept] if isinstance(kept, slice) else v.gather(1, kept)
            for k, v in inputs.items()
            if k in cut and isinstance(v, Tensor)
        }
        if isinstance(new.get("position_ids"), Tensor):  # counted from what is first now
            new["position_ids"] = (new["position_ids"] - n).clamp(min=0)
        return new

    return InputEdit(f"first {n} token(s) dropped", apply)


def replace_first(token_id: int) -> InputEdit:
    """The first token that counts of every row is another one; behind a cache it is another one already."""

    def apply(inputs: dict[str, Any]) -> dict[str, Any]:
        if past_of(inputs):
            return inputs
        ids = inputs["input_ids"].clone()
        first = first_kept(inputs.get("attention_mask"), ids.shape[1])
        ids[torch.arange(len(ids), device=ids.device), 0 if first is None else first.to(ids.device)] = token_id
        return inputs | {"input_ids": ids}

    return InputEdit(f"first token is {token_id}", apply)


def cut_attention(positions: Sequence[int], site: str = "*.attention") -> AttentionEdit:
    """No query attends to some positions: softmax over the other keys that it sees, and over a learned sink.

    Of every query that saw one of them the logits are written out again, in blocks: what is left of an output after
    taking p v away is rounding where p is near 1, which is what it is at a sink. The others keep their output. A query
    that sees nothing else gives zero. Positions count from the first one that is not padding.
    """
    chosen = list(positions)

    def apply(a: Attended) -> Tensor:
        at = [p + a.start for p in chosen if p + a.start < a.shape[2]]
        assert a.out_HTF is not None
        return a.without(torch.tensor(at, device=a.device, dtype=torch.long)) if at else a.out_HTF

    return AttentionEdit(f"positions {chosen[:4]} not attended to", site, apply)


def super_weights(parameter: str, entries: Sequence[tuple[int, int]], keep_only: bool = False) -> WeightEdit:
    """Single weights [row, column] set to zero, or all weights but these (Yu 2024)."""

    def apply(weight: Tensor) -> Tensor:
        rows, columns = (list(x) for x in zip(*entries, strict=True))
        if keep_only:
            kept = torch.zeros_like(weight)
            kept[rows, columns] = weight[rows, columns]
            return kept
        weight[rows, columns] = 0
        return weight

    named = " ".join(f"[{r}, {c}]" for r, c in entries[:3])
    more = f" and {len(entries) - 3:,} more" if len(entries) > 3 else ""
    what = f"{parameter} {named}{more}"
    return WeightEdit(f"only {what}" if keep_only else f"{what} to zero", parameter, apply)


def norm_dims(parameter: str, dims: Sequence[int]) -> WeightEdit:
    """Scale or bias of a norm set to zero at some dims (Kovaleva 2021)."""
    chosen = list(dims)

    def apply(weight: Tensor) -> Tensor:
        weight[chosen] = 0
        return weight

    return WeightEdit(f"{parameter} at {chosen[:4]} to zero", parameter, apply)


def everywhere(make: Callable[[Massive], Edit], findings: pd.DataFrame, stack: str | None = None) -> list[Edit]:
    """The same edit at every layer that has findings."""
    edits = [make(target) for target in massive_everywhere(findings, stack)]
    return [replace(e, name=f"{e.name} at {e.site}") for e in edits]


QUARTET: dict[str, Callable[[Massive], Edit]] = {
    "zero": zero, "mean": mean, "random": matched_random, "shuffle": shuffle}  # fmt: skip
