"""`classics`: run declared entries on a model and its text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pandas as pd

from massact.classics.attention_biases import ATTENTION_BIASES
from massact.classics.norm_growth import NORM_GROWTH
from massact.classics.norm_weights import NORM_WEIGHTS
from massact.classics.outlier_features import OUTLIER_FEATURES
from massact.classics.outlier_metrics import OUTLIER_METRICS
from massact.classics.rogue_dims import ROGUE_DIMS
from massact.classics.streaming import STREAMING
from massact.classics.token_classes import TOKEN_CLASSES
from massact.classics.works import Classic, Ground, Unavailable
from massact.models import with_attention
from massact.records.errors import UserError, near
from massact.records.kinds.classics import Classics, ClassicsInfo
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import jsonable
from massact.records.tables import frame
from massact.scans import scanned_inputs
from massact.verbs.classics import ClassicsConfig

CLASSICS: dict[str, Classic] = {
    c.name: c
    for c in (
        NORM_GROWTH,
        OUTLIER_FEATURES,
        OUTLIER_METRICS,
        STREAMING,
        ATTENTION_BIASES,
        ROGUE_DIMS,
        NORM_WEIGHTS,
        TOKEN_CLASSES,
    )
}


def check_which(options: ClassicsConfig) -> None:
    """Refuse a classic that there is not.

    Raises:
        UserError: says which are near.
    """
    for name in options.which:
        if name not in CLASSICS:
            raise UserError(f"There is no classic {name!r}.", do=near(name, CLASSICS))


def listed(call: Any) -> list[str]:
    """What --list prints: every entry with its source."""
    return [f"{entry.name:<18} {entry.asks} ({entry.source})" for entry in CLASSICS.values()]


def classics(
    model: Any,
    corpus: Any,
    scan: ScanResult,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Classics:
    """What the works that the paper grew from find on a model.

    Args:
        model: the scanned model; loaded, or anything that `load` takes.
        corpus: what was scanned; None makes it again from the scan's record.
        scan: its result; it need not have findings.
        progress: called with (stage, entries done, entries in all).
        **options: see `ClassicsConfig`.

    Raises:
        UserError: another model or text than the scan's, or a bad option.
    Source: Sun 2024, Section 2.3 and related work.
    """
    config, began = ClassicsConfig.of(options), time.perf_counter()
    check_which(config)
    loaded, ready = scanned_inputs(model, corpus, scan)
    loaded = with_attention(loaded)
    few = ready if config.n_sequences is None else ready.head(min(config.n_sequences, ready.n_sequences))
    ground = Ground(loaded, few, scan, config.batch_size, config.seed)
    info = ClassicsInfo.of(scan.info, config.record(), ready, few.n_sequences)
    tables: dict[str, list[dict[str, object]]] = {"classics": [], "classic_effects": []}
    chosen = config.which or tuple(CLASSICS)
    for i, name in enumerate(chosen, 1):
        entry = CLASSICS[name]
        info.sources[name] = entry.source
        try:
            outcome = entry.run(ground)
        except Unavailable as error:
            info.outcomes[name] = {"unavailable": error.what}
        else:
            info.outcomes[name] = jsonable(outcome.numbers)
            info.notes += [f"{name}: {note}" for note in outcome.notes]
            tables["classics"] += [{"classic": name} | r for r in outcome.rows]
            tables["classic_effects"] += [{"classic": name} | r for r in outcome.effects]
        if progress is not None:
            progress("classics", i, len(chosen))
    info.wall_s = time.perf_counter() - began
    made: dict[str, pd.DataFrame] = {name: frame(name, rows) for name, rows in tables.items()}
    return Classics(info, **made)
