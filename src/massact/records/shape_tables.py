"""The tables that the vision toy lab records. NaN: not there or not seen, never zero."""

from __future__ import annotations

_TO = {
    "class": "the class token", "registers": "all registers together", "slot": "an extra slot",
    "top_patch": "the patch that gets most from class token and patches together",
}  # fmt: skip
_SIZES = {
    "top1": ("float64", "greatest |h|, in any image"),
    "ratio": ("float64", "greatest |h| / median |h|, mean over images"),
    "massive": ("float64", "share of images with |h| > 100 and |h| >= 1000 x median (sun2024)"),
    "patch_norm_ratio": ("float64", "norm of the largest patch / median norm of the patches, mean over images"),
    "outliers": ("float64", "share of patches whose norm is above 4 x the median of all patches of all images"),
}
SHAPE_TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "shapes": {
        "arm": ("string", "attention variant, with +registers where there are some"),
        "step": ("int64", "optimizer steps done"),
        "nats": ("float64", "held-out loss"),
        "accuracy": ("float64", "share of held-out images whose class is named"),
        **{name: (kind, f"{said}; of the first 64 images, greatest of the layers from 1 on")
           for name, (kind, said) in _SIZES.items()},
        "wall_s": ("float64", "seconds since the start of this training"),
    },
    "shapes_layers": {
        "arm": ("string", "attention variant, with +registers where there are some"),
        "layer": ("int64", "residual stream after this block, at the end of training; 0: before the first"),
        **_SIZES,
        "at_class": ("float64", "share of images whose greatest |h| is at the class token"),
        "at_registers": ("float64", "the same at a register"),
        "class_norm_ratio": ("float64", "norm of the class token / median norm of the patches, mean over images"),
        "register_norm_ratio": ("float64", "the same of the largest register"),
        "largest_on_background": ("float64", "share of images whose patch of largest norm holds no part of the shape"),
        **{f"{query}_to_{key}": ("float64", f"attention of {said} on {_TO[key]}, mean over heads and images, in the "
                                 "block that ends here") for query, said in
           (("class", "the class token"), ("patches", "the patches")) for key in _TO},
        "top_on_background": ("float64", "share of images whose most attended patch holds no part of the shape"),
    },
    "shapes_effects": {
        "arm": ("string", "attention variant, with +registers where there are some"),
        "layer": ("int64", "states after this block were edited"),
        "target": ("string", "registers, top patch (most attended in the next block), or what each is compared with: "
                   "other patches (as many, of the background), another patch (on the shape or not, as the top patch)"),
        "edit": ("string", "zero, or mean (over the images)"),
        "tokens": ("int64", "states that were edited in each image"),
        "cosine": ("float64", "of these states and their mean, mean over images: 1 for constants"),
        "baseline_nats": ("float64", "loss without the edit"),
        "delta_nats": ("float64", "its change"),
        "ci_low": ("float64", "95 % interval of that over images, of one training"),
        "ci_high": ("float64", "its upper end"),
        "baseline_accuracy": ("float64", "share of classes that are named without the edit"),
        "delta_accuracy": ("float64", "its change"),
        "accuracy_low": ("float64", "95 % interval of that over images, of one training"),
        "accuracy_high": ("float64", "its upper end"),
        "n_images": ("int64", "held-out images"),
    },
}  # fmt: skip
