"""The result of a scan, in memory and as a run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from massact.records.arrays import IMAGES, PORTRAIT, read_arrays
from massact.records.disk import leftovers, write_atomic
from massact.records.errors import UserError
from massact.records.given_files import read_given, refuse_special
from massact.records.notebooks import ShownInNotebooks
from massact.records.runinfo import RunInfo, jsonable
from massact.records.tables import frame, read_table, save_arrays, write_table

SCAN_TABLES = ("layers", "findings", "near_misses", "coordinates", "dims", "ranks")
PICTURED_TABLES = ("patch_norms", "patch_cosines")  # of image models only


@dataclass(repr=False)
class ScanResult(ShownInNotebooks):
    """What a scan found.

    Args:
        info: what was asked, of which model, on which corpus, and the answer in numbers.
        layers, findings, near_misses, coordinates, dims, ranks: tables, see `massact.records.tables`.
        portrait: |h| of one prompt for the 3-D figure: "magnitude" (P, T, D), "layers" (P,), "tokens" (T,).
        patch_norms, patch_cosines: tables, of image models only.
        images: of image models, what their patches are and how large: "massive_share" (Y, X), share of the
            "n_images" with a finding on that patch; of the first K images "massive" (K, Y, X), "norms" (K, L, Y, X) at
            "layers" and "pictures" (K, H, W, 3) uint8; of "stack" the positions "patches" (row by row), "registers" and
            "class_tokens".
    """

    info: RunInfo
    layers: pd.DataFrame = field(default_factory=lambda: frame("layers"))
    findings: pd.DataFrame = field(default_factory=lambda: frame("findings"))
    near_misses: pd.DataFrame = field(default_factory=lambda: frame("near_misses"))
    coordinates: pd.DataFrame = field(default_factory=lambda: frame("coordinates"))
    dims: pd.DataFrame = field(default_factory=lambda: frame("dims"))
    ranks: pd.DataFrame = field(default_factory=lambda: frame("ranks"))
    portrait: dict[str, np.ndarray] = field(default_factory=dict)
    patch_norms: pd.DataFrame = field(default_factory=lambda: frame("patch_norms"))
    patch_cosines: pd.DataFrame = field(default_factory=lambda: frame("patch_cosines"))
    images: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def found(self) -> bool:
        """Whether anything passed the criterion."""
        return len(self.findings) > 0

    def save(self, directory: str | Path) -> Path:
        """Write the run directory; run.json last, so that its status speaks for the rest.

        Raises:
            UserError: the directory cannot be written, or holds another run.
        """
        path = claim(directory, self.info)
        for table in SCAN_TABLES:
            write_table(path, table, getattr(self, table))
        if self.portrait:
            save_arrays(path / "portrait.npz", self.portrait)
        if self.images:
            save_arrays(path / "images.npz", self.images)
            for table in PICTURED_TABLES:
                write_table(path, table, getattr(self, table))
        write_info(path, self.info)
        return path

    def as_dict(self) -> dict[str, Any]:
        """Everything but dims, portrait, images and histograms, as JSON-able records: what --json prints."""
        record: dict[str, Any] = jsonable(vars(self.info))
        more = ("patch_cosines",) if self.images else ()
        for table in ("layers", "findings", "near_misses", "coordinates", "ranks", *more):
            record[table] = jsonable(getattr(self, table).to_dict(orient="records"))
        return record


def open_run(directory: str | Path) -> ScanResult:
    """Read a run directory.

    Raises:
        UserError: no such directory, no run in it, damaged, or made by a newer massact.
    """
    path = Path(directory)
    info = read_info(path)
    if info.status in ("running", "interrupted"):
        raise UserError(
            f"The run in {path} is not finished (status: {info.status}).",
            do=f"Go on with it: massact scan ... --out {path} --resume",
        )
    if info.status != "ok":
        raise UserError(f"The run in {path} failed.", info.error or "", "Scan again into another directory.")
    images = path / "images.npz"
    tables = SCAN_TABLES + (PICTURED_TABLES if images.is_file() else ())
    return ScanResult(
        info,
        **{t: read_table(path, t) for t in tables},
        portrait=read_arrays(path / "portrait.npz", PORTRAIT),
        images=read_arrays(images, IMAGES),
    )


def read_info(directory: str | Path) -> RunInfo:
    """Read run.json of a run directory.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(directory)
    if not is_folder(path):
        raise UserError(f"No such run directory: {path}", do="Make one with: massact scan MODEL --out DIR")
    file = path / "run.json"
    refuse_special(file)
    if not file.is_file():
        raise UserError(
            f"{path} is no run directory: it has no run.json.", do="Make one with: massact scan MODEL --out DIR"
        )
    try:
        text = read_given(file).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read.", str(error)) from None
    return RunInfo.from_json(text, str(file))


def is_folder(path: Path) -> bool:
    """Whether there is a folder; of a path that no folder can have, False."""
    try:
        return path.is_dir()
    except OSError:  # a name too long, a folder that may not be looked into
        return False


def write_info(directory: Path, info: RunInfo) -> None:
    """Write run.json of a run directory; what is no Unicode in a file name becomes an escape, which JSON reads."""
    text = info.to_json()
    write_atomic(directory / "run.json", lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def claim(directory: str | Path, info: RunInfo) -> Path:
    """Make a directory ours, or refuse.

    Raises:
        UserError: it cannot be written, is a file, or holds the run of other inputs or options.
    """
    path = Path(directory)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file.", do="Give a directory.")
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / ".write-test", lambda p: p.write_text(""))
        (path / ".write-test").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path} cannot be written.", error.strerror or str(error), "Give another directory."
        ) from None
    if (path / "run.json").exists():
        other = read_info(path)
        if other.verb != info.verb or other.started != info.started:
            raise UserError(
                f"--out {path} already holds a run ({other.verb} of {other.model.get('id', '?')}, "
                f"status {other.status}).",
                do="Give another directory, or remove that one.",
            )
    elif set(path.iterdir()) - {path / "state.npz", *leftovers(path)}:
        raise UserError(f"--out {path} is not empty and holds no massact run.", do="Give a new or empty directory.")
    return path
