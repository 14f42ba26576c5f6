"""What happens without massive activations: the catalogue of edits, and paired runs with and without them.

Takes a model, a corpus and the scan of it; gives an `Intervention`. Knows what may be changed, and what a
fair comparison is: zero, mean, matched-random and shuffle side by side. Must not know how tensors are caught, nor how
results are drawn.
"""

from massact.interventions.catalogue import (
    QUARTET,
    Massive,
    clip,
    cut_attention,
    drop_first,
    everywhere,
    exactly,
    fixed,
    massive,
    matched_random,
    mean,
    norm_dims,
    remove_direction,
    replace_first,
    scale,
    shuffle,
    super_weights,
    zero,
    zero_dims,
)
from massact.interventions.effects import Paired, evaluate
from massact.interventions.job import InterveneConfig, intervene
from massact.interventions.saved_run import intervene_run
from massact.interventions.zero_shot import ZeroShot

__all__ = [
    "QUARTET",
    "InterveneConfig",
    "Massive",
    "Paired",
    "ZeroShot",
    "clip",
    "cut_attention",
    "drop_first",
    "evaluate",
    "everywhere",
    "exactly",
    "fixed",
    "intervene",
    "intervene_run",
    "massive",
    "matched_random",
    "mean",
    "norm_dims",
    "remove_direction",
    "replace_first",
    "scale",
    "shuffle",
    "super_weights",
    "zero",
    "zero_dims",
]
