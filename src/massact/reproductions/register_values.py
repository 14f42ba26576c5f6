"""Golden values: the largest entries of the register means that were published with Sun 2024.

The paper's code ships the means of the four registers of DINOv2-reg at the input of every block, over 10,000 training
images of ImageNet with augmentation, as one file for each size. What follows are the largest entries of these files. No
weights and no means are kept here: who has the weights collects means (`register_means`) and checks them.

Shapes: L layers, D dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from massact.records.errors import UserError

SIZES: dict[str, tuple[int, int]] = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "G": (40, 1536)}  # (L, D)
N_REGISTERS = 4


@dataclass(frozen=True)
class PublishedMean:
    """One entry of the published means.

    Args:
        size: of DINOv2-reg.
        key: 0-based block whose input it is; the paper's layer.
        register: 1 to 4.
        dims: the dim, or where only a set is told, which it is one of.
        value: of the mean.
        largest: no other entry of that key is greater in magnitude.
    """

    size: str
    key: int
    register: int
    dims: tuple[int, ...]
    value: float
    largest: bool = True


REGISTER_MEANS: tuple[PublishedMean, ...] = (
    PublishedMean("S", 5, 2, (287,), -93),
    PublishedMean("B", 8, 4, (569,), 139),
    PublishedMean("B", 11, 4, (254,), -204),
    PublishedMean("L", 3, 1, (971, 188, 555, 126), -163),
    PublishedMean("L", 12, 1, (971, 188, 555, 126), -168),
    PublishedMean("L", 23, 1, (555,), -710),
    PublishedMean("G", 1, 3, (179, 196), -475),
    PublishedMean("G", 12, 3, (179, 196), -842),
    PublishedMean("G", 38, 3, (179, 196), -1163),
    PublishedMean("G", 1, 3, (999,), 395, largest=False),
    PublishedMean("G", 9, 3, (999,), 665, largest=False),
)


def check_published(means_LRD: np.ndarray, size: str | None = None, tolerance: float = 0.1) -> pd.DataFrame:
    """Compare one's own register means of DINOv2-reg with the published ones.

    An entry agrees if its value is within the tolerance of the published one; one that is the largest of its block must
    also be where the largest entry of the given means is (register and dim). Other images, another resolution or no
    augmentation move the means a little: hence a tolerance.

    Args:
        means_LRD: (L, 4, D), from `register_means`, the input of every block.
        size: "S", "B", "L" or "G"; None: by the shape.
        tolerance: relative.

    Returns:
        One row for each published entry: size, key, register, dim (the published one, or the first of several),
        published, found_register, found_dim, found, agrees.

    Raises:
        UserError: the shape is that of none of the sizes, or of another one.
    Source: the register means in the code of Sun 2024 (locuslab/massive-activations); numbers read off these files.
    """
    means = np.asarray(means_LRD, np.float64)
    shapes = {name: (n_layers, N_REGISTERS, d) for name, (n_layers, d) in SIZES.items()}
    known = [name for name, shape in shapes.items() if shape == means.shape and size in (None, name)]
    if not known:
        wanted = {k: v for k, v in shapes.items() if size in (None, k)} or shapes
        raise UserError(
            f"Register means of shape {means.shape} are not those of DINOv2-reg{' ' + size if size else ''}.",
            "Shapes (layers, registers, dims): " + ", ".join(f"{k} {v}" for k, v in wanted.items()) + ".",
        )
    return pd.DataFrame([_compared(means, p, tolerance) for p in REGISTER_MEANS if p.size == known[0]])


def _compared(means_LRD: np.ndarray, p: PublishedMean, tolerance: float) -> dict[str, object]:
    here = means_LRD[p.key]
    if p.largest and np.isfinite(here).all():
        register, dim = np.unravel_index(np.abs(here).argmax(), here.shape)
    else:
        register, dim = p.register - 1, p.dims[0]
    found = float(here[register, dim])
    right = int(register) + 1 == p.register and int(dim) in p.dims
    return {
        "size": p.size, "key": p.key, "register": p.register, "dim": p.dims[0], "published": p.value,
        "found_register": int(register) + 1, "found_dim": int(dim), "found": found,
        "agrees": right and abs(found - p.value) <= tolerance * abs(p.value),
    }  # fmt: skip
