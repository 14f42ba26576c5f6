"""What an entry is: a declared name, its source, and a function from a model on its text to an outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from massact.corpora import Corpus
from massact.models import Model
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult


@dataclass(frozen=True)
class Ground:
    """What every entry is given.

    Args:
        model: loaded, with its attention looked for (`massact.models.with_attention`).
        corpus: the scanned text (or images), perhaps its first sequences.
        scan: of that model and corpus.
        batch_size: sequences per forward pass of paired runs.
        seed: of everything random.
    """

    model: Model
    corpus: Corpus
    scan: ScanResult
    batch_size: int = 1
    seed: int = 0

    def stacks(self) -> list[str]:
        """Names of the stacks that the corpus runs through, in order."""
        seen = list(dict.fromkeys(self.scan.layers["stack"]))
        return [s.name for s in self.model.anatomy.stacks if s.name in seen]

    def massive_dims(self, stack: str) -> set[int]:
        """Dims with findings of the scan."""
        f = self.scan.findings
        return {int(d) for d in f.loc[(f["stack"] == stack) & (f["dim"] >= 0), "dim"].unique()}


@dataclass
class Outcome:
    """What an entry found.

    Args:
        numbers: by name, what its sentence is made of; plain JSON values.
        rows: of the table `classics`, made by `row`.
        effects: of the table `classic_effects`, made by `massact.interventions.effects.effect_rows`.
        notes: what a reader must know, one sentence each.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, object]] = field(default_factory=list)
    effects: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Classic:
    """A declared entry.

    Args:
        name: as asked for on the command line.
        source: the work it is from.
        asks: the question that it answers, one line.
        run: does it.
    """

    name: str
    source: str
    asks: str
    run: Callable[[Ground], Outcome]


class Unavailable(UserError):
    """An entry that this model or corpus cannot have; its reason is reported, the others go on."""


def row(
    metric: str,
    value: float,
    n: int,
    *,
    stack: str = "",
    site: str = "",
    layer: int = -1,
    head: int = -1,
    dim: int = -1,
    subject: str = "",
) -> dict[str, object]:
    """One row of the table `classics`, see `massact.records.tables`."""
    return {
        "stack": stack, "site": site, "layer": layer, "head": head, "dim": dim, "subject": subject, "metric": metric,
        "value": float(value), "n": int(n),
    }  # fmt: skip
