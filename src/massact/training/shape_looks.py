"""What the vision toy lab measures: sizes of states, where attention goes, what a state is for.

Shapes: N images, T tokens, P patches, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from massact.corpora import corpus as make_corpus
from massact.models import Model
from massact.stats import Keep, Where
from massact.stats.attended import Attended
from massact.trace import Edit, Probe, edited, measure
from massact.training.monitor import MASSIVE
from massact.training.shape_toy import ShapeConfig
from massact.training.shapes import Shapes

Row = dict[str, Any]
OUTLIER = 4.0  # a patch is an outlier from so many times the median norm of all patches of these images on
CHANGES = ("baseline_nats", "delta_nats", "ci_low", "ci_high",
           "baseline_accuracy", "delta_accuracy", "accuracy_low", "accuracy_high")  # fmt: skip
QUERIES, KEYS = ("class", "patches"), ("class", "registers", "slot", "top_patch")


@dataclass
class Held:
    """Held-out images as a model takes them.

    Args:
        x_NCHW: pixel values.
        labels_N: classes.
        background_NP: bool, patches without a pixel of the shape.
    """

    x_NCHW: Tensor
    labels_N: Tensor
    background_NP: np.ndarray

    @classmethod
    def of(cls, shapes: Shapes, patch: int) -> Held:
        """Those of drawn images."""
        return cls(torch.from_numpy(shapes.values()), torch.from_numpy(shapes.labels_B), shapes.background(patch))

    def first(self, n: int) -> Held:
        """The first n of them."""
        return Held(self.x_NCHW[:n], self.labels_N[:n], self.background_NP[:n])


@torch.no_grad()
def scored(module: nn.Module, held: Held) -> tuple[Tensor, Tensor]:
    """Loss in nats and whether the greatest logit is the right one, float64 (N,) each."""
    logits_NV = torch.cat([module(pixel_values=x).logits for x in held.x_NCHW.split(128)])
    nats_N = nn.functional.cross_entropy(logits_NV, held.labels_N, reduction="none")
    return nats_N.double(), (logits_NV.argmax(1) == held.labels_N).double()


# -------------------------------------------------------------------------------------------- one pass
class _Images:
    """Rows of arrays, one for each image, in order of the images."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, tuple[Tensor, ...]]] = []

    def merge(self, other: Any) -> None:
        """Add what another one has seen."""
        self.rows.extend(other.rows)

    def result(self) -> tuple[np.ndarray, ...]:
        """What each image gave, N first."""
        ordered = [parts for _, parts in sorted(self.rows, key=lambda row: row[0])]
        return tuple(torch.stack(part).double().numpy() for part in zip(*ordered, strict=True))


class _Sizes(_Images):
    """Greatest |h|, its token, the median |h| (the lower of two), and the norm of every token (T,)."""

    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the hidden state of one image."""
        size_TD = h_TD.abs()
        at = size_TD.argmax()
        norm_T = h_TD.norm(dim=-1)
        self.rows.append((where.sequence, (size_TD.max(), at // h_TD.shape[1], size_TD.median(), norm_T)))


class _Received(_Images):
    """Attention of the class token and of the patches on every token and on the slot, mean over heads: (2, T + 1).

    NaN for a slot that is not there.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one image."""
        p_TS = a.probs(torch.arange(a.shape[2])).mean(0)
        slot = a.slot_HT
        slot_T = torch.full_like(p_TS[:, 0], torch.nan) if slot is None else slot.mean(0)
        p_TS = torch.cat([p_TS, slot_T.expand(len(p_TS))[:, None]], 1)
        self.rows.append((where.sequence, (torch.stack([p_TS[0], p_TS[self.prefix :].mean(0)]),)))


@dataclass
class Seen:
    """What one pass over images saw.

    Args:
        sizes: layer from 0 on -> (greatest |h|, its token, median |h|, norms (N, T)).
        attention: layer from 1 on -> (N, 2, T + 1), see `_Received`; empty where it cannot be seen.
    """

    sizes: dict[int, tuple[np.ndarray, ...]]
    attention: dict[int, np.ndarray]

    def top_patch(self, layer: int, config: ShapeConfig) -> np.ndarray:
        """The patch that gets most attention in a block, of class token and patches together: (N,), from 0 on."""
        given_N2P = self.attention[layer][:, :, config.prefix : -1]
        return (given_N2P[:, 0] + config.patches * given_N2P[:, 1]).argmax(1)


def seen_in(model: Model, held: Held, config: ShapeConfig) -> Seen:
    """One pass over images."""
    probes = [Probe("sizes", "*.resid_post", _Sizes)]
    if len(model.anatomy.attentions) == config.layers:
        probes.append(Probe("received", "*.attention", lambda: _Received(config.prefix)))
    seen = measure(model, make_corpus({"pixel_values": held.x_NCHW}), probes, batch_size=64)
    received = seen.sites("received") if len(probes) > 1 else []
    return Seen({site.layer: seen.result("sizes", site) for site in seen.sites("sizes")},
                {site.layer: seen.result("received", site)[0] for site in received})  # fmt: skip


# -------------------------------------------------------------------------------------------- rows
def layer_rows(seen: Seen, held: Held, config: ShapeConfig) -> list[Row]:
    """One row for each layer from 0 (the input of the first block) on; NaN is not there, never zero."""
    return [{"layer": layer} | _sizes_row(seen.sizes[layer], held, config)
            | _attention_row(seen, layer, held, config) for layer in sorted(seen.sizes)]  # fmt: skip


def _sizes_row(sizes: tuple[np.ndarray, ...], held: Held, config: ShapeConfig) -> Row:
    top_N, at_N, median_N, norms_NT = sizes
    ratio_N = top_N / np.maximum(median_N, np.finfo(float).tiny)
    norms_NP = norms_NT[:, config.prefix :]
    usual_N = np.median(norms_NP, 1)
    registers_NR = norms_NT[:, 1 : config.prefix]
    return {
        "top1": float(top_N.max()),
        "ratio": float(ratio_N.mean()),
        "massive": float(((top_N > MASSIVE[0]) & (ratio_N >= MASSIVE[1])).mean()),
        "at_class": float((at_N == 0).mean()),
        "at_registers": float(((at_N > 0) & (at_N < config.prefix)).mean()),
        "class_norm_ratio": float((norms_NT[:, 0] / usual_N).mean()),
        "register_norm_ratio": float((registers_NR.max(1) / usual_N).mean()) if config.registers else np.nan,
        "patch_norm_ratio": float((norms_NP.max(1) / usual_N).mean()),
        "outliers": float((norms_NP > OUTLIER * np.median(norms_NP)).mean()),
        "largest_on_background": _share(held.background_NP, norms_NP.argmax(1)),
    }


def _attention_row(seen: Seen, layer: int, held: Held, config: ShapeConfig) -> Row:
    """Attention in the block that ends at a layer."""
    row: Row = {f"{query}_to_{key}": np.nan for query in QUERIES for key in KEYS} | {"top_on_background": np.nan}
    if layer not in seen.attention:
        return row
    given_N2S, top_N = seen.attention[layer], seen.top_patch(layer, config)
    for i, query in enumerate(QUERIES):
        given_NS = given_N2S[:, i]
        row[f"{query}_to_class"] = float(given_NS[:, 0].mean())
        if config.registers:
            row[f"{query}_to_registers"] = float(given_NS[:, 1 : config.prefix].sum(1).mean())
        row[f"{query}_to_slot"] = float(given_NS[:, -1].mean())
        row[f"{query}_to_top_patch"] = float(given_NS[np.arange(len(top_N)), config.prefix + top_N].mean())
    return row | {"top_on_background": _share(held.background_NP, top_N)}


def _share(background_NP: np.ndarray, patch_N: np.ndarray) -> float:
    """Of images in which a patch holds no part of the shape."""
    return float(background_NP[np.arange(len(patch_N)), patch_N].mean())


# -------------------------------------------------------------------------------------------- what a state is for
def effects_of(model: Model, held: Held, seen: Seen, config: ShapeConfig) -> list[Row]:
    """Set states to zero, and to their mean over images: of all registers, and of the patch that gets most attention.

    Each edit is after one block that another one follows; the patch is the one that this next block looks at most. To
    compare, as many other patches: of the background in place of registers, and of the patch's own kind (background or
    not) in place of the patch. 95 % intervals over images, of one training.
    """
    rows: list[Row] = []
    before = scored(model.module, held)
    states = _states(model, held, config.layers)
    for layer, h_NTD in states.items():
        for target, at_NC in _targets(seen, layer, held, config):
            h_NCD = h_NTD.gather(1, at_NC[..., None].expand(-1, -1, h_NTD.shape[-1]))
            mean_CD = h_NCD.mean(0)
            cosine = float(nn.functional.cosine_similarity(h_NCD, mean_CD[None], dim=-1).mean())
            for edit, new_CD in (("zero", torch.zeros_like(mean_CD)), ("mean", mean_CD)):
                after = _edited_scores(model, held, f"{layer}.resid_post", at_NC, new_CD)
                changes = [*_change(before[0], after[0]), *_change(before[1], after[1])]
                rows.append({"layer": layer, "target": target, "edit": edit, "tokens": at_NC.shape[1],
                             "cosine": cosine, "n_images": len(at_NC)}
                            | dict(zip(CHANGES, changes, strict=True)))  # fmt: skip
    return rows


def _targets(seen: Seen, layer: int, held: Held, config: ShapeConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, positions (N, C)) of what is edited after a layer, each followed by what it is compared with."""
    random = np.random.default_rng([config.seed, 3, layer])
    order_NP = random.random(held.background_NP.shape)
    n = len(order_NP)
    if config.registers:
        yield "registers", torch.arange(1, config.prefix).expand(n, -1)
        chosen_NC = (order_NP + ~held.background_NP).argsort(1)[:, : config.registers]
        yield "other patches", torch.from_numpy(config.prefix + chosen_NC)
    if layer + 1 in seen.attention:
        top_N = seen.top_patch(layer + 1, config)
        kind_N = held.background_NP[np.arange(n), top_N]
        order_NP = order_NP + (held.background_NP != kind_N[:, None])
        order_NP[np.arange(n), top_N] = np.inf
        for name, chosen_N in (("top patch", top_N), ("another patch", order_NP.argmin(1))):
            yield name, torch.from_numpy(config.prefix + chosen_N)[:, None]


def _states(model: Model, held: Held, n_layers: int) -> dict[int, Tensor]:
    """Hidden states (N, T, D) after every block but the last."""
    sites = [Probe("h", f"{layer}.resid_post", Keep) for layer in range(1, n_layers)]
    if not sites:
        return {}
    kept = measure(model, make_corpus({"pixel_values": held.x_NCHW}), sites, batch_size=64)
    return {site.layer: torch.from_numpy(np.stack(kept.result("h", site).values)).float() for site in kept.sites("h")}


def _edited_scores(model: Model, held: Held, site: str, at_NC: Tensor, new_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and hits (N,) with the states at some positions of each image set to something."""
    parts = []
    for start in range(0, len(at_NC), 128):
        at_BC = at_NC[start : start + 128]
        some = Held(*(x[start : start + 128] for x in (held.x_NCHW, held.labels_N, held.background_NP)))
        with edited(model, Edit("put", site, _put(at_BC, new_CD), writes=_written(at_BC))):
            parts.append(scored(model.module, some))
    nats, hits = zip(*parts, strict=True)
    return torch.cat(nats), torch.cat(hits)


def _put(at_BC: Tensor, new_CD: Tensor) -> Any:
    def put(h_BTD: Tensor, batch: Any) -> Tensor:
        changed = h_BTD.clone()
        changed[torch.arange(len(at_BC))[:, None], at_BC] = new_CD.to(h_BTD)
        return changed

    return put


def _written(at_BC: Tensor) -> Any:
    """Which elements `_put` writes, as a mask."""

    def written(h_BTD: Tensor, batch: Any) -> Tensor:
        mask = torch.zeros(h_BTD.shape, dtype=torch.bool)
        mask[torch.arange(len(at_BC))[:, None], at_BC] = True
        return mask

    return written


def _change(before_N: Tensor, after_N: Tensor) -> tuple[float, float, float, float]:
    """Mean before, change, and the interval of that."""
    delta_N = after_N - before_N
    delta, half = float(delta_N.mean()), 1.96 * float(delta_N.std()) / len(delta_N) ** 0.5
    return float(before_N.mean()), delta, delta - half, delta + half
