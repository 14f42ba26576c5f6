"""Roundings: a scheme as an edit of a model, with all that its scales, rotations and constants are made of.

Shapes: B rows of a batch, T positions, F features, N tokens that are quantised, O outputs, K key-value heads, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from massact.anatomy.discovery import run_example
from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.quantisation.linears import Linears, by_rows, point_of, primary
from massact.quantisation.massive_tokens import MassiveTokens
from massact.quantisation.number_formats import Format, fake_quantised
from massact.quantisation.ranges import Look, Ranges
from massact.quantisation.rotations import Rotation, rotation
from massact.quantisation.schemes import Scheme
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.trace import Edit, KeyValueEdit, Probe, Together, WeightEdit, measure, observing
from massact.trace.edits import SingleEdit, check_keys

KEPT_BYTES = 1 << 31  # of quantised weights, all schemes together; beyond it they are made again for every batch
LEAST_SCALE = 1e-5  # of a smoothing scale


@dataclass
class Prepared:
    """A model, and what was measured once for all schemes.

    Args:
        model: with its attention calls found, where keys and values are quantised.
        stack: whose blocks are quantised.
        linears: of that stack.
        massive: the tokens of the corpus that are spared.
        ranges: site -> what a calibration saw.
        seed: of the Hadamard matrices.
        spared: weights that `super` keeps: parameter -> (row, column).
    """

    model: Model
    stack: str
    linears: Linears
    massive: MassiveTokens
    ranges: dict[Site, Ranges] = field(default_factory=dict)
    seed: int = 0
    spared: Mapping[str, list[tuple[int, int]]] = field(default_factory=dict)
    _turns: dict[int, Rotation] = field(default_factory=dict)
    _kept: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _heads: dict[Site, tuple[int, int]] = field(default_factory=dict)

    def turn(self, width: int) -> Rotation:
        """The rotation of a width."""
        if width not in self._turns:
            self._turns[width] = rotation(width, self.seed, self.model.device)
        return self._turns[width]

    def calls(self) -> list[Site]:
        """The attention calls whose keys and values are those of the blocks' own tokens."""
        known = self.model.anatomy.attentions
        return [s for s, place in known.items() if s.stack == self.stack and not place.cross]

    def heads(self) -> dict[Site, tuple[int, int]]:
        """Attention call -> width of a key and of a value of a head, seen in one short pass."""
        if not self._heads:
            edits = [KeyValueEdit("look", str(s), partial(_look, self._heads, s)) for s in self.calls()]
            with torch.inference_mode(), observing(self.model, (), edits, lenient=("edits", "sites")):
                run_example(self.model.module, self.model.example)
        return self._heads

    def turned_in_blocks(self) -> dict[int, int]:
        """width -> block, where there is no Hadamard matrix of the whole width."""
        return {width: turn.block for width, turn in self._turns.items() if turn.block < width}

    def kept(self, key: tuple[str, str], make: Callable[[], Tensor]) -> Tensor:
        """A quantised weight: as it was made before, where there is room for it."""
        if key in self._kept:
            return self._kept[key]
        made = make()
        if sum(t.nbytes for t in self._kept.values()) + made.nbytes <= KEPT_BYTES:
            self._kept[key] = made
        return made


def _look(
    held: dict[Site, tuple[int, int]], site: Site, k_BKSE: Tensor, v_BKSF: Tensor, _: Batch
) -> tuple[Tensor, Tensor]:
    held[site] = k_BKSE.shape[-1], v_BKSF.shape[-1]
    return k_BKSE, v_BKSF


def calibrate(
    ready: Prepared, corpus: Corpus, schemes: list[Scheme], counted: int, progress: Callable[..., None]
) -> Prepared:
    """Measure ranges, constants and histograms for all schemes in one pass over a corpus.

    Args:
        counted: sequences, from the start, whose entries are counted for predictions.
    """
    points = {site for scheme in schemes for site in scheme.sites}
    points |= {site for s in schemes if s.smooth is not None for site in s.smooth_sites}
    if not points:
        return ready
    sites = [s for s in ready.linears.widths if point_of(s) in points]
    looks = tuple(sorted({look for scheme in schemes for p in scheme.parts if p.target in points
                          if (look := look_of(scheme, p.form)) is not None}))  # fmt: skip
    turned = any(scheme.rotated for scheme in schemes)
    probes = [Probe("ranges", str(s), partial(_ranges, ready, looks, ready.turn(ready.linears.widths[s]) if turned else
                                              None, counted)) for s in sites]  # fmt: skip
    seen = measure(
        ready.model, corpus, probes, on_batch=lambda m: progress("calibrate", m.n_sequences, corpus.n_sequences)
    )
    return replace(ready, ranges={site: seen.result("ranges", site) for site in sites})


def _ranges(ready: Prepared, looks: tuple[Look, ...], turn: Rotation | None, counted: int) -> Ranges:
    return Ranges(ready.massive.of, len(ready.massive.clusters), looks, turn, frozenset(range(counted)))


def look_of(scheme: Scheme, form: Format) -> Look | None:
    """What has to be counted to predict how many entries a scheme rounds to 0; None where that is not predicted."""
    if form.smallest != form.smallest or scheme.smooth is not None:
        return None
    sharing = "static" if form.static or form.sharing == "none" else form.sharing
    return Look(scheme.rotated, scheme.spares, sharing, form.group)


def predicted_zeros(ready: Prepared, scheme: Scheme, site: Site, form: Format) -> float:
    """Share of the entries of tokens that are not massive that round to 0, from the calibration alone.

    |x| < c scale, with c half a step: of integers 1/2; NaN where it is not predicted.
    """
    look, ranges = look_of(scheme, form), ready.ranges.get(site)
    if look is None or ranges is None or form.sharing == "channel" and form.static:
        return float("nan")
    limit = form.smallest / form.steps
    if look.sharing == "static":
        limit = form.smallest if form.sharing == "none" else limit * float(ranges.amax[scheme.rotated, scheme.spares])
    return ranges.share_below(look, limit)


# ---------------------------------------------------------------------------------------------- activations
@dataclass(frozen=True)
class Rounding:
    """What a scheme does to the tokens of one site: T^-1 Q(T x), with T a rotation, a smoothing, or nothing.

    Args:
        form: the number format.
        turn: a rotation; smooth: (F,) of x / smooth.
        amax: of a static scale.
    """

    form: Format
    turn: Rotation | None = None
    smooth: Tensor | None = None
    amax: Tensor | None = None

    def __call__(self, x_NF: Tensor) -> Tensor:
        y = x_NF.float()
        y = y if self.smooth is None else y / self.smooth
        y = y if self.turn is None else self.turn(y)
        y = fake_quantised(y, self.form, self.amax)
        y = y if self.turn is None else self.turn.back(y)
        y = y if self.smooth is None else y * self.smooth
        return y.to(x_NF.dtype)


def rounding_at(ready: Prepared, scheme: Scheme, site: Site) -> Rounding | None:
    """The rounding of a scheme at one site; None where it leaves it as it is.

    Raises:
        WorkError: a static scale or a smoothing of a site that the calibration did not see.
    """
    form = scheme.form(point_of(site))
    if form is None or (site.layer, point_of(site)) in scheme.skipped:
        return None
    turn = ready.turn(ready.linears.widths[site]) if scheme.rotated else None
    smooth = smoothing(ready, scheme, site)
    return Rounding(form, turn, smooth, _static(ready, scheme, site, form, smooth) if form.static else None)


def _static(ready: Prepared, scheme: Scheme, site: Site, form: Format, smooth: Tensor | None) -> Tensor:
    ranges = ready.ranges.get(site)
    if ranges is None or (scheme.rotated, scheme.spares) not in ranges.amax:
        raise WorkError(f"No static scale of {site} was measured.", "The calibration saw no token there that counts.")
    if smooth is not None or form.sharing == "channel":  # never rotated, see `Scheme.check`
        channels = ranges.channels[scheme.spares] / (1.0 if smooth is None else smooth)
        return channels if form.sharing == "channel" else channels.amax()
    return ranges.amax[scheme.rotated, scheme.spares]


def smoothing(ready: Prepared, scheme: Scheme, site: Site) -> Tensor | None:
    """SmoothQuant's scales of a site (F,): amax_x^a / amax_w^(1 - a), of all matrices that read it; None: none there.

    Source: Xiao et al. 2022, arXiv 2211.10438.
    """
    site = primary(site)
    if scheme.smooth is None or point_of(site) not in scheme.smooth_sites or site not in ready.ranges:
        return None
    modules = [ready.model.module.get_submodule(name) for name in ready.linears.readers[site]]
    if not modules:
        return None
    if scheme.spares not in ready.ranges[site].channels:
        raise WorkError(f"No range of {site} was measured.", "The calibration saw no token there that counts.")
    greatest = [w.abs().amax(0) for m in modules for w in [_rows(m)]]
    x_F, w_F = ready.ranges[site].channels[scheme.spares], torch.stack(greatest).amax(0)
    return (x_F.clamp(min=LEAST_SCALE) ** scheme.smooth / w_F.clamp(min=LEAST_SCALE) ** (1 - scheme.smooth)).clamp(
        min=LEAST_SCALE)  # fmt: skip


def _rows(module: Any) -> Tensor:
    """The weight of a matrix as (outputs, inputs), float32."""
    weight = module.weight.detach().float()
    return weight if by_rows(module) else weight.T


def site_edit(ready: Prepared, scheme: Scheme, site: Site) -> Edit | None:
    """What a scheme does at one site, as an edit; None where it does nothing there."""
    rounding = rounding_at(ready, scheme, site)
    if rounding is None:
        return None
    template = ready.ranges[site].template() if scheme.insert and site in ready.ranges else None

    def apply(h: Tensor, batch: Batch) -> Tensor:
        n, width = len(batch.sequences), h.shape[-1]
        x_BTF = h.reshape(n, -1, width)
        counts_BT, cluster_BT = (x.to(h.device) for x in ready.massive.rows(batch, x_BTF.shape[1]))
        new = x_BTF.clone()
        for b in range(n):
            kept_T = counts_BT[b] & (cluster_BT[b] < 0) if scheme.spares else counts_BT[b]
            new[b, kept_T] = rounding(x_BTF[b, kept_T])
            if template is not None:
                for c in cluster_BT[b].unique().tolist():
                    if c >= 0 and bool(template[c].isfinite().all()):
                        new[b, cluster_BT[b] == c] = template[c].to(h.dtype)
        return new.reshape(h.shape)

    return Edit(f"{scheme.name} at {site}", str(site), apply)


# ---------------------------------------------------------------------------------------------- keys and values
def cache_edit(ready: Prepared, scheme: Scheme, site: Site) -> KeyValueEdit | None:
    """What a scheme does to the keys and values of one attention call; None where it leaves them."""
    forms = {p.target: p.form for p in scheme.cached if (site.layer, p.target) not in scheme.skipped}
    if not forms:
        return None

    def apply(k_BKSE: Tensor, v_BKSF: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        made = []
        counts_BT, cluster_BT = ready.massive.rows(batch, k_BKSE.shape[2])
        for target, x in (("k", k_BKSE), ("v", v_BKSF)):
            form = forms.get(target)
            if form is not None:
                x = x.clone()
                for b in range(len(x)):
                    kept_S = counts_BT[b] & (cluster_BT[b] < 0) if scheme.spares else counts_BT[b]
                    kept_S = kept_S.to(x.device)
                    x[b, :, kept_S] = Rounding(form, ready.turn(x.shape[-1]) if scheme.rotated else None)(
                        x[b, :, kept_S])  # fmt: skip
            made.append(x)
        return made[0], made[1]

    return KeyValueEdit(f"{scheme.name} at {site}", str(site), apply)


# ---------------------------------------------------------------------------------------------- weights
def weight_edits(ready: Prepared, scheme: Scheme) -> list[WeightEdit]:
    """Every matrix of the blocks in the format of a scheme, in the coordinates in which it is multiplied."""
    form = scheme.weights
    if form is None:
        return []
    site_of = {name: site for site, names in ready.linears.readers.items() for name in names}
    return [_weight_edit(ready, scheme, form, name, site_of.get(name)) for name in ready.linears.modules
            if (s := site_of.get(name)) is None or (s.layer, point_of(s)) not in scheme.skipped]  # fmt: skip


def _weight_edit(ready: Prepared, scheme: Scheme, form: Format, name: str, site: Site | None) -> WeightEdit:
    module = ready.model.module.get_submodule(name)
    rows = by_rows(module)
    smooth = None if site is None else smoothing(ready, scheme, site)
    turn = ready.turn(ready.linears.widths[site]) if scheme.rotated and site is not None else None
    spared = ready.spared.get(name, []) if scheme.super_weights else []

    def make(weight: Tensor) -> Tensor:
        w_OF = (weight if rows else weight.T).float()
        at = tuple(torch.tensor(x, device=w_OF.device) for x in zip(*spared, strict=True)) if spared else None
        given = w_OF if at is None else w_OF.index_put(at, w_OF.new_zeros(()))
        back = Rounding(form, turn, None if smooth is None else 1 / smooth)
        new = back(given)
        new = new if at is None else new.index_put(at, w_OF[at])
        return (new if rows else new.T).to(weight.dtype)

    def apply(weight: Tensor) -> Tensor:
        return ready.kept((scheme.name, name), lambda: make(weight))

    return WeightEdit(f"{scheme.name} of {name}", f"{name}.weight", apply)


# ---------------------------------------------------------------------------------------------- all of a scheme
def edit_of(ready: Prepared, scheme: Scheme, name: str | None = None) -> Together:
    """A scheme as one edit of the model.

    Raises:
        UserError: the model has nothing that it quantises, or groups that do not divide a width.
    """
    check_scheme(ready, scheme)
    sites = [s for s in ready.linears.widths if point_of(s) in scheme.sites]
    parts: list[SingleEdit] = [e for s in sites if (e := site_edit(ready, scheme, s)) is not None]
    if scheme.cached:
        parts += [c for s in ready.calls() if (c := cache_edit(ready, scheme, s)) is not None]
    parts += weight_edits(ready, scheme)
    if not parts and not scheme.skipped:
        raise UserError(f"The scheme {scheme.name!r} quantises nothing of this model.",
                        " ".join(ready.linears.notes()), "Choose other targets.")  # fmt: skip
    return Together(name or scheme.name, tuple(parts))


def check_scheme(ready: Prepared, scheme: Scheme) -> None:
    """Refuse groups that do not divide what they are of, and keys and values that cannot be reached.

    Raises:
        UserError: names the first place.
    """
    if scheme.cached:
        calls = {s: ready.model.anatomy.attentions[s] for s in ready.calls()}
        check_keys(KeyValueEdit(scheme.name, "", lambda k, v, _: (k, v)), calls)
        if not calls:
            why = next((w for s, w in ready.model.anatomy.no_attention.items() if s.stack == ready.stack), "")
            raise UserError(f"The scheme {scheme.name!r} quantises keys and values, and no attention is seen here.",
                            why, "Leave it out.")  # fmt: skip
    for part in scheme.parts:
        if part.target in ("k", "v") and part.form.block > 1:
            for call, widths in ready.heads().items():
                part.form.check(widths[part.target == "v"], f"a head of {part.target} of {call}")
        if part.target == "weights":
            for name in ready.linears.modules:
                module = ready.model.module.get_submodule(name)
                part.form.check(module.weight.shape[int(by_rows(module))], f"the weight of {name}")
        for site, width in ready.linears.widths.items():
            if point_of(site) == part.target:
                part.form.check(width, str(site))
