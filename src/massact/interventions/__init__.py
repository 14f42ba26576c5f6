"""What happens without massive activations: the catalogue of edits, and paired runs with and without them.

Takes a model, a corpus and the scan of it; gives an `Intervention`. Knows what may be changed, and what a
fair comparison is: zero, mean, matched-random and shuffle side by side. Must not know how tensors are caught, nor how
results are drawn.
"""

from massact.interventions.catalogue import (
    QUARTET,
    clip,
    cut_attention,
    drop_first,
    everywhere,
    fixed,
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
from massact.interventions.job import intervene
from massact.interventions.massive_entries import Massive, exactly, massive
from massact.interventions.registers import CONTROLS, Registers, collect_registers, fix_registers, register_means
from massact.interventions.relocation import moved_neurons, register_neurons, test_time_registers
from massact.interventions.zero_shot import ZeroShot

__all__ = [
    "CONTROLS",
    "QUARTET",
    "Massive",
    "Paired",
    "Registers",
    "ZeroShot",
    "clip",
    "collect_registers",
    "cut_attention",
    "drop_first",
    "evaluate",
    "everywhere",
    "exactly",
    "fix_registers",
    "fixed",
    "intervene",
    "massive",
    "matched_random",
    "mean",
    "moved_neurons",
    "norm_dims",
    "register_means",
    "register_neurons",
    "remove_direction",
    "replace_first",
    "scale",
    "shuffle",
    "super_weights",
    "test_time_registers",
    "zero",
    "zero_dims",
]
