"""What people call a model."""

from __future__ import annotations

import os

from massact.models.gguf_header import is_gguf

SAYS_NOTHING = ("hf", "model")  # folders that tools write one of for each model


def short_name(name: str) -> str:
    """What people call a model: the last part of its path."""
    if os.path.isdir(name):
        return folder_name(name)
    return os.path.basename(os.path.normpath(name)) if is_gguf(name) else name


def folder_name(folder: str) -> str:
    """What a model in a folder is called: the last part of its path that says which model it is.

    A snapshot of the Hub's cache (models--ORG--NAME/snapshots/HASH) is ORG/NAME; a folder that says no more than what
    kind of thing it holds (`SAYS_NOTHING`) is called by its parent; any other has its own name.
    """
    parts = [p for p in os.path.abspath(folder).split(os.sep) if p]
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1)
    own = parts[-1] if parts else folder
    return parts[-2] if own.lower() in SAYS_NOTHING and len(parts) > 1 else own
