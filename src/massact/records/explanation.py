"""The result of an explanation, in memory and as files beside the scan that it explains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from massact.records.arrays import ATTENTION, read_arrays
from massact.records.notebooks import ShownInNotebooks
from massact.records.runinfo import jsonable
from massact.records.sidecars import Sidecar, read_sidecar, save_beside
from massact.records.tables import frame, read_table

EXPLAIN_TABLES = (
    "heads", "positions", "sinks", "axes", "trajectory", "decomposition", "writers", "neurons", "norm_weights",
)  # fmt: skip
PICTURED_TABLE = "patch_attention"  # missing where there are no patches
EXPLAIN_VERSION = 3  # 2: modality of the tokens; 3: means of attention are over the queries that can see the keys


@dataclass
class ExplainInfo(Sidecar):
    """The record of an explanation: explain.json.

    Args:
        attention: how the attention of each stack was seen, with the numbers of its proof.
        spectrum: per stack, the share of the mean state of the tokens with findings in the weakest directions of the
            unembedding, beside that of other tokens, or {"unavailable": reason}.
        closure: greatest error of the account of all writes, relative to the peak value.
    """

    attention: dict[str, Any] = field(default_factory=dict)
    spectrum: dict[str, Any] = field(default_factory=dict)
    closure: dict[str, float] = field(default_factory=dict)
    schema_version: int = EXPLAIN_VERSION

    def unseen_layers(self, stack: str) -> list[int]:
        """Layers whose own attention could not be seen, of a stack in which others' could: no number is about them."""
        record = self.attention.get(stack)
        layers = record.get("unseen_layers") if isinstance(record, dict) else None
        return sorted({x for x in layers if type(x) is int}) if isinstance(layers, list) else []


@dataclass(repr=False)
class Explanation(ShownInNotebooks):
    """Why massive activations are there, and what they do to attention.

    Args:
        info: what was asked and how.
        heads, positions, sinks, axes, trajectory, decomposition, writers, neurons, norm_weights: tables, see
            `massact.records.tables`.
        patch_attention: table, of image models only.
        maps: of one prompt, "logits" and "probs" (P, T, T), means over heads; "layers" (P,); "tokens" (T,); "stack".
    """

    info: ExplainInfo
    heads: pd.DataFrame = field(default_factory=lambda: frame("heads"))
    positions: pd.DataFrame = field(default_factory=lambda: frame("positions"))
    sinks: pd.DataFrame = field(default_factory=lambda: frame("sinks"))
    axes: pd.DataFrame = field(default_factory=lambda: frame("axes"))
    trajectory: pd.DataFrame = field(default_factory=lambda: frame("trajectory"))
    decomposition: pd.DataFrame = field(default_factory=lambda: frame("decomposition"))
    writers: pd.DataFrame = field(default_factory=lambda: frame("writers"))
    neurons: pd.DataFrame = field(default_factory=lambda: frame("neurons"))
    norm_weights: pd.DataFrame = field(default_factory=lambda: frame("norm_weights"))
    patch_attention: pd.DataFrame = field(default_factory=lambda: frame("patch_attention"))
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, directory: str | Path) -> Path:
        """Add the tables to a run directory; explain.json last, so that its presence speaks for the rest.

        Raises:
            UserError: the directory cannot be written.
        """
        tables = {name: getattr(self, name) for name in self._tables()}
        return save_beside(directory, "explain.json", self.info, tables, {"attention.npz": self.maps})

    def as_dict(self) -> dict[str, Any]:
        """Everything but the maps, as JSON-able records."""
        tables = {t: jsonable(getattr(self, t).to_dict(orient="records")) for t in self._tables()}
        return jsonable(asdict(self.info)) | tables

    def _tables(self) -> tuple[str, ...]:
        return (*EXPLAIN_TABLES, PICTURED_TABLE) if len(self.patch_attention) else EXPLAIN_TABLES


def open_explanation(directory: str | Path) -> Explanation | None:
    """Read the explanation in a run directory; None where there is none.

    Raises:
        UserError: it is damaged, or written by a newer massact.
    """
    path = Path(directory)
    info = read_sidecar(path / "explain.json", ExplainInfo, EXPLAIN_VERSION, "Explain the run again.")
    if info is None:
        return None
    tables = [t for t in (*EXPLAIN_TABLES, PICTURED_TABLE) if t != PICTURED_TABLE or (path / f"{t}.parquet").is_file()]
    return Explanation(
        info, **{t: read_table(path, t) for t in tables}, maps=read_arrays(path / "attention.npz", ATTENTION)
    )
