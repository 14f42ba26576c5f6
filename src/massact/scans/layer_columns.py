"""Statistics that add columns to the table `layers`: those that a scan is given, and those of other packages.

A statistic declares its columns (`stats.Columned`); a scan looks with its probe in its own pass. One of this package is
named in `OURS`, one of another package by an entry point of the group `massact.statistics`, which names a `Probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from massact.models import Model, with_attention
from massact.records.errors import UserError
from massact.records.extensions import extensions
from massact.records.sites import Site
from massact.records.tables import columns_of, with_columns
from massact.stats import Columned
from massact.trace import Measurements, Probe

OURS: dict[str, Probe] = {}


@dataclass(frozen=True)
class LayerColumns:
    """Probes of single sites, and the columns that their statistics give.

    Args:
        model: in which all sites are seen.
        probes: site by site.
        meanings: column -> what it is.
        rows: (name of a probe, site) -> stack, site and layer of its row in the table.
        notes: what other packages ask for and this model does not offer.
    """

    model: Model
    probes: list[Probe] = field(default_factory=list)
    meanings: dict[str, str] = field(default_factory=dict)
    rows: dict[tuple[str, Site], tuple[str, str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def added(self, layers: pd.DataFrame, measured: Measurements) -> pd.DataFrame:
        """The table with the columns; NaN in rows that no probe looks at."""
        values: dict[str, dict[tuple[str, str, int], float]] = {name: {} for name in self.meanings}
        for key, row in self.rows.items():
            statistic = measured.statistics[key]
            assert isinstance(statistic, Columned)
            for name, value in statistic.columns().items():
                values[name][row] = float(value)
        places = list(zip(layers["stack"], layers["site"], layers["layer"], strict=True))
        new = {name: [found.get(place, float("nan")) for place in places] for name, found in values.items()}
        return with_columns(layers.assign(**new), self.meanings) if new else layers


def layer_columns(model: Model, given: Sequence[Probe], stacks: Sequence[str]) -> LayerColumns:
    """What a scan also looks at, in the stacks that its corpus reaches.

    Args:
        given: by the user; what the model does not offer of these is an error, of others a note.

    Raises:
        UserError: a probe's statistic declares no columns, or one that there is already; it names no site of these
            stacks, or two of one layer.
    """
    found = LayerColumns(model)
    for probe in [*given, *extensions("massact.statistics", Probe, OURS).values()]:
        try:
            found = _with(found, probe, stacks)
        except UserError as error:
            if any(probe is mine for mine in given):
                raise
            found.notes.append(f"The statistic {probe.name!r} was not measured: {error.what} {error.why}".rstrip())
    return found


def _with(found: LayerColumns, probe: Probe, stacks: Sequence[str]) -> LayerColumns:
    """One probe more."""
    empty, model = probe.statistic(), found.model
    if not isinstance(empty, Columned):
        raise UserError(
            f"The statistic of {probe.name!r} gives no columns of the table layers.",
            do="Declare COLUMNS and columns(), see massact.stats.Columned.",
        )
    taken = {**columns_of("layers"), **found.meanings}
    if twice := sorted(taken.keys() & empty.COLUMNS.keys()):
        raise UserError(f"The statistic of {probe.name!r} gives the column {twice[0]!r}, which there is already.")
    if "attention" in probe.site and not model.anatomy.attentions:
        model = with_attention(model)
    places = model.anatomy.select_attention(probe.site) or model.anatomy.select(probe.site)
    rows: dict[tuple[str, Site], tuple[str, str, int]] = {}
    for site in places:
        point = site.point if site.point in ("resid_post", "resid_post_prenorm") else "resid_post"
        if site.stack in stacks:
            rows[probe.name, site] = (site.stack, point, site.layer)
    if len(set(rows.values())) < len(rows) or not rows:
        raise UserError(
            f"The probe {probe.name!r} must name one site of each layer.",
            f"{probe.site!r} names {len(rows)} sites of {len(set(rows.values()))} layers.",
        )
    probes = [Probe(probe.name, str(site), probe.statistic, probe.rows) for _, site in rows]
    return LayerColumns(
        model, [*found.probes, *probes], {**found.meanings, **empty.COLUMNS}, {**found.rows, **rows}, found.notes
    )
