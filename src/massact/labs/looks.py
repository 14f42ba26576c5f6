"""What the toy lab measures: where attention goes, how large the first state is, and what it is for.

Looked at are held-out sequences that begin with an ordinary character, or with BOS where all do.

Shapes: B sequences, T positions, H heads, D width, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from massact.corpora.packing import Request
from massact.corpora.tensors import from_ids
from massact.labs.backcopy import Backcopy
from massact.labs.toy import FAR, FROM_QUERY, NEXT, ORDINARY, LabConfig
from massact.models import Model, load, with_attention
from massact.stats import Keep, PerSequence, Where
from massact.stats.attention_call import Attended
from massact.stats.intervals import mean_interval
from massact.trace import Edit, Probe, edited, measure
from massact.variants.application import attention as variant_attention
from massact.variants.changes import PREFIX

N_LOOKED = 64  # sequences of one look during training; the last is at all of them
Row = dict[str, Any]
_WATCHED = PREFIX + "lab"


def uniform(length: int) -> float:
    """Attention on the first position of a head that looks everywhere alike, of the queries that count."""
    return float(np.mean([1 / (t + 1) for t in range(FROM_QUERY, length)]))


def losses(module: nn.Module, ids_BT: Tensor, task: Backcopy) -> tuple[Tensor, Tensor, Tensor]:
    """Loss in nats of every target (B, T - 1), and the masks of backcopies and of bigrams.

    What follows BOS does not count: the loss there would make the first state large for a reason of its own.
    """
    logits_BTV = module(input_ids=ids_BT).logits[:, -ids_BT.shape[1] : -1]
    loss_BT = nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return (loss_BT, *task.kinds(ids_BT))


@torch.no_grad()
def task_losses(module: nn.Module, ids_BT: Tensor, task: Backcopy) -> Row:
    """Mean loss, that of backcopies, and that of bigrams beyond what the chain leaves uncertain."""
    loss_BT, copies_BT, bigrams_BT = losses(module, ids_BT, task)
    unsure_BT = torch.cat([task.entropy_V, torch.zeros(1, dtype=torch.double)])[ids_BT[:, :-1]]
    return {
        "nats": float(loss_BT[copies_BT | bigrams_BT].mean()),
        "backcopy_nats": float(loss_BT[copies_BT].mean()),
        "bigram_excess_nats": float((loss_BT - unsure_BT)[bigrams_BT].mean()),
    }


# -------------------------------------------------------------------------------------------- where attention goes
class _FirstMass(PerSequence):
    """Attention on the first position of queries that see many keys, and the probability of an extra slot: (H,)."""

    def __init__(self, shifted: int = 0) -> None:
        super().__init__()
        self.shifted = shifted

    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence."""
        late = slice(FROM_QUERY + self.shifted, None)
        p_HRK = a.probs(torch.arange(1 + self.shifted), late).mean(1)
        slot = a.slot_HT
        if self.shifted:  # the sink token is the slot
            slot_H = p_HRK[:, 0]
        else:
            slot_H = torch.full_like(p_HRK[:, 0], torch.nan) if slot is None else slot[:, late].mean(1)
        self.rows[where.sequence] = p_HRK[:, self.shifted], slot_H

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(attention on the first position, probability of the slot), (H,) each."""
        first_H, slot_H = (torch.stack(part).mean(0).numpy() for part in zip(*self.in_order(), strict=True))
        return first_H, slot_H


class _KeyScale(PerSequence):
    """Root mean square of an entry of the keys."""

    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence."""
        assert a.k_KSE is not None
        self.rows[where.sequence] = float(a.k_KSE.square().mean())

    def result(self) -> float:
        """The scale."""
        return float(np.mean(self.in_order()) ** 0.5)


class _Sizes(PerSequence):
    """L2 norm of the first position over the mean of all others; greatest |h|, and that over the median."""

    def __init__(self, shifted: int = 0) -> None:
        super().__init__()
        self.shifted = shifted

    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the hidden state of one sequence."""
        h_TD = h_TD[self.shifted :]
        norm_T, size_TD = h_TD.norm(dim=-1), h_TD.abs()
        top = float(size_TD.max())
        self.rows[where.sequence] = float(norm_T[0]), float(norm_T[1:].mean()), top, top / float(size_TD.median())

    def result(self) -> tuple[float, float, float]:
        """(ratio of norms, greatest |h|, greatest |h| over the median), the last a mean over sequences."""
        first, rest, top, ratio = np.array(self.in_order()).T
        return float(first.mean() / rest.mean()), float(top.max()), float(ratio.mean())


def key_scale(module: nn.Module, ids_BT: Tensor) -> float:
    """Standard deviation (about 0) of an entry of real keys."""
    probes = [Probe("k", "*.attention", _KeyScale)]
    seen = measure(with_attention(load(module)), from_ids(ids_BT, None, Request()), probes, batch_size=64)
    return float(np.mean([seen.result("k", site) for site in seen.sites("k")]))


def opened(module: nn.Module) -> Model:
    """The model with its anatomy; done once, since training does not change it."""
    return with_attention(load(module))


def look(model: Model, ids_BT: Tensor, config: LabConfig) -> Row:
    """Attention on the first position and on a slot, over all heads; how large the first state is."""
    shifted = config.shifted
    probes = [Probe("sizes", "*.resid_post", lambda: _Sizes(shifted))]
    proved = len(model.anatomy.attentions) == config.layers
    if proved:
        probes.append(Probe("first", "*.attention", lambda: _FirstMass(shifted)))
    seen = measure(model, from_ids(ids_BT, None, Request()), probes, batch_size=64)
    if proved:
        pairs = [seen.result("first", site) for site in seen.sites("first")]
        first_N, slot_N = (np.concatenate(part) for part in zip(*pairs, strict=True))
    else:  # rows do not sum to one: their weights are asked of the variant itself
        first_N = _weights_on_first(model.module, ids_BT)
        slot_N = np.full_like(first_N, np.nan)
    sizes = {site.layer: seen.result("sizes", site) for site in seen.sites("sizes") if site.layer >= 1}
    return {
        "first_attention": float(first_N.mean()),
        "first_attention_max": float(first_N.max()),
        "slot_mass": float(slot_N.mean()),
        # What a block reads: nothing reads the last state but the output, or there is only one.
        "norm_ratio": max(r for layer, (r, *_) in sizes.items() if layer < config.layers or config.layers == 1),
        "top1": max(top for _, top, _ in sizes.values()),
        "ratio": max(ratio for *_, ratio in sizes.values()),
    }


@torch.no_grad()
def _weights_on_first(module: nn.Module, ids_BT: Tensor) -> np.ndarray:
    """Weight of key 0, head by head: what the variant gives where that key has value 1 and all others 0."""
    found: list[Tensor] = []

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        marked = torch.zeros_like(value)
        marked[:, :, 0] = 1.0
        weights_BTHF, _ = variant_attention(module, query, key, marked, *args, **kwargs)
        found.append(weights_BTHF[:, FROM_QUERY:, :, 0].mean((0, 1)))
        return variant_attention(module, query, key, value, *args, **kwargs)

    with _attending(module, watched):
        module(input_ids=ids_BT)
    return torch.cat(found).numpy()


@contextmanager
def _attending(module: Any, function: Any) -> Iterator[None]:
    """Another attention function for the length of a `with`."""
    before = module.config._attn_implementation_internal
    AttentionInterface.register(_WATCHED, function)
    AttentionMaskInterface.register(_WATCHED, sdpa_mask)
    module.config._attn_implementation_internal = _WATCHED
    try:
        yield
    finally:
        module.config._attn_implementation_internal = before
        AttentionInterface._global_mapping.pop(_WATCHED, None)
        AttentionMaskInterface._global_mapping.pop(_WATCHED, None)


# -------------------------------------------------------------------------------------------- what the state is for
def effects_of(model: Model, ids_BT: Tensor, task: Backcopy, config: LabConfig) -> list[Row]:
    """Set the first state to its mean over inputs, and to zero; and that of an ordinary position, to compare.

    Each edit is at one position, after one block that another one follows. The change of the loss, with a 95 % interval
    over sequences, is given for the `NEXT` targets behind the edited position, and for those far behind both, which are
    the same for both and of which every query sees many keys: a bias is read by everyone.
    """
    rows: list[Row] = []
    before_BT = _counted_loss(model.module, ids_BT, task)
    for layer, h_BTD in _states(model, ids_BT, config.layers).items():
        for position in (0, ORDINARY):
            h_BD = h_BTD[:, position + config.shifted]
            mean_D = h_BD.mean(0)
            for edit, new_D in (("zero", torch.zeros_like(mean_D)), ("mean", mean_D)):
                with edited(model, Edit("put", f"{layer}.resid_post", _put(position + config.shifted, new_D))):
                    after_BT = _counted_loss(model.module, ids_BT, task)
                cosine = float(nn.functional.cosine_similarity(h_BD, mean_D[None], dim=-1).mean())
                where: Row = {"layer": layer, "position": position, "edit": edit, "cosine": cosine}
                for targets, at in (("far", slice(ORDINARY + FAR, None)),
                                    ("next", slice(position + 1, position + 1 + NEXT))):  # fmt: skip
                    rows.append(where | {"targets": targets} | _change(before_BT[:, at], after_BT[:, at]))
    return rows


def _change(before_BN: Tensor, after_BN: Tensor) -> Row:
    """Change of each sequence's mean loss, and its interval; NaN is a target that does not count."""
    before_B = before_BN.double().nanmean(1)
    change = mean_interval((after_BN.double().nanmean(1) - before_B).numpy())
    return {"baseline_nats": float(before_B.mean()), "delta_nats": float(change.estimate), "ci_low": float(change.low),
            "ci_high": float(change.high), "n_sequences": len(before_B)}  # fmt: skip


def _states(model: Model, ids_BT: Tensor, n_layers: int) -> dict[int, Tensor]:
    """Hidden states (B, T, D) after every block but the last."""
    seen = measure(model, from_ids(ids_BT, None, Request()), [Probe("h", "*.resid_post", Keep)], batch_size=64)
    kept = {site.layer: seen.result("h", site) for site in seen.sites("h") if 1 <= site.layer < n_layers}
    return {layer: torch.from_numpy(np.stack(k.values)).float() for layer, k in kept.items()}


def _put(position: int, new_D: Tensor) -> Any:
    def put(h_BTD: Tensor, batch: Any) -> Tensor:
        changed = h_BTD.clone()
        changed[:, position] = new_D.to(h_BTD)
        return changed

    return put


@torch.no_grad()
def _counted_loss(module: nn.Module, ids_BT: Tensor, task: Backcopy) -> Tensor:
    """Loss (B, T - 1) of what is predicted from each position; NaN where it does not count."""
    loss_BT, copies_BT, bigrams_BT = losses(module, ids_BT, task)
    return loss_BT.masked_fill(~(copies_BT | bigrams_BT), torch.nan)
