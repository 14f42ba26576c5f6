"""What a scan of images keeps of them for its figures: tables of all, and maps and small pictures of the first few.

Shapes: K kept images, Y rows and X columns of patches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Corpus
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult
from massact.scans.image_maps import PatchMaps, marked, massive_patches, neighbour_cosines, norm_histograms

KEPT = 8  # images whose norm maps are kept
LARGEST_SIDE = 224  # pixels of a picture that is kept


def add_pictures(
    result: ScanResult,
    maps: PatchMaps,
    corpus: Corpus,
    pictures: bool,
    of_dim: tuple[int, int, np.ndarray] | None = None,
) -> None:
    """Give a result its tables `patch_norms` and `patch_cosines`, of all images, and `images`, of the first K = 8.

    Args:
        result: with its findings, which say what is massive.
        maps: of all images.
        corpus: the images.
        pictures: whether to keep small pictures too.
        of_dim: layer, dim and |h| there of every patch of the first images, see `dim_maps`.
    """
    layout, massive = maps.layout, massive_patches(result.findings, maps.layout)
    try:
        result.patch_norms = norm_histograms(maps)
    except UserError as error:  # all of them are zero or not finite
        result.info.notes.append(f"No histograms of patch norms: {error.what}")
    result.patch_cosines = neighbour_cosines(maps, massive)
    mask_NYX = marked(massive, layout, len(maps.norms))
    few = min(KEPT, len(maps.norms))
    result.images = {
        "stack": np.array(layout.stack), "patches": np.array(layout.patches), "registers": np.array(layout.registers),
        "class_tokens": np.array(layout.class_tokens), "layers": np.array(maps.layers),
        "n_images": np.array(len(maps.norms)), "massive_share": mask_NYX.mean(0), "massive": mask_NYX[:few],
        "norms": maps.on_grid(maps.norms[:few]),
    }  # fmt: skip
    if of_dim is not None:
        layer, dim, size_KYX = of_dim
        result.images |= {"dim_at": np.array([layer, dim]), "dim_size": size_KYX[:few]}
    small = small_pictures(corpus.head(few)) if pictures else None
    if small is not None:
        result.images["pictures"] = small


def small_pictures(corpus: Corpus) -> np.ndarray | None:
    """The images of a corpus as people see them: (K, H, W, 3) uint8, no side above `LARGEST_SIDE`.

    Normalisation is undone where the corpus records it; values of a tensor that are not within 0 and 1 are stretched
    over all images from the least to the greatest. None where they have neither one nor three channels.
    """
    x_KCHW = next((x for x in corpus.inputs.values() if x.ndim == 4), None)
    if x_KCHW is None or x_KCHW.shape[1] not in (1, 3) or not x_KCHW.isfinite().all():
        return None
    x_KCHW = x_KCHW.float().cpu()
    steps = corpus.origin.source.get("preprocess") if corpus.origin.source else None
    if isinstance(steps, dict):
        if steps["mean"] is not None and steps["std"] is not None:
            mean, std = (torch.tensor(steps[name])[:, None, None] for name in ("mean", "std"))
            x_KCHW = x_KCHW * std + mean
        x_KCHW = x_KCHW / (255 * (steps["rescale"] or 1))
    elif x_KCHW.min() < 0 or x_KCHW.max() > 1:
        low, high = x_KCHW.min(), x_KCHW.max()
        x_KCHW = (x_KCHW - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    x_KCHW = _smaller(x_KCHW).clamp(0, 1).expand(-1, 3, -1, -1)
    return (x_KCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _smaller(x_KCHW: Tensor) -> Tensor:
    height, width = x_KCHW.shape[-2:]
    factor = LARGEST_SIDE / max(height, width)
    if factor >= 1:
        return x_KCHW
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return torch.nn.functional.interpolate(x_KCHW, size, mode="area")
