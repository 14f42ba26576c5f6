"""Checkpoints that are whole or not there.

A checkpoint is written in a hidden folder, sealed with the hash of every file, and renamed. A folder without a seal, or
with a file of another hash, is damaged and is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from massact.records.disk import disk_full, write_atomic

SEAL = "massact.json"
SAVING = ".saving"


def seal(folder: Path, more: dict[str, Any]) -> None:
    """Write the hash of every file of a folder, and what else belongs to it."""
    files = {p.relative_to(folder).as_posix(): _hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    record = {"files": files} | more
    write_atomic(folder / SEAL, lambda p: p.write_text(json.dumps(record, indent=1) + "\n", "utf-8"))


def sealed(folder: Path) -> dict[str, Any]:
    """What the seal of a checkpoint says."""
    return json.loads((folder / SEAL).read_text("utf-8"))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; "" where nothing is."""
    try:
        files = sealed(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL} is missing or damaged ({type(error).__name__})"
    for name, known in files.items():
        try:
            if _hash(folder / name) != known:
                return f"{name} has another hash"
        except OSError:
            return f"{name} is missing"
    return ""


def publish(root: Path, step: int, more: dict[str, Any], keep: int) -> Path:
    """Seal the checkpoint that lies in `root/.saving`, rename it to its place, and keep only the last `keep`."""
    made, place = root / SAVING / f"checkpoint-{step}", root / f"checkpoint-{step}"
    seal(made, {"step": step} | more)
    _sync(made / SEAL)
    if place.exists():  # a damaged one of this step
        _remove(place)
    os.rename(made, place)
    _sync(root)
    shutil.rmtree(root / SAVING, ignore_errors=True)
    for old in listed(root)[keep:]:
        _remove(old)
    return place


def listed(root: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    found = [(int(m[1]), p) for p in root.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [p for _, p in sorted(found, reverse=True)]


def newest(root: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint that is whole; what is damaged goes into the notes."""
    for folder in listed(root):
        wrong = damage(folder)
        if not wrong:
            return folder
        notes.append(f"{folder.name} is damaged ({wrong}) and was not used.")
    return None


def tidy(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for left in [root / SAVING, *root.glob(".old-*")]:
        shutil.rmtree(left, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that a half-deleted one is never taken for one."""
    hidden = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a directory cannot be opened everywhere
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if disk_full(error):
            raise
    finally:
        os.close(handle)
