"""Columns of the tables about patches of images: a scan adds the first two, its explanation the last.

They are missing where there are no patches, and in runs that are older than they are.
"""

from __future__ import annotations

_LAYER = {"stack": ("string", "name of the stack"), "layer": ("int64", "layer; 0 is the embedding output")}

PATCH_TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "patch_norms": {
        **_LAYER,
        "low": ("float64", "L2 norm at the lower end of the bin; the bins are the same at all layers"),
        "high": ("float64", "at its upper end"),
        "count": ("int64", "patches of all images in the bin"),
        "share": ("float64", "count / all patches of that layer; norms of 0 are in no bin"),
    },
    "patch_cosines": {
        **_LAYER,
        "group": ("string", "massive (a finding on the patch, at any layer), or other"),
        "n": ("int64", "patches of all images"),
        "mean": ("float64", "mean cosine of a patch to the patches above, below, left and right of it"),
        "p10": ("float64", "10 % of the patches lie below"),
        "p50": ("float64", "median"),
        "p90": ("float64", "90 % of the patches lie below"),
    },
    "patch_attention": {
        **_LAYER,
        "query": ("string", "who attends: class, registers, massive, added, patches (all others)"),
        "key": ("string", "to what: the same groups, or slot (a learned sink that is no token)"),
        "mass": ("float64", "probability, summed over the keys; mean over heads and queries, then over images"),
        "n_images": ("int64", "images that have both groups"),
        "n_keys": ("float64", "keys of the group, mean over these images"),
    },
}  # fmt: skip
