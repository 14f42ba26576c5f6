"""Outlier features: dims that are large at many tokens, in many layers, of nearly all sequences (Dettmers 2022).

Dim j is an outlier feature of a sequence if |x[t, j]| >= 6 at >= 6 % of its positions in >= 25 % of the layers, and one
of the model if it is one of >= 90 % of the sequences. Dettmers measures x at the inputs of linear layers, after the
norm; Sun 2024 compares with massive activations, which are of the hidden state. So it is measured at both, layers 1
to L. At the inputs a layer counts if the rule holds at any of its inputs of width d_model.

Shapes: N sequences, D dims.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from massact.classics.works import Classic, Ground, Outcome, row
from massact.interventions import evaluate, zero_dims
from massact.interventions.effects import effect_rows
from massact.records.anatomy import Stack
from massact.records.errors import UserError, WorkError
from massact.records.rules import HIT, OF_LAYERS, OF_SEQUENCES, OF_TOKENS
from massact.records.sites import Site
from massact.stats.hits import SLACK, CountResult, HitShares
from massact.trace import Edit, Probe, measure
from massact.trace.edits import Together

MIXED = ("ssm_in", "linear_attn_in", "conv_in", "mixer_in")  # what other mixers of tokens read
INPUTS = ("attn_in", *MIXED, "cross_attn_in", "mlp_in")
STREAM = ("resid_pre", "resid_mid", "resid_cross", "resid_post")
TOLD = ("perplexity", "top1_probability", "kl", "top1_agreement")


@dataclass(frozen=True)
class Features:
    """The outlier features at one kind of site.

    Args:
        dims: (J,) the features, ascending.
        of_sequences: (J,) share of sequences in which it is one.
        of_layers: (J,) share of layers in which it reaches 6 % of the positions, mean over sequences.
        of_tokens: (J,) share of positions at which it is a hit, mean over layers and sequences.
        layers_affected: share of layers in which any feature reaches 6 % of the positions, mean over sequences.
        n_sequences, n_layers: that these are over; sequences without tokens are left out.
    """

    dims: np.ndarray
    of_sequences: np.ndarray
    of_layers: np.ndarray
    of_tokens: np.ndarray
    layers_affected: float
    n_sequences: int
    n_layers: int

    @property
    def tokens_affected(self) -> float:
        """Mean of `of_tokens` over the features; 0 without one."""
        return float(self.of_tokens.mean()) if len(self.dims) else 0.0


def outlier_features(by_layer: dict[int, list[CountResult]]) -> Features:
    """The dims for which the rule of Dettmers holds.

    Args:
        by_layer: layer -> hits at each of its sites, of the same sequences everywhere. Of several sites that with
            most hits stands for the layer.

    Raises:
        ValueError: there is no layer.
    Source: Dettmers 2022; 90 % of the sequences: Sun 2024, Section 2.3.
    """
    if not by_layer:
        raise ValueError("outlier features need at least one layer")
    known_N = next(iter(by_layer.values()))[0].n_tokens > 0
    n_layers, n = len(by_layer), int(known_N.sum())
    layers_ND = sum((_reached(results)[known_N] for results in by_layer.values()), np.zeros((), np.int64))
    tokens_D = sum(np.max([r.share()[known_N] for r in results], 0).sum(0) for results in by_layer.values())
    feature_ND = layers_ND + SLACK >= OF_LAYERS * n_layers
    dims = np.flatnonzero(feature_ND.sum(0) + SLACK >= OF_SEQUENCES * n) if n else np.zeros(0, np.int64)
    affected = sum(_reached(results)[known_N][:, dims].any(1).mean() for results in by_layer.values()) if n else 0
    return Features(
        dims,
        feature_ND[:, dims].sum(0) / max(n, 1),
        layers_ND[:, dims].sum(0) / max(n * n_layers, 1),
        tokens_D[dims] / max(n * n_layers, 1),
        float(affected / n_layers),
        n,
        n_layers,
    )


def _reached(results: Sequence[CountResult]) -> np.ndarray:
    """Where a dim is a hit at enough positions, at any site of one layer: (N, D) bool."""
    return np.any([r.reaches(OF_TOKENS) for r in results], 0)


def _outlier_features(ground: Ground) -> Outcome:
    outcome, stream = Outcome(), tuple(dict.fromkeys(ground.scan.layers["site"]))
    sites = {s: p for s, p in ground.model.anatomy.sites().items() if s.stack in ground.stacks() and s.layer >= 1}
    wanted = [s for s in sites if _input(s) or s.point in stream]
    measured = measure(ground.model, ground.corpus, [Probe("hits", str(s), lambda: HitShares(HIT)) for s in wanted])
    for name in ground.stacks():
        stack = ground.model.anatomy.stack(name)
        mine = {s: measured.result("hits", s) for s in wanted if s.stack == name}
        inputs = _of_full_width(stack, {s: r for s, r in mine.items() if _input(s)}, outcome)
        _say_what_lacks(ground, stack, inputs, outcome)
        numbers = outcome.numbers[name] = {"n_inputs": None, "n_hidden": None, "at": {}}
        if inputs:
            numbers["n_inputs"] = _told(ground, name, "inputs", inputs, outcome)
        for point in stream:
            if at := {s: r for s, r in mine.items() if s.point == point}:
                n = _told(ground, name, point, at, outcome)
                numbers["n_hidden"] = n if numbers["n_hidden"] is None else numbers["n_hidden"]
        shortest = min((int(r.n_tokens.min(initial=1 << 30)) for r in mine.values()), default=1 << 30)
        if OF_TOKENS * shortest <= 1:
            outcome.notes.append(f"{_called(name)}: the shortest sequence has {shortest} positions, of which one alone "
                                 "is 6 %: there one massive activation makes an outlier feature.")  # fmt: skip
        numbers["zeroed"] = _zeroed(ground, stack, list(inputs), outcome) if inputs else {}
    return outcome


def _input(site: Site) -> bool:
    """Whether a linear layer of the block reads this point; a block may have several of a kind."""
    return re.sub(r"_[23]$", "", site.point) in INPUTS


def _called(stack: str) -> str:
    return f"stack {stack}" if stack else "the model"


def _of_full_width(stack: Stack, found: dict[Site, CountResult], outcome: Outcome) -> dict[Site, CountResult]:
    """The inputs whose dims are those of the residual stream."""
    other = [str(s) for s, r in found.items() if r.count.shape[1] != stack.d_model]
    if other:
        outcome.notes.append(f"{_called(stack.name)}: left out, as not {stack.d_model} wide: {', '.join(other)}.")
    return {s: r for s, r in found.items() if str(s) not in other}


def _say_what_lacks(ground: Ground, stack: Stack, inputs: Iterable[Site], outcome: Outcome) -> None:
    """A note for the inputs of attention and of the MLP that cannot be seen, with the reason where one is known."""
    reasons = {(s.layer, s.point): why for s, why in ground.model.anatomy.unavailable() if s.stack == stack.name}
    seen = {(s.layer, s.point) for s in inputs}
    lacking: dict[tuple[str, str], list[str]] = {}
    for layer in (b.layer for b in stack.blocks):
        for point, write in (("attn_in", "attn_out"), ("mlp_in", "mlp_out")):
            if (layer, point) not in seen and not (point == "attn_in" and any((layer, p) in seen for p in MIXED)):
                why = reasons.get((layer, point)) or reasons.get((layer, write)) or "the block offers none"
                lacking.setdefault((point, why), []).append(str(layer))
    for (point, why), layers in lacking.items():
        outcome.notes.append(f"{_called(stack.name)}: {point} is unavailable at layers {', '.join(layers)}: {why}.")


def _told(ground: Ground, stack: str, where: str, found: dict[Site, CountResult], outcome: Outcome) -> int:
    """Rows and numbers of one kind of site; the count of features."""
    by_layer: dict[int, list[CountResult]] = {}
    for site, result in found.items():
        by_layer.setdefault(site.layer, []).append(result)
    f = outlier_features(by_layer)
    at: dict[str, Any] = {"stack": stack, "subject": "inputs" if where == "inputs" else "hidden",
                          "site": "+".join(dict.fromkeys(s.point for s in found))}  # fmt: skip
    for i, dim in enumerate(f.dims):
        for metric, value in (("share_of_sequences", f.of_sequences[i]), ("share_of_layers", f.of_layers[i]),
                              ("share_of_tokens", f.of_tokens[i])):  # fmt: skip
            outcome.rows.append(row(metric, value, f.n_sequences, dim=int(dim), **at))
    both = sorted(set(f.dims.tolist()) & ground.massive_dims(stack))
    for metric, value in (("outlier_features", len(f.dims)), ("massive_too", len(both)),
                          ("layers_affected", f.layers_affected), ("tokens_affected", f.tokens_affected)):  # fmt: skip
        outcome.rows.append(row(metric, value, f.n_sequences, **at))
    outcome.numbers[stack]["at"][where] = {
        "n": len(f.dims), "n_dims": ground.model.anatomy.stack(stack).d_model,
        "dims": f.dims.tolist(), "massive": both, "n_massive": len(ground.massive_dims(stack)),
        "layers_affected": f.layers_affected, "tokens_affected": f.tokens_affected, "n_layers": f.n_layers,
        "n_sequences": f.n_sequences,
    }  # fmt: skip
    return len(f.dims)


def _zeroed(ground: Ground, stack: Stack, inputs: list[Site], outcome: Outcome) -> dict[str, Any]:
    """What setting the outlier features to zero at all linear inputs does, and as many other dims, at random."""
    dims = outcome.numbers[stack.name]["at"]["inputs"]["dims"]
    if not dims:
        outcome.notes.append(f"{_called(stack.name)}: no outlier features at linear inputs, so nothing was zeroed.")
        return {}
    others = sorted(set(range(stack.d_model)) - set(dims))
    n = min(len(dims), len(others))
    if n < len(dims):
        outcome.notes.append(f"{_called(stack.name)}: only {n} dims are no outlier features: the control is smaller.")
    drawn = sorted(np.random.default_rng(ground.seed).choice(others, n, replace=False).tolist()) if n else []
    edits = [_zero_all("outlier dims to zero", dims, inputs)]
    edits += [_zero_all("random dims to zero", drawn, inputs)] if n else []
    _say_where_shared(ground, stack, inputs, outcome)
    try:
        paired = evaluate(ground.model, ground.corpus, edits, batch_size=ground.batch_size)
    except (UserError, WorkError) as error:
        outcome.notes.append(f"{_called(stack.name)}: the effect of zeroing is unavailable: {error.what}")
        return {}
    rows = effect_rows(paired, stack=stack.name, only=TOLD)
    outcome.effects += rows
    told: dict[str, Any] = {"random_dims": drawn}
    for r in rows:
        told.setdefault(str(r["edit"]), {})[str(r["metric"])] = [r["baseline"], r["edited"]]
    return told


def _zero_all(name: str, dims: Sequence[int], sites: Iterable[Site]) -> Together:
    edits: tuple[Edit, ...] = tuple(zero_dims(dims, str(s)) for s in sites)
    return Together(name, edits)


def _say_where_shared(ground: Ground, stack: Stack, inputs: Iterable[Site], outcome: Outcome) -> None:
    """Blocks that normalise after the addition read the residual stream itself: an edit there changes both."""
    places = ground.model.anatomy.sites()
    stream = {p for s, p in places.items() if s.stack == stack.name and s.point in STREAM}
    shared = [s for s in inputs if places[s] in stream]
    if shared:
        outcome.notes.append(f"{_called(stack.name)}: {len(shared)} linear inputs (such as {shared[0]}) are the "
                             "residual stream itself: zeroing them takes the dims out of the stream, too.")  # fmt: skip


OUTLIER_FEATURES = Classic(
    "outlier-features", "Dettmers 2022; Sun 2024, Section 2.3",
    "Which dims are outlier features, are they those of massive activations, and what does zeroing them do?",
    _outlier_features,
)  # fmt: skip
