"""Image tokens of a language model that are attention sinks, and the attention that they draw (Kang 2025).

Shapes: T positions, D width, H heads, I image tokens, Q text tokens behind them, S sink dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.models import Model, with_attention
from massact.positions import tokens_of
from massact.records.errors import UserError
from massact.records.rules import TAU
from massact.stats.attention_call import Attended
from massact.stats.protocol import PerSequence, Where
from massact.trace import Probe, measure

COLUMNS = ("layer", "sequence", "pos", "token", "phi", "sink", "attention", "share")


class _Scaled(PerSequence):
    """|h_j| / rms(h) of chosen tokens: each dim of one token (D,), or the greatest over sink dims of several (I,)."""

    def __init__(self, at: Mapping[int, Sequence[int]], dims: Sequence[int] | None = None) -> None:
        super().__init__()
        self.at, self.dims = at, dims

    @torch.no_grad()
    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the hidden state of one sequence."""
        rows = _rows(where, len(h_TD), self.at[where.sequence])
        x_ID = h_TD[rows.to(h_TD.device)].float()
        x_ID = x_ID.abs() / x_ID.pow(2).mean(-1, keepdim=True).sqrt()
        self.rows[where.sequence] = (x_ID[0] if self.dims is None else x_ID[:, list(self.dims)].amax(1)).cpu().numpy()


class _OnImages(PerSequence):
    """Attention on image tokens (I,), mean over heads and over the text tokens behind them that can see them."""

    def __init__(self, keys: Mapping[int, Sequence[int]], queries: Mapping[int, Sequence[int]]) -> None:
        super().__init__()
        self.keys, self.queries = keys, queries

    @torch.no_grad()
    def update(self, a: Attended, where: Where) -> None:
        """Take one attention call of one sequence."""
        keys_I, rows_Q = (_rows(where, a.shape[1], x[where.sequence]) for x in (self.keys, self.queries))
        keys_I, rows_Q = keys_I.to(a.device), rows_Q.to(a.device)
        seen_HI = a.sees(rows_Q, keys_I).sum(1)
        mass_HI = a.probs(keys_I, rows_Q).double().sum(1) / seen_HI  # of the queries that can see it
        self.rows[where.sequence] = mass_HI.nanmean(0).cpu().numpy()


def _rows(where: Where, n_tokens: int, positions: Sequence[int]) -> Tensor:
    """Rows of one sequence that hold some positions."""
    return torch.searchsorted(where.rows(n_tokens).cpu(), torch.tensor(positions, dtype=torch.long))


def visual_sinks(
    model: Model,
    corpus: Corpus,
    *,
    stack: str | None = None,
    dims: Iterable[int] | None = None,
    tau: float = TAU,
    batch_size: int | str = "auto",
) -> pd.DataFrame:
    """Which image tokens are visual attention sinks, in every block of a language model, and what they draw.

    phi = max over sink dims j of |h_j| / rms(h), of the hidden state that the block reads; a sink where phi > tau.
    attention[i] = mean over heads and over the text tokens behind the last image token of p_i; share[i] = attention[i]
    / the sum over the image tokens of the sequence.

    Args:
        corpus: ready for the model, of images and text.
        stack: of several that read text and images, which.
        dims: sink dims; None for those where |h_j| / rms(h) > tau at the first token of the text, after any block of
            any sequence.
        tau: 20 in the source.

    Returns:
        Columns: layer (of the block), sequence, pos, token, phi, sink, attention, share. NaN where attention is not
        seen, or no text follows the image. `attrs["dims"]` holds the sink dims; without any, phi is NaN.

    Raises:
        UserError: no stack reads text and images, or a sequence begins with an image and no dims are given.
    Source: Kang et al. 2025, arXiv 2503.03321.
    """
    seen = with_attention(model)
    name, text = _mixed(seen, corpus, stack)
    head = f"{name}/" if name else ""
    kinds = _kinds(text)
    images = {s: [p for p, kind in k.items() if kind == "image"] for s, k in kinds.items()}
    behind = {s: [p for p, kind in k.items() if kind == "text" and p > max(images[s], default=0)]
              for s, k in kinds.items()}  # fmt: skip
    first = {s: [min(k)] for s, k in kinds.items()}
    if dims is None:
        if any(kinds[s][p[0]] != "text" for s, p in first.items()):
            raise UserError("A sequence begins with an image.", "Sink dims are those of the first token of the text.",
                            "Give them: visual_sinks(..., dims=[...]).")  # fmt: skip
        starts = measure(seen, corpus, [Probe("start", f"{head}*.resid_post", partial(_Scaled, first))],
                         batch_size=batch_size)  # fmt: skip
        states = [x_D for site in starts.sites("start") for x_D in starts.result("start", site).values()]
        dims = np.flatnonzero((np.stack(states) > tau).any(0))
    chosen = sorted(int(d) for d in dims)
    probes: list[Any] = [Probe("attention", str(s), partial(_OnImages, images, behind))
                         for s in seen.anatomy.select_attention(f"{head}*.attention")]  # fmt: skip
    if chosen:
        probes.append(Probe("phi", f"{head}*.resid_pre", partial(_Scaled, images, chosen)))
    measured = measure(seen, corpus, probes, batch_size=batch_size) if probes else None
    sites = {(n, s.layer): s for n in ("phi", "attention") for s in (measured.sites(n) if measured else ())}

    def of(what: str, layer: int, sequence: int) -> np.ndarray:
        site = sites.get((what, layer))
        nothing = np.full(len(images[sequence]), np.nan)
        return nothing if site is None or measured is None else measured.result(what, site)[sequence]

    parts = []
    for layer in range(1, seen.anatomy.stack(name).n_layers + 1):
        for s, at in images.items():
            phi, mass = of("phi", layer, s), of("attention", layer, s)
            parts.append(pd.DataFrame({
                "layer": layer, "sequence": s, "pos": at, "token": [text.token(s, p) for p in at], "phi": phi,
                "sink": phi > tau, "attention": mass, "share": mass / mass.sum(),
            }))  # fmt: skip
    table = pd.concat(parts, ignore_index=True)[list(COLUMNS)]
    table.attrs["dims"] = chosen
    return table


def _mixed(model: Model, corpus: Corpus, stack: str | None) -> tuple[str, Corpus]:
    """The stack that reads text and images, and the corpus as it reads it."""
    width = corpus.inputs["input_ids"].shape[1] if corpus.kind == "tokens" else 0
    found = {}
    for s in model.anatomy.stacks:
        if stack in (None, s.name) and corpus.kind == "tokens" and model.reads(s) == "input_ids":
            last = int(corpus.mask.any(0).nonzero().max()) if corpus.mask is not None else width - 1
            read = tokens_of(model, corpus, s.name, last)
            if any(kind == "image" for kinds in _kinds(read).values() for kind in kinds.values()):
                found[s.name] = read
    if len(found) != 1:
        raise UserError("It is not known which stack reads text and images." if found else
                        "No stack of the model reads text and images.",
                        do=f"Name one: stack=... ({', '.join(found)})." if found else
                        "Give {'input_ids': ..., 'pixel_values': ...}, with placeholders for the image.")  # fmt: skip
    return next(iter(found.items()))


def _kinds(text: Corpus) -> dict[int, dict[int, str]]:
    """Modality of every position that counts, of each sequence."""
    n, width = text.inputs["input_ids"].shape
    counts = torch.ones(n, width, dtype=torch.bool) if text.mask is None else text.mask
    return {s: {int(p): text.modality(s, int(p)) for p in counts[s].nonzero().flatten()} for s in range(n)}
