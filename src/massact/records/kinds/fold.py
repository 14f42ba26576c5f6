"""What folding did: the result of `massact fold`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from massact.records.kinds.intervention import TABLES as EFFECTS
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

FOLDER = "folded"
_HEADROOM: Columns = {
    f"headroom_{name}_{side}": ("float64", f"{limit} / max, {side}")
    for name, limit in (("fp16", "65,504"), ("bf16", "3.39e38"), ("fp8_e4m3", "448"))
    for side in ("before", "after")
}
TABLES: dict[str, Columns] = {
    "prefixes": {
        "prefix": ("string", "tokens in front, between bars; empty: none"),
        "ids": ("string", "their ids, with commas"),
        "part": ("string", "search (the texts to choose by) or held out"),
        "text_class": ("string", "text (as it was scanned), or what the texts begin with: word, digit, space, newline, "
                       "code, script (other than Latin), a delimiter, other"),
        "n_sequences": ("int64", "texts of that class"),
        "n_massive": ("int64", "of these, texts in which a token is massive; outlier features are not counted"),
        "n_findings": ("int64", "massive entries of all layers"),
        "greatest": ("float64", "greatest |h| of the layers below the last two"),
        "nll": ("float64", "mean loss of a token of the text, nats"),
        "delta_nll": ("float64", "its difference to the texts as they were scanned"),
        "ci_low": ("float64", "its 95 % interval over texts; NaN of one text"),
        "ci_high": ("float64", "its upper end"),
    },
    "fold_layers": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer; 0 is the embedding output"),
        "max_before": ("float64", "greatest |h| of the scan"),
        "max_after": ("float64", "greatest |h| of the folded model on the same text"),
        "findings_before": ("int64", "findings of the scan"),
        "findings_after": ("int64", "findings of the folded model"),
        **_HEADROOM,
        "massive_before": ("float64", "attention on the massive tokens in the block, mean over heads; NaN: no block"),
        "slots_after": ("float64", "attention on the slots in the folded model, mean over heads"),
        "n_sequences_before": ("int64", "sequences of the scan"),
        "n_sequences_after": ("int64", "sequences of the folded model"),
    },
    "fold_heads": {
        "layer": ("int64", "layer"),
        "head": ("int64", "0-based"),
        "massive_before": ("float64", "attention on the massive tokens, mean over queries and sequences"),
        "slots_after": ("float64", "attention on the slots of the folded model"),
    },
    "fold_effects": EFFECTS["effects"],
}  # fmt: skip


@dataclass
class FoldInfo(Sidecar):
    """The record of a fold: fold.json.

    Args:
        ids, tokens: of the prefix; lead: what stood in front of every text when it was scanned.
        positions: how the model counts them: relative, unsaid or table.
        proof: greatest error of a logit over the greatest logit, what was allowed, lengths, windows, tokens generated.
        cleared: whether no token of the texts is massive any more, those held out too.
        fails: (prefix, class of texts) in which a prefix that clears other texts leaves a massive token.
        before, after: findings and greatest |h| below the last two layers, of the text.
        stays: clusters of the folded model that pass: how they are called, their label, greatest |h|.
        pruned: super weights that were looked at, and whether they are zero in the folded model.
        files: what was written beside fold.json; empty where nothing was.
    """

    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    lead: list[int] = field(default_factory=list)
    positions: str = ""
    proof: dict[str, Any] = field(default_factory=dict)
    cleared: bool = False
    fails: list[list[str]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    stays: list[dict[str, Any]] = field(default_factory=list)
    pruned: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    schema_version: int = 1


@dataclass(repr=False)
class Fold(Result):
    """What folding did.

    Args:
        info: which prefix, the proof, what stays.
        prefixes: what every candidate gave on texts that begin with every class of token, see `TABLES`.
        fold_layers, fold_heads: before and after, by layer and by head.
        fold_effects: what slots, the prefix in front and super weights at zero do to losses of the same targets.
        model: the folded model, ready to be measured; None of one that was read from files.
        write: writes the folded model into a folder, and gives what a user of it must know.
    """

    KIND: ClassVar[str] = "fold"
    VERB: ClassVar[str] = "fold"
    FILE: ClassVar[str] = "fold.json"
    INFO: ClassVar[type[Any]] = FoldInfo
    TABLES: ClassVar = TABLES
    AGAIN: ClassVar[str] = "Fold the run again."
    PLACE: ClassVar[int] = 5

    info: FoldInfo
    prefixes: pd.DataFrame = table("prefixes")
    fold_layers: pd.DataFrame = table("fold_layers")
    fold_heads: pd.DataFrame = table("fold_heads")
    fold_effects: pd.DataFrame = table("fold_effects")
    model: Any = None
    write: Callable[[Path], list[str]] | None = None

    def save(self, directory: str | Path) -> Path:
        """Write its tables and fold.json; before them the folded model, into DIRECTORY/folded.

        Raises:
            UserError: the directory cannot be written.
            WorkError: the disk is full.
        """
        if self.write is not None:
            folder = Path(directory) / FOLDER
            self.info.notes += [note for note in self.write(folder) if note not in self.info.notes]
            self.info.files = [f"{FOLDER}/{name}" for name in sorted(p.name for p in folder.iterdir())]
        return super().save(directory)
