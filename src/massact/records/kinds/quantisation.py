"""What a model loses in low precision, and the part of massive activations in it: the result of a quantisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from massact.records.disk import write_atomic
from massact.records.errors import UserError
from massact.records.kinds.intervention import TABLES as EFFECTS
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

EXPORT = "export"  # folder of a run with what other libraries run
_SCHEME = "as --schemes names it"
_JUDGED = ("ci_low", "ci_high", "verdict", "n_needed", "delta_nats", "nats_low", "nats_high")  # as of every effect
TABLES: dict[str, Columns] = {
    "quantised": {
        "scheme": ("string", _SCHEME),
        "formats": ("string", "what is quantised and how: target: format by sharing, static where it is measured "
                              "before"),
        "rounded": ("string", "the formats alone: schemes of one such are compared"),
        "sharing": ("string", "what has one scale: tensor, token, channel, group, head, block, none; mixed"),
        "exempt": ("bool", "massive tokens pass as they are and count in no scale"),
        "rotated": ("bool", "by a Hadamard matrix"),
        "smoothed": ("float64", "strength of SmoothQuant; NaN: none"),
        "inserted": ("bool", "massive tokens are a constant vector"),
        "slots": ("bool", "on the model with folded slots, against its own loss"),
        "effort": ("int64", "what its remedies ask for: a prefix, slots, scales in weights 1; rotations, constants 2"),
        "metric": ("string", "nll, perplexity, kl, top1_agreement, task/metric"),
        "baseline": ("float64", "in full precision"),
        "quantised": ("float64", "under the scheme"),
        "delta": ("float64", "quantised - baseline"),
        **{name: EFFECTS["effects"][name] for name in _JUDGED},
        "n_elements": ("int64", "elements that rounding changed"),
        "n_sequences": ("int64", "sequences evaluated"),
        "n_targets": ("float64", "predictions of the same tokens; NaN: not of predictions"),
    },
    "remedies": {
        "scheme": ("string", "without the remedy"),
        "remedy": ("string", "exempt, hadamard, smooth, smooth-all, insert, slots, super"),
        "remedied": ("string", "the scheme with it"),
        "before_nats": ("float64", "loss without it"),
        "after_nats": ("float64", "loss with it"),
        "saved_nats": ("float64", "before - after, paired"),
        "saved_low": ("float64", "its 95 % interval"),
        "saved_high": ("float64", "its upper end"),
        "n_sequences": ("int64", "sequences evaluated"),
    },
    "quantised_sites": {
        "scheme": ("string", _SCHEME),
        "stack": ("string", "name of the stack"),
        "layer": ("int64", "block"),
        "site": ("string", "what is quantised there: attn_in (ssm_in, linear_attn_in, conv_in, mixer_in where tokens "
                 "are mixed so), o_in, mlp_in, mlp_act, k, v; weights: nothing but these"),
        "modules": ("string", "dotted names of the matrices that read it; empty: keys and values"),
        "local_massive": ("float64", "error of massive tokens at the end of the block, this site alone quantised; NaN: "
                          "there are none"),
        "local_rest": ("float64", "the same of all other tokens"),
        "error_massive": ("float64", "error of massive tokens at the end of the block, all of the scheme quantised"),
        "error_rest": ("float64", "the same of all other tokens"),
        "zeroed_rate": ("float64", "predicted share of the entries of other tokens that round to 0 and were not, "
                                   "from the "
                        "calibration alone; NaN: not predicted for this format"),
        "zeroed_measured": ("float64", "the same, counted"),
        "scale": ("float64", "of a scale of the whole tensor, from the calibration; NaN: there are many"),
        "amax": ("float64", "greatest |x| of the calibration"),
        "amax_rest": ("float64", "the same without massive tokens"),
    },
    "guilty_sites": {
        "scheme": ("string", _SCHEME),
        "left_out": ("int64", "sites in full precision: those of this row and of the rows before"),
        "layer": ("int64", "block of the site that this row adds; 0: none yet"),
        "site": ("string", "the site that this row adds"),
        "local_rest": ("float64", "its local error, by which sites are put in order"),
        "delta_nats": ("float64", "loss with so many in full precision; NaN: not run"),
        "nats_low": ("float64", "its 95 % interval"),
        "nats_high": ("float64", "its upper end"),
        "verdict": ("string", "of the loss"),
    },
}  # fmt: skip


@dataclass
class QuantiseInfo(Sidecar):
    """The record of a quantisation: quantise.json.

    Args:
        massive: clusters whose tokens are spared, how many tokens; outlier features that are left.
        calibrated_on, evaluated_on: sequences that scales are of, and that losses are of.
        schemes: name -> what is quantised and what is done about massive tokens.
        goal: loss in nats that the curve of guilty sites stops at.
        exported: the scheme that recipes are of.
        exports: name of a file -> its text: what other libraries run, see `massact.quantisation.recipes`.
    """

    massive: dict[str, Any] = field(default_factory=dict)
    calibrated_on: str = ""
    evaluated_on: str = ""
    schemes: dict[str, Any] = field(default_factory=dict)
    goal: float = 0.0
    exports: dict[str, str] = field(default_factory=dict)
    exported: str = ""
    schema_version: int = 1


@dataclass(repr=False)
class Quantisation(Result):
    """What a model loses in low precision.

    Args:
        info: what was asked and how.
        quantised: one row per scheme and metric. See `TABLES`.
        remedies: what each remedy saves.
        quantised_sites: errors of every block and site, in two columns.
        guilty_sites: the loss as the worst sites stay in full precision.
    """

    KIND: ClassVar[str] = "quantisation"
    VERB: ClassVar[str] = "quantise"
    FILE: ClassVar[str] = "quantise.json"
    INFO: ClassVar[type[Any]] = QuantiseInfo
    TABLES: ClassVar = TABLES
    SOME: ClassVar[frozenset[str]] = frozenset({"guilty_sites"})
    AGAIN: ClassVar[str] = "Quantise the run again."
    PLACE: ClassVar[int] = 4

    info: QuantiseInfo
    quantised: pd.DataFrame = table("quantised")
    remedies: pd.DataFrame = table("remedies")
    quantised_sites: pd.DataFrame = table("quantised_sites")
    guilty_sites: pd.DataFrame = table("guilty_sites")

    def save(self, directory: str | Path) -> Path:
        """Write its files into a directory, and what other libraries run into `export` there; see `Result.save`."""
        path, folder = Path(directory), Path(directory) / EXPORT
        stale = _exported(path) - set(self.info.exports)
        try:
            for name in stale:  # of the run that this one takes the place of
                (folder / name).unlink(missing_ok=True)
            if self.info.exports and path.is_dir():
                folder.mkdir(exist_ok=True)
                for name, text in self.info.exports.items():
                    write_atomic(folder / name, partial(_write, text))
        except OSError as error:
            raise UserError(f"{folder} cannot be written.", error.strerror or str(error)) from None
        return super().save(directory)  # the record last


def _exported(directory: Path) -> set[str]:
    """Names of the files of an earlier run in a directory."""
    try:
        before = Quantisation.read(directory)
    except UserError:  # damaged, and about to be replaced
        return set()
    return set() if before is None else {name for name in before.exports if Path(name).name == name}


def _write(text: str, path: Path) -> None:
    path.write_text(text, "utf-8")
