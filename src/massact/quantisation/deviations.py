"""Deviations: how far hidden states are from those in full precision, of massive tokens and of the rest apart.

error = sqrt(sum |h' - h|^2 / sum |h|^2) over the tokens of a column. Propagated: with everything that a scheme
quantises.
Local: with one site of one block, whose input is as it is in full precision.

Shapes: T tokens, D dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.quantisation.linears import point_of, primary
from massact.quantisation.massive_tokens import MassiveTokens
from massact.quantisation.roundings import Prepared, cache_edit, site_edit
from massact.quantisation.schemes import Scheme
from massact.records.sites import Site
from massact.stats.protocol import PerSequence, Where
from massact.trace import Edit, Probe, Together, observing
from massact.trace.edits import SingleEdit
from massact.trace.observation import Measurements

CLEAN, OFF = "in full precision", "off"


@dataclass
class Sums:
    """Squares of a column of tokens: what the error is the root of."""

    off: float = 0.0
    of: float = 0.0
    n: int = 0

    def add(self, other: Sums) -> None:
        """Add those of other tokens."""
        self.off, self.of, self.n = self.off + other.off, self.of + other.of, self.n + other.n

    @property
    def error(self) -> float:
        """sqrt(off / of); NaN where there is no such token."""
        return (self.off / self.of) ** 0.5 if self.of > 0 else float("nan")


@dataclass
class Deviation:
    """Both columns."""

    massive: Sums = field(default_factory=Sums)
    rest: Sums = field(default_factory=Sums)

    def add(self, new: Tensor, old: Tensor, massive_T: Tensor) -> None:
        """Take the tokens (T, D) of one sequence, as they are and as they were."""
        off_T = (new.double() - old.double()).square().sum(-1)
        of_T = old.double().square().sum(-1)
        for sums, mine_T in ((self.massive, massive_T), (self.rest, ~massive_T)):
            sums.add(Sums(float(off_T[mine_T].sum()), float(of_T[mine_T].sum()), int(mine_T.sum())))

    def join(self, other: Deviation) -> None:
        """Add that of other sequences."""
        self.massive.add(other.massive)
        self.rest.add(other.rest)


class Kept(PerSequence):
    """The tokens of every sequence, as they are."""

    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one sequence."""
        self.rows[where.sequence] = h_TD.detach().clone()


class Off(PerSequence):
    """How far the tokens of every sequence are from those of another pass.

    Args:
        clean: sequence -> (T, D) tokens of that pass.
        massive: which positions are massive.
    """

    def __init__(self, clean: Mapping[int, Tensor], massive: MassiveTokens) -> None:
        super().__init__()
        self.clean, self.massive = clean, massive

    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the tokens (T, D) of one sequence."""
        found, mine = Deviation(), self.massive.of.get(where.sequence, {})
        massive_T = torch.tensor([p in mine for p in where.rows(len(h_TD)).tolist()], device=h_TD.device)
        found.add(h_TD, self.clean[where.sequence], massive_T)
        self.rows[where.sequence] = found


@dataclass
class Propagated:
    """Deviations of whole schemes, measured in the passes that their loss is of; see `massact.interventions.watchers`.

    Args:
        stack: whose layers.
        massive: which positions are massive.
        layers: name of the scheme -> layer -> deviation of resid_post.
    """

    stack: str
    massive: MassiveTokens
    layers: dict[str, dict[int, Deviation]] = field(default_factory=dict)
    _clean: dict[Site, Mapping[int, Tensor]] = field(default_factory=dict)

    def probes(self, model: Model, edit: str | None) -> list[Probe]:
        """What has to be seen of a pass: without an edit, or under one."""
        sites = _ends(model, self.stack)
        if edit is None:
            return [Probe(CLEAN, str(s), Kept) for s in sites]
        return [Probe(OFF, str(s), partial(Off, self._clean[s], self.massive)) for s in sites if s in self._clean]

    def take(self, edit: str | None, seen: Measurements) -> None:
        """Keep what was seen."""
        if edit is None:
            self._clean = {s: seen.statistics[CLEAN, s].rows for s in seen.sites(CLEAN)}  # type: ignore[attr-defined]
            return
        mine = self.layers.setdefault(edit, {})
        for site in seen.sites(OFF):
            for found in seen.result(OFF, site).values():
                mine.setdefault(site.layer, Deviation()).join(found)


@dataclass
class Local:
    """Deviations of one site: of the block's end, and entries that became 0.

    Args:
        zeroed, entries: of tokens that are not massive, entries that became 0; all that were not 0.
    """

    deviation: Deviation = field(default_factory=Deviation)
    zeroed: int = 0
    entries: int = 0

    @property
    def zeroed_rate(self) -> float:
        """Share of the entries that became 0; NaN where none was counted."""
        return self.zeroed / self.entries if self.entries else float("nan")


def local_deviations(
    ready: Prepared, corpus: Corpus, schemes: Sequence[Scheme], progress: Callable[[], None]
) -> dict[tuple[str, Site], Local]:
    """(name of the scheme, site) -> what rounding at that site alone does, all else in full precision.

    One pass for each scheme and point: behind every block the hidden state is put back to what it is in full
    precision, so that no block sees what another did.
    """
    found: dict[tuple[str, Site], Local] = {}
    for batch in corpus.batches(1):
        batch = batch.to(ready.model.device)
        clean = _clean(ready, batch)
        for scheme in schemes:
            for target in dict.fromkeys(p.target for p in scheme.parts if p.target != "weights"):
                edits = _reset(ready, scheme, target, batch, (clean, found))
                if edits is not None:
                    _run(ready.model, batch, edits)
                progress()
    return found


def _clean(ready: Prepared, batch: Batch) -> dict[int, Tensor]:
    """layer -> (B, T, D) of a pass in full precision."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor, Batch], Tensor]:
        def apply(h: Tensor, _: Batch) -> Tensor:
            kept[layer] = h.detach().clone()
            return h

        return apply

    _run(
        ready.model,
        batch,
        Together(CLEAN, tuple(Edit(CLEAN, str(s), keep(s.layer)) for s in _ends(ready.model, ready.stack))),
    )
    return kept


def _ends(model: Model, stack: str) -> list[Site]:
    """Where the blocks of a stack end."""
    return [s for s in model.anatomy.sites() if s.stack == stack and s.point == "resid_post" and s.layer]


def _reset(ready: Prepared, scheme: Scheme, target: str, batch: Batch, state: tuple[Any, Any]) -> Together | None:
    """One target of a scheme in every block, each of which begins as it does in full precision."""
    clean, found = state
    one = Scheme(scheme.name, tuple(p for p in scheme.parts if p.target == target), scheme.exempt, scheme.rotated,
                 scheme.smooth, scheme.smooth_sites, scheme.insert)  # fmt: skip
    parts: list[SingleEdit] = []
    at: dict[int, list[Site]] = {}
    made: list[tuple[Site, SingleEdit | None]]
    if target in ("k", "v"):
        made = [(s, cache_edit(ready, one, s)) for s in ready.calls()]
    else:
        sites = [s for s in ready.linears.widths if point_of(s) == target]
        made = [(s, _counted(ready, one, s, found)) for s in sites]
    for site, edit in made:
        if edit is not None:
            parts.append(edit)
            if primary(site) == site:
                at.setdefault(site.layer, []).append(site)
    if not parts:
        return None
    ends = [Edit(scheme.name, str(s), _put_back(ready, scheme.name, target, clean[s.layer], at.get(s.layer, []), found))
            for s in _ends(ready.model, ready.stack)]  # fmt: skip
    return Together(scheme.name, (*parts, *ends))


def _counted(ready: Prepared, scheme: Scheme, site: Site, found: dict[tuple[str, Site], Local]) -> Edit | None:
    """The edit of a site, which also counts what became 0."""
    edit = site_edit(ready, scheme, site)
    if edit is None:
        return None

    def apply(h: Tensor, batch: Batch) -> Tensor:
        new = edit.apply(h, batch)
        if primary(site) != site:
            return new
        local = found.setdefault((scheme.name, site), Local())
        n = len(batch.sequences)
        old_BTF, new_BTF = h.reshape(n, -1, h.shape[-1]), new.reshape(n, -1, h.shape[-1])
        counts_BT, cluster_BT = (x.to(h.device) for x in ready.massive.rows(batch, old_BTF.shape[1]))
        rest_BT = counts_BT & (cluster_BT < 0)
        had = old_BTF[rest_BT] != 0
        if not scheme.rotated:  # what is 0 where it is rotated is not 0 behind
            local.entries += int(had.sum())
            local.zeroed += int((had & (new_BTF[rest_BT] == 0)).sum())
        return new

    return Edit(edit.name, edit.site, apply)


def _put_back(
    ready: Prepared, name: str, target: str, clean_BTD: Tensor, sites: list[Site], found: dict[tuple[str, Site], Local]
) -> Callable[[Tensor, Batch], Tensor]:
    """Measure how far a block's end is off, and put it back."""

    def apply(h: Tensor, batch: Batch) -> Tensor:
        old = clean_BTD.reshape(len(batch.sequences), -1, h.shape[-1])
        new = h.reshape(old.shape)
        counts_BT, cluster_BT = (x.to(h.device) for x in ready.massive.rows(batch, old.shape[1]))
        for site in sites:
            key = name, Site(site.stack, site.layer, target if target in ("k", "v") else site.point)
            local = found.setdefault(key, Local())
            for b in range(len(old)):
                kept = counts_BT[b]
                local.deviation.add(new[b, kept], old[b, kept], cluster_BT[b, kept] >= 0)
        return clean_BTD.clone()

    return apply


def _run(model: Model, batch: Batch, edit: Together) -> None:
    """One pass under an edit, as far as the last block."""
    with torch.inference_mode(), observing(model, (), [edit], batch=batch, lenient=("edits",)) as seen:
        model.run(batch.inputs, places=seen.places)
