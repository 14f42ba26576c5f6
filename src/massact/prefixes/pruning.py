"""Super weights: what the massive activation is written with, found by who writes it, and set to zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from massact.corpora import Corpus
from massact.explanations.neurons import neurons_table
from massact.explanations.writers import coordinates_of, write_probes, writers_table
from massact.interventions.catalogue import super_weights
from massact.models import Model
from massact.records.clusters import MASSIVE, passing
from massact.records.kinds.scan import ScanResult
from massact.trace import WeightEdit, measure

SHARE = 0.1  # of a step up that one weight carries
N_SEQUENCES = 4


@dataclass(frozen=True)
class SuperWeight:
    """One weight: of a projection, from a neuron to a dim.

    Args:
        parameter: dotted path; entry: [row, column] as it is kept.
        share: of the step up of the massive activation.
    """

    parameter: str
    layer: int
    dim: int
    neuron: int
    entry: tuple[int, int]
    value: float
    share: float


def super_weights_of(model: Model, corpus: Corpus, scan: ScanResult) -> tuple[list[SuperWeight], list[str]]:
    """The weights that carry a tenth or more of a step up of a massive activation, and what could not be seen.

    Args:
        model: that was scanned; corpus: what was scanned.
    """
    few = corpus.head(min(N_SEQUENCES, corpus.n_sequences))
    clusters = passing(scan.clusters)
    clusters = clusters[clusters["label"] == MASSIVE]
    coordinates = coordinates_of(scan.findings, clusters, few.n_sequences)
    if not coordinates:
        return [], ["No super weights: the first sequences have no massive activation of a dim."]
    stacks = {s.name: s for s in model.anatomy.stacks}
    probes = [p for s in stacks.values() if (mine := [c for c in coordinates if c.stack == s.name])
              for p in write_probes(s, mine)]  # fmt: skip
    writers, _, notes = writers_table(stacks, coordinates, measure(model, few, probes), model.proof.tolerance)
    neurons, more = neurons_table(model, few, coordinates, writers)
    found: dict[tuple[str, tuple[int, int]], SuperWeight] = {}
    for row in neurons[(neurons["neuron"] >= 0) & (neurons["share"] >= SHARE)].itertuples():
        parameter = f"{row.module}.weight"
        weight = model.module.get_parameter(parameter)
        pair = (int(row.dim), int(row.neuron))
        # transformers' Conv1D keeps (inputs, outputs).
        turned = type(model.module.get_submodule(str(row.module))).__name__ == "Conv1D"
        entry = pair[::-1] if turned else pair
        value = float(weight.detach()[entry])
        found.setdefault((parameter, entry),
                         SuperWeight(parameter, int(row.layer), *pair, entry, value, float(row.share)))  # fmt: skip
    told = [] if found else [f"No super weight: no neuron carries {SHARE:.0%} of a step up."]
    return list(found.values()), [*notes, *more, *told]


def zero_edits(weights: Sequence[SuperWeight]) -> tuple[WeightEdit, ...]:
    """Edits that set them to zero, one for each parameter."""
    entries: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for one in weights:
        entries[one.parameter].append(one.entry)
    return tuple(super_weights(name, mine) for name, mine in entries.items())


def prune(model: Model, weights: Sequence[SuperWeight]) -> None:
    """Set them to zero for good."""
    with torch.no_grad():
        for one in weights:
            model.module.get_parameter(one.parameter)[one.entry] = 0
