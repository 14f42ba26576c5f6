"""Advice: what each remedy saves, and which scheme other libraries are told to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from massact.interventions.effects import Paired
from massact.quantisation.exports import exports_of, recipe_of
from massact.quantisation.schemes import SITES, Scheme, scheme
from massact.records.verdicts import HARMLESS
from massact.stats.intervals import mean_interval

if TYPE_CHECKING:
    from massact.quantisation.job import Work

REMEDIES: dict[str, tuple[str, Any]] = {
    "exempt": ("exempt", False), "hadamard": ("rotated", False), "smooth": ("smooth", None),
    "insert": ("insert", False), "slots": ("slots", False), "super": ("super_weights", False),
}  # fmt: skip
NO_FILES = "none"


def remedies(known: Mapping[Scheme, Paired]) -> list[dict[str, object]]:
    """Rows of the table `remedies`: pairs of schemes that differ in one remedy alone, over the same sequences.

    Args:
        known: scheme -> the run that its loss is of; its loss is that beyond full precision of the same run.
    """
    rows: list[dict[str, object]] = []
    for after in known:
        for remedy, (field, off) in REMEDIES.items():
            if getattr(after, field) == off:
                continue
            changed: dict[str, Any] = {field: off}
            bare = _alike(replace(after, **changed))
            name = "smooth-all" if remedy == "smooth" and after.smooth_sites == SITES else remedy
            rows += [row for before in known if _alike(before) == bare
                     if (row := _saved(known, before, after, name)) is not None]  # fmt: skip
    return rows


def _alike(one: Scheme) -> Scheme:
    """A scheme without its name, and without sites of a smoothing that it does not have."""
    return replace(one, name="", smooth_sites=() if one.smooth is None else one.smooth_sites)


def _saved(known: Mapping[Scheme, Paired], before: Scheme, after: Scheme, remedy: str) -> dict[str, object] | None:
    """How much less is lost with a remedy; None where the two runs are not of the same sequences."""
    losses = [paired.edited[one.name]["nll"] - paired.baseline["nll"]
              for one, paired in ((one, known[one]) for one in (before, after))
              if "nll" in paired.edited.get(one.name, {})]  # fmt: skip
    if len(losses) < 2 or len(losses[0]) != len(losses[1]):
        return None
    weights = known[before].n_targets
    saved = mean_interval(losses[0] - losses[1], weights)
    return {
        "scheme": before.name, "remedy": remedy, "remedied": after.name,
        "before_nats": float(np.average(losses[0], weights=weights)),
        "after_nats": float(np.average(losses[1], weights=weights)), "saved_nats": float(saved.estimate),
        "saved_low": float(saved.low), "saved_high": float(saved.high), "n_sequences": len(losses[0]),
    }  # fmt: skip


def recommended(
    work: Work, schemes: Sequence[Scheme], found: pd.DataFrame, prefix: tuple[int, ...]
) -> tuple[str, dict[str, str], list[str]]:
    """The scheme that other libraries are told to run, files for them, name -> text; and why some are not there.

    Args:
        found: the table `quantised`.
        prefix: ids of what was folded; of schemes with slots alone.
    """
    asked = work.config.export
    if asked == NO_FILES:
        return "", {}, []
    chosen = scheme(asked) if asked is not None else _chosen(schemes, found)
    if chosen is None:
        return (
            "",
            {},
            ["No recipe was written: no scheme that quantises weights was run. --export NAME writes that of any."],
        )
    ids = prefix if chosen.slots or chosen.exempt else ()
    return chosen.name, *exports_of(recipe_of(chosen, work.ready.linears, work.ready.model, ids))


def _chosen(schemes: Sequence[Scheme], found: pd.DataFrame) -> Scheme | None:
    """Of those with weights (no library quantises inputs alone) a harmless one, the least effort, the least loss."""
    rows = found[found["metric"] == "nll"].set_index("scheme")
    able = [s for s in schemes if s.weights is not None and s.name in rows.index]
    return min(
        able, default=None,
        key=lambda s: (rows.loc[s.name, "verdict"] != HARMLESS, s.effort, float(rows.loc[s.name, "delta_nats"])),
    )  # fmt: skip
