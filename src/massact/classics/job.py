"""`classics`: run declared entries on a model and its text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
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
from massact.models import Model, load, with_attention
from massact.records.errors import UserError, check_options, near
from massact.records.kinds.classics import Classics, ClassicsInfo
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import git_state, jsonable
from massact.records.tables import frame
from massact.scans import check_text, check_weights, scanned_corpus

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


@dataclass(frozen=True)
class ClassicsConfig:
    """The options of the classics.

    Args:
        which: names of entries; nothing: all.
        n_sequences: from the start of the corpus; None: all.
        batch_size: sequences per forward pass of paired runs.
        seed: of everything random.
    """

    which: tuple[str, ...] = ()
    n_sequences: int | None = None
    batch_size: int = 1
    seed: int = 0

    @classmethod
    def of(cls, options: dict[str, Any]) -> ClassicsConfig:
        """Options by name.

        Raises:
            UserError: an unknown option or entry (says which are near).
        """
        check_options("classics", options, {f.name for f in fields(cls)})
        config = cls(**options)
        for name in config.which:
            if name not in CLASSICS:
                raise UserError(f"There is no classic {name!r}.", do=near(name, CLASSICS))
        return config


def classics(
    model: Any,
    corpus: Any,
    scan: ScanResult,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Classics:
    """What the works that the paper grew from find on a model.

    Args:
        model: the scanned model; loaded, or anything that `load` takes.
        corpus: what was scanned; None makes it again from the scan's record.
        scan: its result; it need not have findings.
        progress: called with entries done and entries in all.
        **options: see `ClassicsConfig`.

    Raises:
        UserError: another model or text than the scan's, or a bad option.
    Source: Sun 2024, Section 2.3 and related work.
    """
    config, began = ClassicsConfig.of(options), time.perf_counter()
    loaded = model if isinstance(model, Model) else load(model)
    check_weights(loaded, scan)
    ready = scanned_corpus(loaded, corpus, scan)
    check_text(ready, scan)
    loaded = with_attention(loaded)
    few = ready if config.n_sequences is None else ready.head(min(config.n_sequences, ready.n_sequences))
    ground = Ground(loaded, few, scan, config.batch_size, config.seed)
    info = ClassicsInfo(
        config=jsonable(asdict(config)),
        model={k: scan.info.model.get(k) for k in ("id", "name", "weights_sha256")},
        corpus={"name": ready.name, "sha256": ready.sha256, "n_sequences": few.n_sequences},
        git=git_state(),
    )
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
            progress(i, len(chosen))
    info.wall_s = time.perf_counter() - began
    made: dict[str, pd.DataFrame] = {name: frame(name, rows) for name, rows in tables.items()}
    return Classics(info, **made)
