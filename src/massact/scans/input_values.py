"""A scan told apart by a number of each sequence: the timestep of a diffusion model, the share of masked tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from massact.corpora import Corpus
from massact.records.errors import UserError, near
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats import HiddenResult

MOST_VALUES = 64
By = str | Mapping[str, Sequence[float]]


def values_by(by: By, corpus: Corpus) -> tuple[str, np.ndarray]:
    """The name of what sequences are told apart by, and its value for each of them (N,).

    Args:
        by: name of an input of the corpus, or one name with N numbers.

    Raises:
        UserError: no such input, not one number for each sequence, NaN, or more than `MOST_VALUES` different ones.
    """
    n, known = corpus.n_sequences, {k: v for k, v in corpus.inputs.items() if isinstance(v, torch.Tensor)}
    if isinstance(by, str):
        if by not in known:
            raise UserError(f"The corpus has no input {by!r}.", do=near(by, list(known)))
        name, values = by, known[by].double().cpu().numpy()
    elif len(by) == 1:
        ((name, numbers),) = by.items()
        values = np.asarray(numbers, float)
    else:
        raise UserError(f"Sequences cannot be told apart by {len(by)} things.", do="Give one name with its numbers.")
    values = values.reshape(n) if values.size == n else values
    if values.shape != (n,) or not np.isfinite(values).all():
        what = f"It has the shape {values.shape} for {n} sequences." if values.shape != (n,) else "Some are NaN or Inf."
        raise UserError(f"{name!r} is not one number for each sequence.", what, "Give (N,) numbers.")
    if (many := len(np.unique(values))) > MOST_VALUES:
        raise UserError(
            f"{name!r} has {many} different values.",
            f"A scan tells at most {MOST_VALUES} apart.",
            "Round it: by={'name': rounded numbers}.",
        )
    return name, values


def by_input_table(
    hidden: Mapping[Site, HiddenResult], findings: pd.DataFrame, name: str, values: np.ndarray
) -> pd.DataFrame:
    """The table `by_input`: of each value, each layer's greatest |h|, medians and findings, over its sequences.

    Args:
        hidden: what was measured at each site; findings: the table of the scan.
        name, values: from `values_by`; of the sequences of the corpus, (N,).
    """
    rows = []
    for site, r in hidden.items():
        here = findings[
            (findings["stack"] == site.stack) & (findings["site"] == site.point) & (findings["layer"] == site.layer)
        ]
        of_sequence = values[np.asarray(r.sequence)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = r.max / r.median
        for value in np.unique(values):
            mine, found = of_sequence == value, here[values[here["sequence"].to_numpy(int)] == value]
            if mine.any():
                rows.append(
                    {
                        "input": name, "value": value, "stack": site.stack, "site": site.point, "layer": site.layer,
                        "top1": r.max[mine].mean(), "median": r.median[mine].mean(), "ratio": ratio[mine].mean(),
                        "max": r.max[mine].max(), "n_findings": len(found), "n_sequences": int(mine.sum()),
                        "share": found["sequence"].nunique() / mine.sum(),
                        "dim": int(found.loc[found["magnitude"].idxmax(), "dim"]) if len(found) else -1,
                    }
                )  # fmt: skip
    return frame("by_input", rows)
