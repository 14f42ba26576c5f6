"""Massive entries: which ones a scan means, and how they are found again in any input.

A massive activation is found again by its dim, the class of its token, and a cut on |h|: half of the smallest finding
at that dim. So an edit made from a scan works on other texts, other lengths and other batches. It takes all that reach
the cut: of an outlier feature, which has values of all sizes, more entries than the findings. `exactly` takes the
findings alone.

Shapes: B batch, T tokens, D dims, J massive dims, C classes of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.corpora import Batch
from massact.corpora.masks import first_kept
from massact.records.clusters import KEYS, alike, clusters_table, passing
from massact.records.errors import UserError, near
from massact.records.kinds.scan import ScanResult
from massact.records.sites import Site

CUT = 0.5  # of the smallest finding at a dim
CLASSES = ("start", "delimiter", "other")  # of tokens; padding is edited like other frames


@dataclass(frozen=True)
class Massive:
    """How to find the massive activations of one layer again.

    Args:
        site: where.
        dims, cuts: (J,) an entry is massive if |h| at one of these dims reaches its cut, on a token of a class that has
            findings at that dim.
        means: class of tokens ("start", "delimiter", "other") -> (J,) mean values: the constants of set-to-mean; NaN
            where a class has no finding at a dim: none of its entries is massive, no other class' mean stands in.
        values: the same -> J arrays of all values found: what a shuffle draws from.
        only: (sequence, position, dim) of the entries that are massive, whatever the cuts say; None: the cuts say it.
        delimiters: ids of tokens that are delimiters; where there are none, all but the first are "other".
        reads: the input that holds the ids of that stack's tokens.
    """

    site: Site
    dims: tuple[int, ...]
    cuts: tuple[float, ...]
    means: Mapping[str, tuple[float, ...]]
    values: Mapping[str, tuple[tuple[float, ...], ...]]
    only: frozenset[tuple[int, int, int]] | None = None
    delimiters: frozenset[int] = frozenset()
    reads: str = "input_ids"

    @property
    def pairs(self) -> list[tuple[int, str]]:
        """(dim, class of tokens) that has findings; where none are recorded, of every class."""
        of = self.values or dict.fromkeys(CLASSES, ((0.0,),) * len(self.dims))
        return [(d, c) for c, pools in of.items() for d, pool in zip(self.dims, pools, strict=True) if pool]

    def mask(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        """Which entries at the dims are massive: (B, T, J) bool.

        Raises:
            UserError: of `only`, when the rows are not the sequences, or one is too short for its entries; where
                delimiters have to be told apart, when the inputs have no ids.
        """
        if self.only is not None:
            return self._placed(h_BTD, batch)
        return self.entries(h_BTD, None if self.all_classes else self.classes(h_BTD, batch))

    @property
    def all_classes(self) -> bool:
        """Whether tokens of every class have findings at every dim, so that classes need not be told."""
        return len(self.pairs) == len(CLASSES) * len(self.dims)

    def entries(self, h_BTD: Tensor, class_BT: Tensor | None) -> Tensor:
        """Which entries at the dims reach their cut, on tokens of these classes: (B, T, J) bool."""
        cuts_J = torch.tensor(self.cuts, device=h_BTD.device, dtype=torch.float32)
        large_BTJ = h_BTD[..., list(self.dims)].abs().float() >= cuts_J
        if class_BT is None:
            return large_BTJ
        pairs = set(self.pairs)
        having_CJ = torch.tensor([[(d, c) in pairs for d in self.dims] for c in CLASSES], device=h_BTD.device)
        return large_BTJ & having_CJ[class_BT]

    def classes(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        """The class of every token, as its place in `CLASSES`: (B, T) int64.

        Raises:
            UserError: delimiters have to be told apart, and the inputs have no ids of these tokens.
        """
        return self.classes_of(starts(h_BTD, batch), batch.inputs.get(self.reads))

    def classes_of(self, first_BT: Tensor, ids_BT: Tensor | None) -> Tensor:
        """The same, of tokens whose ids and first ones are known; see `classes`."""
        class_BT = torch.full(first_BT.shape, CLASSES.index("other"), device=first_BT.device)
        if self.delimiters:
            if ids_BT is None or ids_BT.shape != first_BT.shape:
                raise UserError(f"Which tokens are delimiters cannot be told at {self.site}.",
                                f"The inputs have no {self.reads} of these {first_BT.shape[-1]} tokens.",
                                "Give ids, or edit exactly the findings.")  # fmt: skip
            known = torch.tensor(sorted(self.delimiters), device=ids_BT.device)
            class_BT[torch.isin(ids_BT, known).to(class_BT.device)] = CLASSES.index("delimiter")
        return class_BT.masked_fill(first_BT, CLASSES.index("start"))

    def _placed(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        what = f"The findings at {self.site} cannot be edited one by one here."
        if h_BTD.ndim != 3 or len(h_BTD) != len(batch.sequences):
            raise UserError(what, f"{tuple(h_BTD.shape)} has not one row for each of {len(batch.sequences)} sequences.",
                            "Use their cut in place of exactly the findings.")  # fmt: skip
        row_of, T = {s: b for b, s in enumerate(batch.sequences)}, h_BTD.shape[1]
        at = [(row_of[s], pos - batch.past, self.dims.index(d)) for s, pos, d in self.only or () if s in row_of]
        if not batch.past and any(t >= T for _, t, _ in at):
            raise UserError(what, f"They are at positions up to {max(t for _, t, _ in at)}, of {T} tokens.",
                            "Run the text that was scanned, or use their cut.")  # fmt: skip
        mask_BTJ = torch.zeros(len(h_BTD), T, len(self.dims), dtype=torch.bool)
        for place in at:
            if 0 <= place[1] < T:  # behind a cache only some positions are here
                mask_BTJ[place] = True
        return mask_BTJ.to(h_BTD.device)


def massive(
    findings: pd.DataFrame, layer: int | str = "onset", stack: str | None = None, clusters: pd.DataFrame | None = None
) -> Massive:
    """How to find again what a scan found at one layer; see `meant`, which also says what is refused."""
    return target_of(meant(findings, layer, stack, clusters))


def massive_everywhere(
    findings: pd.DataFrame, stack: str | None = None, clusters: pd.DataFrame | None = None
) -> tuple[Massive, ...]:
    """How to find again what `meant` means, at every layer that has findings of it."""
    return targets_of(meant(findings, "all", stack, clusters))


def meant(
    findings: pd.DataFrame, layer: int | str = "onset", stack: str | None = None, clusters: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The findings that an edit is about: of the largest cluster, and of those of the same label that are there too.

    Where it is a massive activation, the other massive activations of that layer are edited with it (they are written
    together), and outlier features and humps are not.

    Args:
        findings: the table of a scan.
        layer: a layer: all of its findings are meant; "onset": that of the largest cluster (of a hump: where it first
            passes); "all": every layer of these
            clusters.
        stack: of several, which; None: the one with most findings, of those that the clusters are of.
        clusters: the table of the same scan, or the rows of it to choose from; None: made of the findings.

    Raises:
        UserError: there are no findings of single entries there.
    """
    known = findings[findings.dim >= 0]
    if not len(known):
        raise UserError("The scan has no massive activations to intervene on.",
                        do="Scan with a lower --threshold, or with another --criterion; registers=HOW, cut-first, "
                        "drop-first, replace-first=TOKEN and weight=NAME[R,C] ask for none.")  # fmt: skip
    if clusters is not None and layer in ("onset", "all"):
        having = pd.MultiIndex.from_frame(passing(clusters)[["stack", "site"]])
        known = known[pd.MultiIndex.from_frame(known[["stack", "site"]]).isin(having)]
    name = stack if stack is not None else str(known["stack"].value_counts().index[0])
    mine = known[known["stack"] == name]
    if not len(mine):
        raise UserError(f"Stack {name!r} has no findings to intervene on.", do=near(name, map(str, set(known["stack"])),
                        "Stacks that have"))  # fmt: skip
    site = str(mine["site"].value_counts().index[0]) if len(mine) else "resid_post"
    mine = mine[mine["site"] == site]
    at = str(layer)
    if at in ("onset", "all") and len(mine):
        table = clusters_table(mine) if clusters is None else clusters
        table = alike(passing(table[(table["stack"] == name) & (table["site"] == site)]))
        mine = _of_clusters(mine, table)
        onset = int(table["onset"].iloc[0])
        there = mine["layer"] == onset  # a hump may be near its threshold for layers before it passes
        at = at if at == "all" or not len(mine) else str(onset if there.any() else mine["layer"].min())
    here = mine if at == "all" else mine[mine.layer == int(at)] if at.isdecimal() else mine.iloc[:0]
    if not len(here):
        layers = ", ".join(str(x) for x in sorted(mine.layer.unique())) or "none"
        whose = f" of stack {name!r}" if name else ""
        raise UserError(f"Layer {layer}{whose} has no findings.", do=f"Layers that have: {layers}.")
    return here


def in_all_streams(chosen: pd.DataFrame, scan: ScanResult) -> pd.DataFrame:
    """The same dims and classes of tokens in every stream of a model that has several; else what was chosen.

    One stream alone is no ablation: the others carry the value on. What blocks read of them follows, and is edited too.
    """
    mine, known = str(chosen["stack"].iloc[0]), scan.info.model.get("streams") or {}
    together = next(([reads, *held] for reads, held in known.items() if mine in (reads, *held)), None)
    if together is None:
        return chosen
    keys = ["layer", "site", "dim", "position_class"]
    found = scan.findings[scan.findings["stack"].isin(together)]
    return found[found.set_index(keys).index.isin(chosen.set_index(keys).index)]


def targets_of(findings: pd.DataFrame) -> tuple[Massive, ...]:
    """How to find some findings again: one target for each layer and stack."""
    return tuple(target_of(rows) for _, rows in findings.groupby(["layer", "stack"]))


def _of_clusters(findings: pd.DataFrame, clusters: pd.DataFrame) -> pd.DataFrame:
    """The findings of some clusters: of their dims and classes, at their layers."""
    both = findings.reset_index().merge(clusters[[*KEYS, "first", "last"]], on=KEYS)
    inside = both[(both["layer"] >= both["first"]) & (both["layer"] <= both["last"])]
    return findings.loc[inside["index"].drop_duplicates()]


def class_of(findings: pd.DataFrame) -> pd.Series:
    """The class of tokens by which findings are edited: padding like other frames."""
    return findings.position_class.where(findings.position_class.isin(CLASSES), "other")


def pairs(findings: pd.DataFrame) -> list[tuple[int, str]]:
    """(dim, class of tokens) of findings."""
    return list(zip(findings.dim.astype(int), class_of(findings), strict=True))


def target_of(here: pd.DataFrame) -> Massive:
    """How to find some findings of one layer again: their dims, cuts, and of each class their means and values."""
    dims = tuple(int(d) for d in sorted(here.dim.unique()))
    of = class_of(here)
    values = {
        c: tuple(tuple(float(v) for v in here.loc[(of == c) & (here.dim == d), "value"]) for d in dims) for c in CLASSES
    }
    row = here.iloc[0]
    return Massive(
        Site(str(row["stack"]), int(row["layer"]), str(row["site"])),
        dims,
        tuple(CUT * float(here.loc[here.dim == d, "magnitude"].min()) for d in dims),
        {c: tuple(float(np.mean(v)) if v else float("nan") for v in per_dim) for c, per_dim in values.items()},
        values,
        delimiters=frozenset(int(i) for i in here.loc[of == "delimiter", "token_id"].unique() if i >= 0),
    )


def findings_at(findings: pd.DataFrame, at: Site) -> pd.DataFrame:
    """The findings of single entries at one place."""
    mine = (findings["stack"] == at.stack) & (findings["layer"] == at.layer) & (findings["site"] == at.point)
    return findings[mine & (findings["dim"] >= 0)]


def exactly(target: Massive, findings: pd.DataFrame) -> Massive:
    """The same constants, for exactly the entries that a scan found: all findings at that layer, and nothing else.

    For the sequences that were scanned: `edited(..., sequences=)` says which rows these are (nothing: counted from 0).

    Args:
        target: the layer, and its means and values.
        findings: the table of the scan, or some sequences of it.

    Raises:
        UserError: one is at a dim that the target does not have.
    """
    here = findings_at(findings, target.site)
    if strange := sorted(set(here.dim) - set(target.dims)):
        raise UserError(f"Findings at dims {strange} of {target.site} cannot be edited.",
                        f"The means are of findings at dims {list(target.dims)} only.",
                        "Estimate them on all sequences (--no-hold-out).")  # fmt: skip
    return replace(target, only=frozenset((int(s), int(p), int(d)) for s, p, d in
                                          zip(here.sequence, here.pos, here.dim, strict=True)))  # fmt: skip


def starts(h_BTD: Tensor, batch: Batch) -> Tensor:
    """Where the first position that counts is: (B, T) bool; nowhere behind a cache of earlier positions."""
    at = torch.zeros(h_BTD.shape[:2], dtype=torch.bool, device=h_BTD.device)
    if batch.past:
        return at
    first = first_kept(batch.inputs.get("attention_mask"), h_BTD.shape[1])
    rows = torch.arange(len(h_BTD), device=h_BTD.device)
    at[rows, 0 if first is None else first.to(h_BTD.device)] = True
    return at
