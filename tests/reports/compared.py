"""Run directories with known numbers, for the tests of comparisons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import synthetic

from massact.records.kinds.explanation import ExplainInfo, Explanation
from massact.records.kinds.scan import ScanResult
from massact.records.kinds.training import Trained, TrainInfo
from massact.records.tables import frame

CONFIG = {"name": "tiny", "variant": "softmax", "seed": 0, "steps": 40, "seq_len": 16, "lr": 1e-3, "notes": []}


def heads(n_layers: int, mass: float, slot: float = math.nan, n_heads: int = 2) -> Any:
    """Two heads a layer, one `mass` more than its mean and one as much less; the first is a sink where mass > 0.3."""
    rows = []
    for layer in range(1, n_layers + 1):
        for head in range(n_heads):
            row = dict.fromkeys(
                ("mass_findings", "mass_random", "secondary", "entropy_nats", "value_norm_ratio"), math.nan
            )
            row |= {f"mass_{of}_uniform": math.nan for of in ("first", "findings", "random")}
            row |= dict.fromkeys(("update_stable_rank", "mass_diagonal", "mass_diagonal_uniform"), math.nan)
            sign = 1 if head else -1
            row |= {"stack": "", "layer": layer, "kind": "attention", "head": head, "module": f"h.{layer - 1}"}
            row |= {"mass_first": mass * (1 + 0.1 * sign), "alpha_first": mass, "sink_rate": float(mass > 0.3),
                    "value_norm_first": 0.5, "slot_mass": slot, "n_sequences": 8, "sink_type": ""}  # fmt: skip
            rows.append(row)
        # Cross attention is on another sequence: it must not count.
        rows.append(rows[-1] | {"kind": "cross_attention", "mass_first": 1.0, "sink_rate": 1.0, "slot_mass": 1.0})
    return frame("heads", rows)


def explanation(n_layers: int, mass: float, slot: float = math.nan, eps: float = 0.3) -> Explanation:
    return Explanation(ExplainInfo(config={"eps": eps}), heads=heads(n_layers, mass, slot))


def trained(loss: float = 3.0, weights: str = "", tokens: str = "abc", **config: Any) -> Trained:
    """A finished training whose held-out loss is `loss`."""
    info = TrainInfo(
        config=CONFIG | config, status="ok", model={"name": "tiny", "weights_sha256": weights},
        corpus={"tokens_sha256": tokens},
        losses={"step": 40, "tokens": 40 * 64, "train_loss": loss + 0.5, "eval_loss": loss},
    )  # fmt: skip
    rows = [
        {"step": s, "tokens": s * 64, "loss": 8.0 - s / 10, "eval_loss": loss if s == 40 else math.nan, "lr": 1e-3,
         "grad_norm": 1.0, "step_s": 0.1} for s in range(10, 41, 10)
    ]  # fmt: skip
    return Trained(info, frame("training", rows))


def write(path: Path, training: Trained | None, scan: ScanResult | None, explained: Explanation | None = None) -> Path:
    """A run directory: of the training with its scan in `scan`, or of the scan alone."""
    path.mkdir(parents=True)
    place = path
    if training is not None:
        training.save(path)
        place = path / "scan"
    if scan is not None:
        scan.save(place)
        if explained is not None:
            explained.save(place)
    return path


def six(folder: Path) -> list[Path]:
    """Two variants, three seeds each: softmax is massive in all, kv-bias in none."""
    paths = []
    for seed in range(3):
        scan = synthetic.massive(n_layers=12, span=(3, 11))
        scan.layers["max"] += 100.0 * seed
        paths.append(write(folder / f"softmax-s{seed}", trained(3.0 + seed / 10, seed=seed), scan,
                           explanation(12, 0.5 + seed / 10)))  # fmt: skip
    for seed in range(3):
        run = trained(3.1 + seed / 10, seed=seed, variant="kv-bias")
        paths.append(write(folder / f"kv-seed{seed}", run, synthetic.quiet(), explanation(12, 0.1, 0.6)))
    return paths


def overflowed() -> ScanResult:
    """A scan with NaN and infinity in its layers."""
    scan = synthetic.broken()
    scan.layers.loc[3, "top2"] = np.inf
    return scan
