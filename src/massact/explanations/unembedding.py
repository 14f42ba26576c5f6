"""What the unembedding does not read: the share of massive tokens in its weakest directions (Cancedda 2024).

W = W_U - mean over the vocabulary, which softmax does not see, times diag(g), the gain of the final norm: what the
logits are of a state as it stands in the residual stream, but for its length. The dark subspace is the span of the
right singular vectors of W with the least singular values, 5 % of them. A random vector has 5 % of its squared norm in
it. Without the gain, or without centring, these are other directions: all four are told.

Shapes: V vocabulary, D dims, B weakest directions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from massact.anatomy.projections import sizes_of
from massact.explanations.collapse import Token, gain_of
from massact.models import Model, matrix_of
from massact.records.anatomy import Place
from massact.stats.intervals import UNKNOWN, mean_interval
from massact.trace import tapped
from massact.trace.hooks import AllSeen

BOTTOM = 0.05  # of the singular directions, the weakest: Cancedda 2024
WIDEST = 8192  # a wider residual stream is not decomposed
_ROWS = 1 << 14  # of the unembedding at a time
ALIKE = 1e-4  # of a cosine to 1: two tensors that are one, but for a factor


def reads_head(model: Model, stack: str) -> bool:
    """Whether the unembedding reads this stack: of several the last one that runs, never the encoder of a decoder."""
    return stack == model.anatomy.stacks[-1].name


def unread(model: Model, stack: str) -> str:
    """Why there is no dark subspace of a stack; empty where there is one."""
    if not reads_head(model, stack):
        return "no unembedding reads this stack"
    head = _head(model)
    if head is None or not (sizes := sizes_of(head)):
        return "the model has no unembedding matrix"
    if sizes[1] != model.anatomy.stack(stack).d_model:
        return "the unembedding reads another width than that of the residual stream"
    return f"the residual stream is wider than {WIDEST:,}" if sizes[1] > WIDEST else ""


def _head(model: Model) -> nn.Module | None:
    head: nn.Module | None = getattr(model.module, "get_output_embeddings", lambda: None)()
    return head


def dark_rows(
    model: Model, states: Mapping[str, Mapping[Token, np.ndarray]], dims: Collection[int], gain_D: np.ndarray | None
) -> list[dict[str, object]]:
    """Rows of the table `dark_subspace`, but for stack and layer, of a stack that `unread` says nothing of.

    Args:
        states: group of tokens -> (sequence, position) -> (D,) hidden state.
        dims: whose one-hot directions are looked at.
        gain_D: of the final norm; None where it is not known: rows with the gain are left out.
    """
    head = _head(model)
    assert head is not None
    D = sizes_of(head)[1]
    weight_VD = matrix_of(head, D)
    mean_D = weight_VD.mean(0)
    # Around the mean first: in float32 the small directions would be lost beside it.
    centred_DD = sum((x.T @ x).double().cpu() for x in (w - mean_D for w in weight_VD.split(_ROWS)))
    mean_D = mean_D.double().cpu()
    raw_DD = centred_DD + len(weight_VD) * torch.outer(mean_D, mean_D)
    rows: list[dict[str, object]] = []
    for with_gain in (True, False) if gain_D is not None else (False,):
        for centred in (True, False):
            gram_DD = centred_DD if centred else raw_DD
            if with_gain:
                g_D = torch.from_numpy(gain_D)
                gram_DD = g_D[:, None] * gram_DD * g_D
            _, directions_DD = torch.linalg.eigh(gram_DD)  # the weakest first
            weakest_DB = directions_DD[:, : max(1, round(BOTTOM * D))].numpy()
            columns_D = gram_DD.diagonal().numpy()
            of: dict[str, object] = {"gain": with_gain, "centred": centred, "n_dims": D,
                                     "chance": weakest_DB.shape[1] / D}  # fmt: skip
            rows += [of | {"vector": name, "dim": -1, "norm_rank": np.nan, **_share(weakest_DB, tokens)}
                     for name, tokens in states.items() if tokens]  # fmt: skip
            rows += [
                of
                | {"vector": "dim", "dim": j, "norm_rank": float(1 + (columns_D > columns_D[j]).sum())}
                | {"share": float((weakest_DB[j] ** 2).sum()), "n_tokens": 1, **_UNKNOWN}
                for j in sorted(dims)
            ]
    return rows


_UNKNOWN = {"share_low": np.nan, "share_high": np.nan}


def _share(weakest_DB: np.ndarray, tokens: Mapping[Token, np.ndarray]) -> dict[str, object]:
    """Mean share of the tokens' squared norms, with its interval over sequences."""
    h_ND = np.stack(list(tokens.values()))
    share_N = ((h_ND @ weakest_DB) ** 2).sum(1) / (h_ND**2).sum(1)
    of_sequence = pd.Series(share_N, [s for s, _ in tokens]).groupby(level=0).mean().to_numpy()
    around = mean_interval(of_sequence) if len(of_sequence) > 1 else UNKNOWN
    return {"share": float(share_N.mean()), "share_low": around.low, "share_high": around.high, "n_tokens": len(h_ND)}


def final_gain(model: Model, stack: str) -> np.ndarray | None:
    """The gain (D,) of the norm whose output the unembedding reads; None where no module's output is what it reads.

    Found by looking: one pass of the short input that the model was proved on. Of the modules with a scale of the width
    of the stream that are in no block each is compared with what the unembedding is given, at the last token.
    """
    head, of = _head(model), model.anatomy.stack(stack)
    inside = {block.module for block in of.blocks}
    names = {module: name for name, module in model.module.named_modules()}
    candidates = [
        name
        for name, module in model.module.named_modules()
        if _scale(module, of.d_model) and not any(name == b or name.startswith(f"{b}.") for b in inside)
    ]
    if head is None or head not in names or not candidates:
        return None
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if x.shape[-1] == of.d_model:
            seen[name] = x.detach().reshape(-1, of.d_model)[-1].double().cpu()

    places = {name: Place(name, "out") for name in candidates} | {"": Place(names[head], "in", (0,))}
    taps = [(place, lambda x, name=name: keep(name, x)) for name, place in places.items()]
    with torch.inference_mode(), tapped(model.module, taps, stop=True) as state, suppress(AllSeen):
        state.begin()
        model.run(dict(model.example), places=list(places.values()))
    for name in reversed(candidates):
        if "" in seen and name in seen and torch.cosine_similarity(seen[name], seen[""], dim=0) > 1 - ALIKE:
            return gain_of(model.module.get_submodule(name), of.d_model)
    return None


def _scale(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (width,)
