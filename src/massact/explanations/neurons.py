"""Which neurons, or experts, of the MLP that steps a coordinate up carry it: super weights fall out.

write[dim] = sum over neurons of activation x weight[dim, neuron] + bias, exactly, at the output of the projection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from massact.anatomy.projections import sizes_of
from massact.corpora import Corpus
from massact.explanations.writers import Coordinate
from massact.models import Model, held, matrix_of
from massact.records.anatomy import Block, Place
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats.groups import Gather
from massact.trace import Probe, measure, tapped
from massact.trace.hooks import AllSeen

MOST_NEURONS = 8  # of one coordinate and layer
MOST_TOKENS = 16  # of one coordinate whose activations are kept: whole rows of d_mlp


_Routed = tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True)
class _StepUp:
    """One MLP that steps a coordinate up."""

    coordinate: Coordinate
    stack: str  # that has what the MLP reads: another one than the coordinate's where there are several streams
    block: Block
    write: str  # mlp_out, mlp_out_2, ...

    @property
    def tokens(self) -> tuple[tuple[int, int], ...]:
        return self.coordinate.tokens[:MOST_TOKENS]

    def site(self, point: str) -> Site:
        return Site(self.stack, self.block.layer, self.write.replace("_out", point))


def neurons_table(
    model: Model, corpus: Corpus, coordinates: Sequence[Coordinate], writers: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """The neurons (or experts) behind every step up by an MLP, and notes on those that cannot be seen."""
    steps = []
    for c in coordinates:
        stack = model.anatomy.stack(model.anatomy.together(c.stack)[0])
        for row in _ups(writers, c).itertuples():
            steps.append(_StepUp(c, stack.name, stack.blocks[int(row.layer) - 1], str(row.submodule)))
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    routed: dict[tuple[str, int], _Routed] = {}  # a sequence is run once, whatever coordinates it has
    seen = _activations(model, corpus, [s for s in steps if s.write.replace("_out", "_act") in s.block.places])
    routing = [s for s in steps if s.site("_act") not in seen]
    added = _activations(model, corpus, routing, ("_out",)) if routing else {}
    for step in steps:
        if step.site("_act") in seen:
            act, reads = seen[step.site("_act")], seen[step.site("_in")]
            rows += _neuron_rows(model, step, act, reads)
        elif (experts := _expert_rows(model, corpus, step, routed, added)) is not None:
            rows += experts
        else:
            why = step.block.unavailable.get(step.write.replace("_out", "_act"), "its last projection was not found")
            notes.append(f"The neurons of {step.site('_out')} are unavailable: {why}.")
    _fan_out(rows)
    return frame("neurons", rows), list(dict.fromkeys(notes))


def _ups(writers: pd.DataFrame, c: Coordinate) -> pd.DataFrame:
    mine = (
        (writers["stack"] == c.stack)
        & (writers["dim"] == c.dim)
        & (writers["position_class"] == c.position_class)
        & (writers["role"] == "up")
        & writers["submodule"].str.startswith("mlp_out")
    )
    return writers[mine]


def _activations(
    model: Model, corpus: Corpus, steps: Sequence[_StepUp], points: tuple[str, ...] = ("_act", "_in")
) -> dict[Site, Mapping[Any, np.ndarray]]:
    """What the last projections read, and what the MLPs read, at the tokens of the coordinates."""
    if not steps:
        return {}
    chosen: dict[int, set[int]] = {}
    for step in steps:
        for sequence, pos in step.tokens:
            chosen.setdefault(sequence, set()).add(pos)
    wanted = {s: sorted(p) for s, p in chosen.items()}
    sites = {step.site(point) for step in steps for point in points}
    batches = (b for b in corpus.batches(1) if b.sequences[0] in wanted)
    measured = measure(model, batches, [Probe("rows", str(s), lambda: Gather(wanted)) for s in sorted(sites)])
    return {site: measured.result("rows", site) for site in sites}


def _neuron_rows(model: Model, step: _StepUp, act: Mapping, reads: Mapping) -> list[dict[str, object]]:
    place: Place = step.block.places[step.write.replace("_out", "_act")]
    module = model.module.get_submodule(place.module)
    act_NF = torch.from_numpy(np.stack([act[t] for t in step.tokens])).float()
    weight_F = matrix_of(module, act_NF.shape[1])[step.coordinate.dim].cpu()
    parts_F = act_NF.mean(0) * weight_F
    total, order = float(parts_F.sum()), parts_F.abs().argsort(descending=True)[:MOST_NEURONS]
    feeders = _feeders(model, step, place.module, act_NF.shape[1])
    reads_ND = torch.from_numpy(np.stack([reads[t] for t in step.tokens])).float()
    rows = []
    for rank, n in enumerate(order.tolist(), 1):
        row = _common(step, place.module) | {
            "neuron": n, "rank": rank, "activation": float(act_NF[:, n].mean()), "weight": float(weight_F[n]),
            "contribution": float(parts_F[n]), "share": float(parts_F[n]) / total if total else np.nan,
        }  # fmt: skip
        for role, (name, rows_FD, bias_F) in feeders.items():
            norms_F = rows_FD.norm(dim=1)
            row |= {
                f"{role}_module": name,
                f"{role}_row_z": float((norms_F[n] - norms_F.mean()) / norms_F.std()),
                role: float((reads_ND @ rows_FD[n]).mean() + bias_F[n]),
            }
        rows.append(row)
    return rows


def _common(step: _StepUp, module: str) -> dict[str, object]:
    c = step.coordinate
    empty = {f"{role}_{k}": v for role in ("gate", "up") for k, v in (("module", ""), ("row_z", np.nan))}
    return {
        "stack": c.stack, "layer": step.block.layer, "dim": c.dim, "position_class": c.position_class,
        "module": module, "neuron": -1, "expert": -1, "fan_out": 0, "weight": np.nan, "gate": np.nan, "up": np.nan,
    } | empty  # fmt: skip


def _feeders(model: Model, step: _StepUp, last: str, n_neurons: int) -> dict[str, tuple[str, Tensor, Tensor]]:
    """The projections that feed the neurons, as role -> (name, rows (F, D), bias (F,)).

    Of two, the one that is called a gate is the gate; of one with two rows a neuron, the first half (as transformers
    splits it).
    """
    width = model.anatomy.stack(step.coordinate.stack).d_model
    parent = last.rpartition(".")[0]
    found: list[tuple[str, Tensor, Tensor]] = []
    inside = ""
    for name, module in model.module.get_submodule(parent).named_modules():
        full = f"{parent}.{name}"
        sizes = sizes_of(module)
        if not name or full == last or full.startswith((f"{last}.", f"{inside}.")):
            continue
        if sizes not in ((n_neurons, width), (width, n_neurons), (2 * n_neurons, width), (width, 2 * n_neurons)):
            continue
        inside = full  # of a map with an adapter in it, the whole
        rows = matrix_of(module, width).cpu()
        bias = getattr(module, "bias", None)
        bias_O = torch.zeros(len(rows)) if bias is None else held(module, "bias").detach().float().cpu()
        if len(rows) in (n_neurons, 2 * n_neurons):
            found.append((full, rows, bias_O))
    if len(found) == 1 and len(found[0][1]) == 2 * n_neurons:
        name, rows, bias = found[0]
        return {"gate": (name, rows[:n_neurons], bias[:n_neurons]), "up": (name, rows[n_neurons:], bias[n_neurons:])}
    gates = [f for f in found if "gate" in f[0].rpartition(".")[2] or f[0].endswith(".w1")]
    if len(found) == 2 and len(gates) == 1:
        return {"gate": gates[0], "up": next(f for f in found if f is not gates[0])}
    return {"up": found[0]} if len(found) == 1 and len(found[0][1]) == n_neurons else {}


def _fan_out(rows: list[dict[str, object]]) -> None:
    """How many coordinates of a layer each leading neuron leads: several rows of one column are one object."""
    led = Counter((r["stack"], r["layer"], r["module"], r["neuron"], r["expert"]) for r in rows if r["rank"] == 1)
    for r in rows:
        r["fan_out"] = led[r["stack"], r["layer"], r["module"], r["neuron"], r["expert"]]


# ---- mixtures of experts
def _expert_rows(
    model: Model,
    corpus: Corpus,
    step: _StepUp,
    routed: dict[tuple[str, int], _Routed],
    added: Mapping[Site, Mapping[Any, np.ndarray]],
) -> list[dict[str, object]] | None:
    """What each expert adds to a coordinate: the experts once more with all gates but one at zero; None if unseen.

    Shares are of all that the sublayer adds there, `added`: what a shared expert adds is no routed one's.
    """
    name = _experts_module(model.module, step.block.module)
    if name is None:
        return None
    gates: dict[int, list[float]] = {}
    parts: dict[int, float] = {}
    for sequence, pos in step.tokens:
        if (name, sequence) not in routed:
            routed[name, sequence] = _routing(model, corpus, name, sequence)
        given = routed[name, sequence]
        if given is None:
            return None
        hidden, index, weight = given
        tokens = hidden.reshape(-1, hidden.shape[-1])
        if len(tokens) != len(index) or pos >= len(tokens):
            return None
        experts: Any = model.module.get_submodule(name)
        for slot, expert in enumerate(index[pos].tolist()):
            one = torch.zeros_like(weight[pos : pos + 1])
            one[0, slot] = weight[pos, slot]
            with torch.inference_mode():
                out = experts(tokens[pos : pos + 1].reshape(1, -1), index[pos : pos + 1], one)
            gates.setdefault(expert, []).append(float(weight[pos, slot]))
            parts[expert] = parts.get(expert, 0.0) + float(out.reshape(-1)[step.coordinate.dim]) / len(step.tokens)
    write, place = added[step.site("_out")], step.block.places[step.write]
    total = float(np.mean([write[token][step.coordinate.dim] for token in step.tokens]))
    if isinstance(place.scale, str) or place.formula is not None:
        total = sum(parts.values())  # what the sublayer adds is scaled by more than a number: of the experts' sum
    else:
        total /= place.scale
    ranked = sorted(parts, key=lambda e: -abs(parts[e]))[:MOST_NEURONS]
    return [
        _common(step, name) | {
            "expert": e, "rank": rank, "activation": float(np.mean(gates[e])), "contribution": parts[e],
            "share": parts[e] / total if total else np.nan,
        }
        for rank, e in enumerate(ranked, 1)
    ]  # fmt: skip


def _experts_module(root: nn.Module, block: str) -> str | None:
    """The module of a block that holds the weights of all experts in one tensor."""
    for name, module in root.get_submodule(block).named_modules():
        if name and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            return f"{block}.{name}"
    return None


def _routing(model: Model, corpus: Corpus, name: str, sequence: int) -> _Routed:
    """(hidden, expert of each slot, its weight) of one sequence, as the experts are called with them."""
    kept: list[Tensor] = []
    places = [Place(name, "in", (i,)) for i in range(3)]
    batch = next(iter(corpus.batches(1, start=sequence)))
    try:
        with (
            torch.inference_mode(),
            tapped(model.module, [(p, lambda h: kept.append(h.clone())) for p in places], stop=True) as state,
            suppress(AllSeen),
        ):
            state.begin()
            model.run(batch.inputs, places=places)
    except (IndexError, KeyError, AttributeError, TypeError):
        return None  # called in another way
    if len(kept) != 3 or kept[1].is_floating_point() or kept[1].shape != kept[2].shape or kept[1].ndim != 2:
        return None
    return kept[0], kept[1], kept[2]
