"""Documents from the Hub: the paper's data sets by their protocol, any other one by its name.

Needs the extra `data`. Nothing is read before a name is asked for, so the package is imported on first use.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from massact.records.errors import UserError, causes, class_and_line
from massact.records.presets import PRESETS, Preset, named_corpora
from massact.records.reachability import check_on_hub

# How much of a data set without a protocol is read: its first documents, enough for any scan.
MAX_DOCUMENTS = 10_000
MAX_CHARACTERS = 20_000_000
SPLIT_ORDER = ("test", "validation", "train")


def read_preset(preset: Preset, split: str | None, text_column: str | None, seed: int) -> list[str]:
    """Read the documents of one of the paper's data sets, by its protocol.

    Args:
        preset: an entry of `PRESETS`.
        split: another split than the protocol's.
        text_column: another column than the protocol's.
        seed: added to the seed of a random draw.

    Raises:
        UserError: the extra is missing, no network, or no such split or column.
    """
    column = text_column or preset.column
    if preset.files:
        if split not in (None, preset.split):
            raise UserError(
                f"{preset.dataset!r} has no split {split!r}.",
                f"It has one: {preset.split!r}.",
                "Leave it out.",
            )
        paths = _download(preset.dataset, preset.files)
        total = sum(1 for _ in _lines(paths))
        chosen = _draw(total, preset, seed)
        wanted = set(chosen)
        lines = {number: line for number, line in enumerate(_lines(paths)) if number in wanted}
        return [_text(json.loads(lines[number]), column, preset.dataset) for number in chosen]
    options = {"name": preset.config, "split": split or preset.split, "streaming": preset.streaming}
    rows = _load(preset.dataset, options)
    return _texts(rows if preset.first is None else islice(_guarded(rows, preset.dataset), preset.first),
                  column, preset.dataset)  # fmt: skip


def read_dataset(name: str, split: str | None, text_column: str | None) -> tuple[list[str], dict[str, Any]]:
    """Read the first documents of any data set: at most 10,000, and at most 20 million characters.

    Args:
        name: id on the Hub, or 'id:configuration'.
        split: which split; the first of test, validation, train that it has if None.
        text_column: which column; 'text', or the only one that holds strings, if None.

    Returns:
        The documents, and where they came from.

    Raises:
        UserError: the extra is missing, no network, no such data set, split or column.
    """
    dataset, _, config = name.partition(":")
    chosen = split or _default_split(dataset, config or None)
    rows = _guarded(_load(dataset, {"name": config or None, "split": chosen, "streaming": True}), dataset)
    documents: list[str] = []
    characters, column = 0, text_column
    for row in islice(rows, MAX_DOCUMENTS):
        column = column or _text_column(row, dataset)
        documents.append(_text(row, column, dataset))
        characters += len(documents[-1])
        if characters >= MAX_CHARACTERS:
            break
    source = {"dataset": dataset, "config": config or None, "split": chosen, "column": column}
    return documents, source


def read_rows(name: str, split: str, text_column: str | None) -> Iterator[str]:
    """Stream every document of a split of a data set, for training.

    Args:
        name: id on the Hub, or 'id:configuration'.
        split: which split.
        text_column: which column; 'text', or the only one that holds strings, if None.

    Raises:
        UserError: the extra is missing, no network, no such data set, split or column.
    """
    dataset, _, config = name.partition(":")
    column = text_column
    for row in _guarded(_load(dataset, {"name": config or None, "split": split, "streaming": True}), dataset):
        column = column or _text_column(row, dataset)
        yield _text(row, column, dataset)


def _draw(total: int, preset: Preset, seed: int) -> list[int]:
    # RandomState(s).choice is the official code's np.random.seed(s); np.random.choice, without global state.
    random = np.random.RandomState(preset.random_seed + seed)
    return random.choice(total, min(preset.random or total, total), replace=False).tolist()


def _lines(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            yield from (line for line in file if line.strip())


def _texts(rows: Iterable[Mapping[str, Any]], column: str, dataset: str) -> list[str]:
    return [_text(row, column, dataset) for row in rows]


def _text(row: Mapping[str, Any], column: str, dataset: str) -> str:
    if not isinstance(row.get(column), str):
        why = f"It holds {type(row[column]).__name__}." if column in row else f"Its columns: {', '.join(row)}."
        raise UserError(f"{dataset!r} has no text column {column!r}.", why, "Name one that holds text (text_column).")
    return row[column]


def _text_column(row: Mapping[str, Any], dataset: str) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise UserError(
            f"It is not clear which column of {dataset!r} holds the text.",
            f"Columns with text: {', '.join(strings) or 'none'}; all columns: {', '.join(row)}.",
            "Name one (text_column).",
        )
    return strings[0]


def _default_split(dataset: str, config: str | None) -> str:
    try:
        splits = _datasets(dataset).get_dataset_split_names(dataset, config)
    except UserError:
        raise
    except Exception as error:  # the package raises many kinds; each becomes one clear message
        raise _refused(dataset, error) from error
    return next((name for name in SPLIT_ORDER if name in splits), splits[0])


def _load(dataset: str, options: dict[str, Any]) -> Iterable[Mapping[str, Any]]:
    datasets = _datasets(dataset)
    try:
        rows = datasets.load_dataset(dataset, **options)
    except Exception as error:  # as above
        raise _refused(dataset, error) from error
    # Columns of images and sound stay undecoded: only text is read, and their decoders open any format.
    return rows.decode(False) if hasattr(rows, "decode") else rows


def _guarded(rows: Iterable[Mapping[str, Any]], dataset: str) -> Iterator[Mapping[str, Any]]:
    """Pass rows on; a streamed data set meets the network here, not when it is opened."""
    try:
        yield from rows
    except Exception as error:  # as above
        raise _refused(dataset, error) from error


def _download(dataset: str, files: Iterable[str]) -> list[Path]:
    _datasets(dataset)  # one rule for every data set: it comes with the extra
    hub = importlib.import_module("huggingface_hub")
    try:
        return [Path(hub.hf_hub_download(dataset, file, repo_type="dataset")) for file in files]
    except Exception as error:  # as above
        raise _refused(dataset, error) from error


def _datasets(dataset: str) -> Any:
    try:
        module = importlib.import_module("datasets")
    except ImportError:
        module = None
    # A folder named `datasets` beside the user's script imports as an empty package.
    if not hasattr(module, "load_dataset"):
        known = dataset in {preset.dataset for preset in PRESETS.values()}
        hint = "" if known else f" {named_corpora(dataset)}"
        raise UserError(
            f"The data set {dataset!r} cannot be read.",
            "The package `datasets` is not installed"
            + ("." if known else " (and no file, folder or built-in corpus has that name)."),
            f'pip install "massact[data]", or give a file.{hint}',
        )
    no_code_asked(module)
    check_on_hub(dataset, "dataset")
    return module


def no_code_asked(datasets: Any) -> None:
    """Of versions that ask on stdin whether the code of a data set may run: no. An answer in the environment stands."""
    config = getattr(datasets, "config", None)
    if getattr(config, "HF_DATASETS_TRUST_REMOTE_CODE", False) is None:
        config.HF_DATASETS_TRUST_REMOTE_CODE = False  # type: ignore[union-attr]


def _refused(dataset: str, error: Exception) -> UserError:
    """Turn what the Hub's packages raise into one message, by the kind of failure."""
    kinds = {cls.__name__ for link in causes(error) for cls in type(link).__mro__}
    why = class_and_line(error)
    if "GatedRepoError" in kinds or "gated" in why.lower():
        do = f"Accept its terms on its page on the Hub, then log in with `hf auth login`. ({dataset})"
        return UserError(f"The data set {dataset!r} is gated.", why, do)
    offline = {
        "ConnectionError",
        "TimeoutError",
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectError",
    }
    if kinds & offline or any("Timeout" in kind for kind in kinds):
        return UserError(
            f"The data set {dataset!r} cannot be reached.",
            f"There is no network, or offline mode is on ({why}).",
            f"Go online, or give a local file or folder. {named_corpora(dataset)}",
        )
    if "FileNotFoundError" in kinds:
        do = f"Check the name. {named_corpora(dataset)}"
        return UserError(f"There is no data set {dataset!r} on the Hub (nor a file or folder of that name).", why, do)
    do = "Check the split and the configuration ('name:configuration'), or give a local file."
    return UserError(f"The data set {dataset!r} cannot be read.", why, do)
