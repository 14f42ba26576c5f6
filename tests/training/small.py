"""A training of a second, for the tests."""

from __future__ import annotations

from typing import Any

from massact.training import TrainConfig

STEPS = 12


def small(**options: Any) -> TrainConfig:
    """Two layers, 12 steps of 4 windows of 16 tokens, a checkpoint every 4."""
    given = {
        "model.n_layer": 2, "model.n_embd": 32, "model.n_inner": 64, "model.n_positions": 16, "seq_len": 16, "batch": 4,
        "steps": STEPS, "warmup": 2, "decay_steps": 3, "log_every": 3, "save_every": 4, "eval_every": 6,
        "eval_windows": 8, "monitor_every": 5,
    }  # fmt: skip
    return TrainConfig.of("tiny", **given | options)
