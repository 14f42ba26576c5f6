"""How an image becomes numbers: resize, centre crop, rescale, normalise; the numbers come from the model's processor.

Shapes: H height, W width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from massact.records.errors import UserError, near

RESAMPLE = {r.name.lower(): r for r in Image.Resampling}
OPTIONS = ("resize", "crop", "resample", "mean", "std")
EXAMPLE = "--preprocess resize=256 --preprocess crop=224 --preprocess mean=0.5 --preprocess std=0.5"
# What a processor may say beside the steps that are done here, without changing the numbers of an RGB image.
_HARMLESS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_AGREE = 1e-5  # float32 and float64 round differently


@dataclass(frozen=True)
class Recipe:
    """The steps that are applied to every image, in this order, with their numbers.

    Args:
        resize: the short side in pixels (the long one is int(size long / short)), (H, W), or None for no resizing.
        crop: (H, W) of the centre crop, filled up with 0 where the image is smaller; None for none.
        resample: filter of the resizing, of Pillow, on 8-bit values.
        rescale: factor of the 8-bit values, or None.
        mean, std: of each channel, for (x - mean) / std; None for no normalising.
        processor: class or configuration that the numbers are of; 'given' where there is none.
        even: where a margin of the crop is odd, its half is rounded to even (torchvision, timm) rather than down
            (transformers): a shift of one pixel for a quarter of all sizes.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: str = "bicubic"
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    processor: str = "given"
    even: bool = False

    def apply(self, image: Image.Image) -> np.ndarray:
        """Return the pixel values (3, H, W), float32, of an RGB image.

        Raises:
            UserError: an image so narrow that it cannot be resized.
        """
        if self.resize is not None:
            image = image.resize(self._size(image), RESAMPLE[self.resample])
        values = np.asarray(image, np.uint8)
        if self.crop is not None:
            values = _cropped(values, self.crop, self.even)
        x = values.transpose(2, 0, 1).astype(np.float32)
        if self.rescale is not None:
            x = x * np.float32(self.rescale)
        if self.mean is not None and self.std is not None:
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            x = (x - mean[:, None, None]) / std[:, None, None]
        return np.ascontiguousarray(x)

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(W, H) after resizing."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        short, long = sorted(image.size)
        longer = int(self.resize * long / short)
        if self.resize * longer > Image.MAX_IMAGE_PIXELS:
            raise UserError(f"An image of {image.size[0]} x {image.size[1]} pixels is too narrow to be resized.")
        return (self.resize, longer) if image.size[0] <= image.size[1] else (longer, self.resize)

    def record(self) -> dict[str, Any]:
        """The steps and numbers, for run.json."""
        return {
            "processor": self.processor, "colours": "RGB; turned as EXIF says; transparency dropped",
            "resize": self.resize if isinstance(self.resize, int | None) else list(self.resize),
            "resample": self.resample if self.resize is not None else None,
            "crop": None if self.crop is None else list(self.crop), "rescale": self.rescale,
            "mean": None if self.mean is None else list(self.mean), "std": None if self.std is None else list(self.std),
        }  # fmt: skip


def _cropped(values_HWC: np.ndarray, size: tuple[int, int], even: bool) -> np.ndarray:
    """The centre, filled up with zeros as transformers does: the odd row goes above and left of the image."""
    for axis, want in enumerate(size):
        have = values_HWC.shape[axis]
        if have < want:
            before = math.ceil((want - have) / 2)
            widths = [(0, 0)] * 3
            widths[axis] = (before, want - have - before)
            values_HWC = np.pad(values_HWC, widths)
        else:
            first = round((have - want) / 2) if even else (have - want) // 2
            values_HWC = values_HWC.take(range(first, first + want), axis=axis)
    return values_HWC


# ------------------------------------------------------------------------------------------------------- options
def checked(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of the preprocessing as plain values: from Python, or as text from the command line.

    Args:
        asked: 'resize' (short side, or 'HxW'), 'crop' (side, or 'HxW'), 'resample' (a filter of Pillow), 'mean' and
            'std' (one number, or one for each of three channels); 'none' leaves a step out.

    Raises:
        UserError: an unknown option, or a value that is none.
    """
    known: dict[str, Any] = {}
    for name, value in (asked or {}).items():
        if name not in OPTIONS:
            raise UserError(f"There is no step {name!r} of the preprocessing.", do=near(str(name), OPTIONS))
        known[name] = _value(name, value)
    return known


def _value(name: str, value: Any) -> Any:
    text = value.strip().lower() if isinstance(value, str) else value
    if text is None or text == "none":
        if name == "resample":
            raise UserError("resample=none means nothing.", do="Leave out the resizing: resize=none.")
        return None
    if name == "resample":
        if text in RESAMPLE:
            return text
        raise UserError(f"There is no filter {value!r}.", do=near(str(text), RESAMPLE))
    try:
        if name in ("resize", "crop"):
            parts = text.split("x") if isinstance(text, str) else text if isinstance(text, Sequence) else [text]
            sizes = [int(part) for part in parts]
            if len(sizes) in (1, 2) and all(0 < size <= 1 << 14 for size in sizes):
                return sizes[0] if len(sizes) == 1 else sizes
        else:
            parts = text.split(",") if isinstance(text, str) else text if isinstance(text, Sequence) else [text]
            numbers = [float(part) for part in parts]
            good = all(math.isfinite(x) and (x > 0 or name == "mean") for x in numbers)
            if len(numbers) in (1, 3) and good:
                return numbers * 3 if len(numbers) == 1 else numbers
    except (TypeError, ValueError):
        pass
    wanted = "pixels, as 224 or 224x224" if name in ("resize", "crop") else "one number, or three with commas"
    raise UserError(f"{name}={value!r} cannot be read.", f"It must be {wanted}.", f"For example: {EXAMPLE}")


# ----------------------------------------------------------------------------------------------------- processors
def recipe_of(processor: Any, asked: Mapping[str, Any] | None = None) -> Recipe:
    """The preprocessing of a model.

    Args:
        processor: an image processor of transformers, the fields of its preprocessor_config.json, a `pretrained_cfg`
            of timm, or None.
        asked: what is to be otherwise, see `checked`.

    Raises:
        UserError: nothing says how images are prepared, or the processor does what its fields do not say.
    """
    given = checked(asked)
    if processor is None:
        missing = [name for name in ("mean", "std") if name not in given]
        if {"resize", "crop"}.isdisjoint(given):
            missing.insert(0, "resize (and crop)")
        if missing:
            raise UserError(
                f"The model does not say how images are prepared for it: {', '.join(missing)} unknown.",
                "Beside its weights there is no preprocessor_config.json.",
                f"Say it: {EXAMPLE}; in Python corpus(..., preprocess={{'resize': 256, ...}}), or give a tensor.",
            )
        known = Recipe()
    elif isinstance(processor, Mapping):
        known = _of_timm(processor) if "input_size" in processor else _of_fields(processor)
    else:
        known = _of_fields(processor.to_dict())
        if {"resize", "crop"}.isdisjoint(given):
            _prove(processor, known)
    return _replaced(known, given)


def _replaced(known: Recipe, given: Mapping[str, Any]) -> Recipe:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if isinstance(values.get("crop"), int):
        values["crop"] = (values["crop"],) * 2
    return Recipe(**(vars(known) | values))


def _of_fields(fields: Mapping[str, Any]) -> Recipe:
    name = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "image processor")
    size = fields.get("size")
    more = [k for k, v in fields.items() if k.startswith("do_") and v and k not in _HARMLESS]
    if more:
        raise _unknown(name, f"It also does {', '.join(more)}.")
    resize = crop = mean = std = None
    if fields.get("do_resize", True):
        resize = _resized(name, size)
    if fields.get("do_center_crop", False):
        crop = _square(name, fields.get("crop_size"))
    if fields.get("do_normalize", True):
        mean, std = (_channels(name, k, fields.get(k)) for k in ("image_mean", "image_std"))
    rescale = float(fields.get("rescale_factor") or 1 / 255) if fields.get("do_rescale", True) else None
    number = int(fields["resample"]) if fields.get("resample") is not None else Image.Resampling.BILINEAR
    resample = next((k for k, v in RESAMPLE.items() if v == number), None)
    if resample is None:
        raise _unknown(name, f"Its filter is {fields.get('resample')!r}.")
    return Recipe(resize, crop, resample, rescale, mean, std, name)


def _resized(name: str, size: Any) -> int | tuple[int, int]:
    if isinstance(size, Mapping):
        have = {k: int(v) for k, v in size.items() if v is not None}
        if set(have) == {"shortest_edge"}:
            return have["shortest_edge"]
        if set(have) == {"height", "width"}:
            return have["height"], have["width"]
    raise _unknown(name, f"Its size is {size!r}.")  # a bare number is a square for some and a short side for others


def _square(name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    raise _unknown(name, f"Its crop_size is {size!r}.")


def _channels(name: str, key: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, int | float):
        return (float(values),) * 3
    if isinstance(values, Sequence) and len(values) == 3:
        return tuple(float(x) for x in values)
    raise _unknown(name, f"Its {key} is {values!r}, not one number for each of three channels.")


def _of_timm(cfg: Mapping[str, Any]) -> Recipe:
    """timm: the short side is floor(size / crop_pct), then a centre crop; mode 'squash' resizes to (H, W) instead."""
    name, size = "timm pretrained_cfg", [int(x) for x in cfg["input_size"]]
    if len(size) != 3 or size[0] != 3:
        raise _unknown(name, f"Its input_size is {size}.")
    larger = [math.floor(x / float(cfg.get("crop_pct") or 0.875)) for x in size[1:]]
    mode = cfg.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (mode == "center" and larger[0] != larger[1]):
        raise _unknown(name, f"Its crop_mode is {mode!r}, its input_size {size}.")
    resample = str(cfg.get("interpolation") or "bicubic")
    if resample not in RESAMPLE:
        raise _unknown(name, f"Its interpolation is {resample!r}.")
    mean, std = (_channels(name, k, cfg.get(k)) for k in ("mean", "std"))
    resize = (larger[0], larger[1]) if mode == "squash" else larger[0]
    return Recipe(resize, (size[1], size[2]), resample, 1 / 255, mean, std, name, even=True)


def _prove(processor: Any, recipe: Recipe) -> None:
    """Compare the steps with the processor itself on two images of noise: some classes do more than they say."""
    random = np.random.default_rng(0)
    for shape in ((45, 61, 3), (310, 270, 3)):
        image = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        theirs = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0]
        ours = recipe.apply(image)
        if theirs.shape != ours.shape or float(np.abs(theirs - ours).max()) > _AGREE * max(1.0, np.abs(theirs).max()):
            raise _unknown(recipe.processor, "Its pixel values are others than its fields say.")


def _unknown(name: str, why: str) -> UserError:
    return UserError(
        f"Images cannot be prepared as {name} does.",
        why,
        f"Give corpus({{'pixel_values': tensor}}) made by it, or say the steps: {EXAMPLE}",
    )
