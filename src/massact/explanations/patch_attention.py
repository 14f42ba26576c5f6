"""What class token and patches of an image attend to: registers, massive patches, added tokens, the rest (E23)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from massact.corpora import Corpus
from massact.models import Model, with_attention
from massact.positions import Layout, layout_now, places_now
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats.shares import AttentionShares
from massact.trace import Measurements, Probe, measure


def share_probes(sites: Sequence[Site], layout: Layout, massive: Mapping[int, Sequence[int]]) -> list[Probe]:
    """Probes on attention calls of one stack.

    Args:
        sites: of the calls.
        layout: of the tokens as the model runs now.
        massive: image -> positions of its massive patches in that layout.
    """
    groups = {"class": layout.class_tokens, "registers": layout.registers, "added": layout.added}
    make: Any = partial(AttentionShares, groups, layout.patches, massive)
    return [Probe("shares", str(site), make) for site in sites]


def shares_table(measured: Measurements) -> pd.DataFrame:
    """The table `patch_attention`: mass = mean over heads and queries of sum over keys of p, then over images."""
    names = ("query", "key", "mass", "n_images", "n_keys")
    return frame("patch_attention", [
        {"stack": site.stack, "layer": site.layer, **dict(zip(names, row, strict=True))}
        for site in measured.sites("shares") for row in measured.result("shares", site)
    ])  # fmt: skip


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
        The table `patch_attention`: columns stack, layer, query, key (groups: "class", "registers", "massive", "added",
        "patches": all others, "slot"), mass, n_images, n_keys (mean). Over images that have both groups: the masses of
        one query group add up to 1 within an image, not always in the table.

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
    moved = {image: places_now(positions, layout, now) for image, positions in massive.items()}
    return shares_table(measure(seen, corpus, share_probes(sites, now, moved), batch_size=batch_size))
