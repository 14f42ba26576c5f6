"""What verbs are given beside their own options: a model, a scanned run, where results go, how models are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import field_validator

from massact.records.errors import UserError
from massact.records.figure_files import check_style, formats_of
from massact.verbs.options import Options, Preprocess, option

CODE = "Run code that comes with the model."
PICKLE = "Read .bin weights, with weights_only=True."
GGUF = "Name of a GGUF file in the folder or repository that MODEL names."
CORPUS = "Where the scanned text (images, recordings) lies now, or another, which is scanned first (as `scan`)."
CHAT = (
    "Each text is a user's message in the chat template of the tokenizer: each row of JSONL, CSV or parquet, or each "
    "window of a text."
)
COLUMN = "Column that holds the text, of JSONL, CSV, parquet and data sets; nothing: text."
IMAGES = (
    "Of images, where it is to differ from the model's processor: resize=256 (short side) or 224x224, crop=224, "
    "resample=bicubic, mean=0.5, std=0.5 (or three with commas). Can be repeated."
)


class Inputs(Options):
    """What every verb can be given."""

    json_: bool = option(False, "Print the records as JSON instead of tables.", "--json", last=True)
    quiet: bool = option(False, "No progress bar, no tables.", "--quiet,-q", last=True)
    figures: str = option("png", "Formats of the figures in the run directory: png, svg, pdf, with commas; or none.",
                          last=True)  # fmt: skip

    @field_validator("figures")
    @classmethod
    def _formats(cls, figures: str) -> str:
        formats_of(figures)
        return figures

    style: str = option("paper", "Of the figures: paper, or lecture (slides of 16:9 with large type).", last=True)

    @field_validator("style")
    @classmethod
    def _style(cls, style: str) -> str:
        check_style(style)
        return style

    def formats(self) -> tuple[str, ...]:
        """Of the figures."""
        return formats_of(self.figures)


class Loading(Inputs):
    """How a model is loaded."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", last=True)
    trust_remote_code: bool = option(False, CODE, last=True)
    allow_pickle: bool = option(False, PICKLE, last=True)

    def load_options(self) -> dict[str, Any]:
        """The options of `load` that were asked for."""
        asked = {name: getattr(self, name, None) for name in ("trust_remote_code", "allow_pickle", "gguf_file")}
        return {name: value for name, value in asked.items() if value}


class OfModel(Loading):
    """A model, a text, and a directory of its own."""

    gguf_file: str | None = option(None, GGUF, last=True)


class ScannedFirst(OfModel):
    """What the scan is given that comes first where a verb is given a model, not a run."""

    out: Path | None = option(None, "Run directory for a model; a run gets its tables added.")
    corpus: str | None = option(None, CORPUS)
    preprocess: Preprocess = option({}, IMAGES)
    text_column: str | None = option(None, COLUMN)
    seq_len: int | None = option(None, "Tokens per sequence, for a model.", least=1)
    chat_template: bool = option(False, f"{CHAT} For a model.")

    def refuse_those_of_a_model(self) -> None:
        """Refuse, of a run, what only a model can be given.

        Raises:
            UserError: one of them was given.
        """
        names = ("out", "seq_len", "preprocess", "text_column", "chat_template", "gguf_file")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, False, {})]
        if given:
            are = "are" if len(given) > 1 else "is"
            raise UserError(
                f"{' and '.join(given)} {are} for a model, not for a run.",
                "A run has its scan, and what that was made with.",
                "Leave it out.",
            )

    def scan_options(self, options: Any) -> dict[str, Any]:
        """Of the scan that comes first: what was given here, and the verb's own where these mean the same."""
        shared = {name: getattr(options, name) for name in ("n_sequences", "seed") if hasattr(options, name)}
        ours = {name: getattr(self, name) for name in ("seq_len", "preprocess", "text_column", "chat_template")}
        return ours | shared


class OfScan(ScannedFirst):
    """A scanned run, to which results are added, and where its model lies now; or a model, which is scanned first."""

    run: str = option(
        ..., "Run directory of a scan, to which tables and figures are added; or a model (Hub id, folder, GGUF file), "
        "which is scanned first.", argument=True)  # fmt: skip
    model: str | None = option(None, "Where the scanned model lies now; nothing: where the scan had it.", argument=True)


class OfScanOrModel(ScannedFirst):
    """A scanned run, to which results are added; or a model, which is scanned first."""

    target: str | None = option(
        None, "Run directory of a scan, or a model (Hub id or folder), which is scanned first; nothing: the embedded "
        "model.", argument=True)  # fmt: skip
    model: str | None = option(None, "Where the model of the run lies now.")
