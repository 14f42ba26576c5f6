"""What class token and patches of an image attend to: registers, massive patches, added tokens, the rest (E23)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from massact.positions import Layout
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats.shares import AttentionShares
from massact.trace import Measurements, Probe


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
