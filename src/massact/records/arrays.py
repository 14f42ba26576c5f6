"""The arrays of a run, read with a check that they are what they are drawn as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from massact.records.errors import UserError
from massact.records.tables import load_arrays
from massact.records.user_files import refuse_special

# Name -> a letter for each axis, the same length wherever the letter is the same; "?": it may be missing.
PORTRAIT = {"magnitude": "PTD", "layers": "P", "tokens": "T", "stack": "", "site": ""}
STRIP = {"value": "QLN", "dim": "QLN", "median": "QLK", "tokens": "N", "position": "N", "text": "N", "points": "Q",
         "layers": "L", "stack": ""}  # fmt: skip
ATTENTION = {"logits": "PTT", "probs": "PTT", "layers": "P", "tokens": "T", "stack": ""}
IMAGES = {"massive_share": "YX", "massive": "KYX", "norms": "KLYX", "layers": "L", "n_images": "", "stack": "",
          "pictures?": "KHW3", "dim_size?": "KYX", "dim_at?": "2"}  # fmt: skip
GENERATED = {"ids": "NT", "lengths": "N", "given": "N"}
WORDS = ("tokens", "stack", "site", "points")


def read_arrays(path: Path, shapes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read a file of arrays; {} where there is none, or nothing in it.

    Args:
        path: of the .npz file.
        shapes: `PORTRAIT`, `STRIP`, `ATTENTION` or `IMAGES`.

    Raises:
        UserError: it is damaged, or holds arrays of other shapes or kinds.
    """
    refuse_special(path)
    if not path.is_file():
        return {}
    arrays = load_arrays(path)
    if arrays and (wrong := _misfit(arrays, shapes)):
        raise UserError(f"{path} cannot be read.", wrong, "The file is damaged: scan or explain again.")
    return arrays


def _misfit(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, str]) -> str:
    lengths = {"2": 2, "3": 3}
    for asked, axes in shapes.items():
        name = asked.rstrip("?")
        if name not in arrays:
            if name == asked:
                return f"It lacks {name}."
            continue
        shape, kind = arrays[name].shape, arrays[name].dtype.kind
        if len(shape) != len(axes) or any(lengths.setdefault(a, n) != n for a, n in zip(axes, shape, strict=True)):
            return f"{name} has the shape {shape}, which does not fit the others."
        if kind not in ("U" if name in WORDS else "biuf"):
            return f"{name} does not hold {'words' if name in WORDS else 'numbers'}."
    return ""
