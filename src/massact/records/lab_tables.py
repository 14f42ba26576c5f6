"""The tables that the toy lab records. NaN: not there (an extra slot), never zero."""

from __future__ import annotations

LAB_TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "lab": {
        "variant": ("string", "attention variant"),
        "step": ("int64", "optimizer steps done"),
        "nats": ("float64", "held-out loss of all targets but those after BOS"),
        "backcopy_nats": ("float64", "of targets that repeat the token before a trigger; 0 is perfect"),
        "bigram_excess_nats": ("float64", "of all others, beyond the uncertainty of the chain; 0 is perfect"),
        "first_attention": ("float64", "weight on the first position of queries from 8 on, mean over all heads"),
        "first_attention_max": ("float64", "the same of the head with most"),
        "slot_mass": ("float64", "probability of the extra slot, or of a sink token, mean over all heads"),
        "norm_ratio": ("float64", "norm of the first state over the others' mean, greatest of those that are read"),
        "top1": ("float64", "greatest |h| after any block, in any sequence"),
        "ratio": ("float64", "greatest |h| / median |h|, mean over sequences, greatest of the blocks"),
        "wall_s": ("float64", "seconds since the start of this training"),
    },
    "lab_effects": {
        "variant": ("string", "attention variant"),
        "layer": ("int64", "the state after this block was edited"),
        "position": ("int64", "at this position: 0, or the ordinary one that it is compared with"),
        "edit": ("string", "zero, or mean (over the sequences)"),
        "targets": ("string", "far: predicted from position 13 on, the same for both; next: the 7 behind the position"),
        "baseline_nats": ("float64", "loss of these targets without the edit"),
        "delta_nats": ("float64", "its change"),
        "ci_low": ("float64", "95 % interval over sequences, of one training"),
        "ci_high": ("float64", "its upper end"),
        "cosine": ("float64", "of the state and its mean, mean over sequences: 1 for a constant"),
        "n_sequences": ("int64", "held-out sequences"),
    },
}  # fmt: skip
