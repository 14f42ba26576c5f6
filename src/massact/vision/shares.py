"""What the class token and the patches attend to: registers, massive patches, added tokens, the rest (E23)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from massact.corpora import Corpus
from massact.explanations import share_probes, shares_table
from massact.models import Model, with_attention
from massact.positions import Layout, layout_now, places_now
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.trace import measure


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
