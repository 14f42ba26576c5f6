"""The directory of a run: its record, and whose it is."""

from __future__ import annotations

import os
from pathlib import Path

from massact.records.disk import leftovers, write_atomic
from massact.records.errors import UserError
from massact.records.runinfo import RunInfo
from massact.records.user_files import read_given, refuse_special

# Record of a kind of results that went -> what it is, and a massact that reads it.
RETIRED = {"shapes.json": ("a vision toy lab", "0.1.0 at commit cb16174")}


def read_info(directory: str | Path) -> RunInfo:
    """Read run.json of a run directory.

    Raises:
        UserError: there is none, it cannot be read, or the directory is of a kind that is no longer read.
    """
    path = Path(directory)
    if not is_folder(path):
        raise UserError(f"No such run directory: {path}", do="Make one with: massact scan MODEL --out DIR")
    file = path / "run.json"
    refuse_special(file)
    if not file.is_file():
        for name, (what, last) in RETIRED.items():
            if (path / name).exists():
                raise UserError(f"{path} is {what} (it has {name}), which massact no longer reads.",
                                f"massact {last} does.",
                                "Install that one, or read the tables themselves (*.parquet).")  # fmt: skip
        raise UserError(
            f"{path} is no run directory: it has no run.json.", do="Make one with: massact scan MODEL --out DIR"
        )
    try:
        text = read_given(file).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read.", str(error)) from None
    return RunInfo.from_json(text, str(file))


def finished(directory: Path) -> bool:
    """Whether there is a scan in a directory that came to its end; False where there is none."""
    return is_folder(directory) and (directory / "run.json").is_file() and read_info(directory).status == "ok"


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
                do="Give another directory, or remove that one."
                if other.status == "ok"
                else "Go on with it: the same command with --resume. Or give another directory.",
            )
    elif set(path.iterdir()) - {path / "state.npz", *leftovers(path)}:
        raise UserError(f"--out {path} is not empty and holds no massact run.", do="Give a new or empty directory.")
    return path


def check_out(out: Path, resume: bool = False) -> None:
    """Refuse a directory that cannot be used before minutes are spent on the model.

    Raises:
        UserError: it cannot be written, or holds another run, one that is damaged where it is to be resumed.
    """
    if resume and os.path.isfile(out / "run.json"):
        read_info(out)
        return
    made = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]
    claim(out, RunInfo("scan"))
    for folder in made:
        folder.rmdir()
