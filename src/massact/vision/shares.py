"""What the class token and the patches attend to: registers, massive patches, added tokens, the rest (E23).

Shapes: N images, H heads, R queries, C keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from massact.corpora import Corpus
from massact.models import Model, with_attention
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.stats.attended import Attended
from massact.stats.protocol import Where
from massact.trace import Probe, measure
from massact.vision.layout import Layout, layout_now, places_now

COLUMNS = ("layer", "query", "key", "mass", "n_images", "n_keys")
Groups = Mapping[str, Sequence[int]]


def groups_of(layout: Layout, massive: Sequence[int]) -> dict[str, list[int]]:
    """The tokens of one image by what they are. Empty groups are missing."""
    is_massive = set(massive)
    groups = {
        "class": list(layout.class_tokens),
        "registers": list(layout.registers),
        "massive": [p for p in layout.patches if p in is_massive],
        "added": list(layout.added),
        "patches": [p for p in layout.patches if p not in is_massive],
    }
    return {name: positions for name, positions in groups.items() if positions}


class AttentionShares:
    """Probability that each group of queries gives to each group of keys, mean over heads and queries.

    The keys of the largest group are not looked at: they have what the others leave. A slot that is no key (a learned
    sink) is a group of its own.

    Args:
        layout: of the tokens.
        massive: image -> positions of its massive patches.
    """

    def __init__(self, layout: Layout, massive: Mapping[int, Sequence[int]]) -> None:
        self.layout, self.massive = layout, massive
        self._rows: list[tuple[int, str, str, float, int]] = []

    @torch.no_grad()
    def update(self, a: Attended, where: Where) -> None:
        """Take one attention call of one image."""
        groups = groups_of(self.layout, self.massive.get(where.sequence, ()))
        looked = [name for name in groups if name != "patches"]
        keys_C = torch.tensor([p for name in looked for p in groups[name]], device=a.device, dtype=torch.long)
        mass_TC = a.probs(keys_C).mean(0).double()
        slot_T = None if a.slot_HT is None else a.slot_HT.mean(0).double()
        for query, rows in groups.items():
            begin, left = 0, 1.0
            for name in looked:
                width = len(groups[name])
                mass = float(mass_TC[rows, begin : begin + width].sum(1).mean())
                self._rows.append((where.sequence, query, name, mass, width))
                begin, left = begin + width, left - mass
            if slot_T is not None:
                self._rows.append((where.sequence, query, "slot", float(slot_T[rows].mean()), 1))
                left -= float(slot_T[rows].mean())
            if "patches" in groups:
                self._rows.append((where.sequence, query, "patches", left, len(groups["patches"])))

    def merge(self, other: AttentionShares) -> None:
        """Add what another one has seen."""
        self._rows.extend(other._rows)

    def result(self) -> list[tuple[int, str, str, float, int]]:
        """(image, group of queries, group of keys, mass, number of keys)."""
        return sorted(self._rows)

    def state(self) -> dict[str, np.ndarray]:
        """Attention statistics are not resumed: an interrupted pass begins again."""
        raise NotImplementedError("attention shares are not resumed half-way")

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Self:
        """See `state`."""
        raise NotImplementedError("attention shares are not resumed half-way")


def attention_shares(
    model: Model,
    corpus: Corpus,
    layout: Layout,
    massive: Mapping[int, Sequence[int]],
    *,
    batch_size: int | str = "auto",
) -> pd.DataFrame:
    """Attention of class token and patches to registers, massive patches, added tokens and the rest, in every layer.

    mass[query group, key group] = mean over heads and queries of sum over keys of p, then over images that have both.

    Args:
        layout: as read without edits.
        massive: image -> positions in that layout, see `outlier_patches`; inside `test_time_registers` those of the
            model without.

    Returns:
        Columns: layer, query, key (groups: "class", "registers", "massive", "added", "patches": all others, "slot"),
        mass, n_images, n_keys (mean). Over images that have both groups: the masses of one query group add up to 1
        within an image, not always in the table.

    Raises:
        UserError: attention is seen in none of the blocks.
    Source: Sun 2024, Fig. 13 and App. C.
    """
    seen = with_attention(model)
    head = f"{layout.stack}/" if layout.stack else ""
    sites = list(seen.anatomy.select_attention(f"{head}*.attention"))
    if not sites:
        first = next(iter(seen.anatomy.no_attention.items()), (Site(layout.stack, 1, "attention"), "not seen"))
        raise UserError("The attention of this model cannot be seen.", f"{first[0]}: {first[1]}.")
    now = layout_now(seen, corpus, layout)
    make: Any = partial(AttentionShares, now, {i: places_now(p, layout, now) for i, p in massive.items()})
    measured = measure(seen, corpus, [Probe("shares", str(s), make) for s in sites], batch_size=batch_size)
    parts = []
    for site in sites:
        rows = pd.DataFrame(measured.result("shares", site), columns=["image", "query", "key", "mass", "n_keys"])
        means = rows.groupby(["query", "key"], sort=False).agg(
            mass=("mass", "mean"), n_images=("image", "nunique"), n_keys=("n_keys", "mean"))  # fmt: skip
        parts.append(means.reset_index().assign(layer=site.layer))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]
