"""A scan of images out of thin air, with what a scan keeps of them; and what an explanation adds."""

from __future__ import annotations

import numpy as np
import synthetic

from massact.records.kinds.scan import ScanResult
from massact.records.tables import frame

LAYERS = (0, 1, 2, 3)
PLACES = ((0, 0), (2, 3))  # of the massive patches; 3 x 4 patches, layers 2 and 3


def scan(pictures: bool = True, stack: str = "") -> ScanResult:
    """Five images of 3 x 4 patches, of which three are kept; the first of these has no massive patch."""
    rng, result = np.random.default_rng(0), synthetic.massive()
    result.findings["stack"] = stack
    massive = np.zeros((3, 3, 4), bool)
    massive[1][PLACES[0]] = massive[2][PLACES[0]] = massive[2][PLACES[1]] = True
    norms = rng.uniform(5, 20, (3, len(LAYERS), 3, 4)).astype(np.float32)
    norms[:, 2:][np.broadcast_to(massive[:, None], (3, 2, 3, 4))] = 800
    share = np.zeros((3, 4))
    share[PLACES[0]], share[PLACES[1]] = 0.8, 0.2
    result.images = {
        "stack": np.array(stack), "patches": np.arange(1, 13), "registers": np.array([], int),
        "layers": np.array(LAYERS), "class_tokens": np.array([0]), "n_images": np.array(5), "massive_share": share,
        "massive": massive, "norms": norms,
    }  # fmt: skip
    size = rng.uniform(0.1, 2, (3, 3, 4)).astype(np.float32)
    size[massive], size[0] = 700, np.nan  # the first image has another largest dim
    result.images |= {"dim_at": np.array([3, 2533]), "dim_size": size}
    result.info.corpus = {"kind": "tensors", "source": {"kind": "images", "files": ["a/cat.png", "a/dog.png"]}}
    if pictures:
        across, down = np.meshgrid(np.arange(48), np.arange(30))
        each = [np.stack([5 * across, 8 * down, (i + 1) * (across + down)], -1) for i in range(3)]
        result.images["pictures"] = np.stack(each).astype(np.uint8)
    edges = 10 ** np.linspace(0, 3, 7)
    counts = {layer: [0, 30, 20, 0, 0, 10 * (layer > 1)] for layer in LAYERS}
    result.patch_norms = frame("patch_norms", [
        {"stack": stack, "layer": layer, "low": a, "high": b, "count": n, "share": n / 60}
        for layer in LAYERS for a, b, n in zip(edges, edges[1:], counts[layer], strict=False)])  # fmt: skip
    result.patch_cosines = frame("patch_cosines", [
        {"stack": stack, "layer": layer, "group": group, "n": 5, "mean": mean - layer / 10,
         "p10": mean - layer / 10 - 0.2, "p50": mean, "p90": mean - layer / 10 + 0.2}
        for layer in LAYERS for group, mean in (("massive", 0.2), ("other", 0.6))])  # fmt: skip
    return result


def attention(stack: str = "") -> list[dict]:
    """Rows of the table patch_attention."""
    return [{"stack": stack, "layer": layer, "query": query, "key": key, "mass": mass / layer, "n_images": 5,
             "n_keys": 2.0}
            for layer in LAYERS[1:] for query in ("class", "patches", "registers")
            for key, mass in (("class", 0.1), ("massive", 0.6), ("patches", 0.3))]  # fmt: skip
