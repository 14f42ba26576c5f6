"""Images made of numbers: one coloured shape on a background that says nothing, its class being shape and colour.

Most patches of such an image hold no part of the shape: it is there that Darcet et al. (2023) find patches of large
norm.

Shapes: B images, H height and W width in pixels, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.75, 0.2), "blue": (0.2, 0.25, 0.9), "yellow": (0.9, 0.85, 0.15)}
CLASSES = tuple(f"{colour}-{shape}" for shape in SHAPES for colour in COLOURS)
BACKGROUNDS = ("plain", "textured", "mixed")
RADIUS = (0.2, 0.3)  # of the shape, as shares of the image's side
JITTER, NOISE, WAVES = 0.08, 0.02, 0.15  # of a colour's channels, of every pixel, amplitude of the texture


@dataclass(frozen=True)
class Shapes:
    """Images of the task.

    Args:
        pixels_BHWC: 8-bit RGB.
        labels_B: index into `CLASSES`.
        covered_BHW: bool, whether the shape is at a pixel.
    """

    pixels_BHWC: np.ndarray
    labels_B: np.ndarray
    covered_BHW: np.ndarray

    def values(self) -> np.ndarray:
        """Pixel values from -1 to 1 as a model takes them: float32 (B, 3, H, W)."""
        x = self.pixels_BHWC.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(1 / 255)
        return np.ascontiguousarray((x - np.float32(0.5)) / np.float32(0.5))

    def background(self, patch: int) -> np.ndarray:
        """Patches (B, P), row by row, that hold no pixel of the shape."""
        B, H, W = self.covered_BHW.shape
        tiles = self.covered_BHW.reshape(B, H // patch, patch, W // patch, patch)
        return ~tiles.any((2, 4)).reshape(B, -1)


def draw_shapes(n: int, size: int, background: str, random: np.random.Generator) -> Shapes:
    """Draw images: class, place, size, shade and background of each at random.

    Args:
        n, size: B, and H = W.
        background: "plain": one grey; "textured": with waves over it; "mixed": half of each.
        random: where the draws come from.
    """
    labels_B = random.integers(len(CLASSES), size=n)
    radius_B = random.uniform(*RADIUS, n) * size
    centre_2B = random.uniform(radius_B, size - radius_B, (2, n))
    pixel = np.arange(size) + 0.5
    dy_BHW = pixel[None, :, None] - centre_2B[0][:, None, None] + np.zeros((1, 1, size))
    dx_BHW = pixel[None, None, :] - centre_2B[1][:, None, None] + np.zeros((1, size, 1))
    covered_BHW = _covered(labels_B // len(COLOURS), dy_BHW, dx_BHW, radius_B[:, None, None])
    shade_BC = np.array(list(COLOURS.values()))[labels_B % len(COLOURS)] + random.uniform(-JITTER, JITTER, (n, 3))
    grey_BHW = random.uniform(0.25, 0.75, (n, 1, 1)) + _waves(n, size, background, random)
    x_BHWC = np.where(covered_BHW[..., None], shade_BC[:, None, None], grey_BHW[..., None])
    x_BHWC = x_BHWC + random.normal(0, NOISE, x_BHWC.shape)
    return Shapes((x_BHWC.clip(0, 1) * 255).round().astype(np.uint8), labels_B, covered_BHW)


def _covered(kind_B: np.ndarray, dy: np.ndarray, dx: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Whether each image's shape, in the order of `SHAPES`, is at a pixel."""
    least, most = np.minimum(abs(dy), abs(dx)), np.maximum(abs(dy), abs(dx))
    drawn = (
        dy**2 + dx**2 < r**2,
        most < 0.85 * r,
        (dy < 0.8 * r) & (abs(dx) < 0.55 * (dy + r)),
        (least < 0.35 * r) & (most < r),
    )
    return np.choose(kind_B[:, None, None], drawn)


def _waves(n: int, size: int, background: str, random: np.random.Generator) -> np.ndarray:
    """What is added to the grey of a background: waves of one direction, length and phase for each image."""
    angle, phase = random.uniform(0, 2 * np.pi, (2, n, 1, 1))
    length = random.uniform(3, size / 2, (n, 1, 1))  # pixels
    y, x = np.mgrid[:size, :size]
    share = {"plain": 0.0, "textured": 1.0, "mixed": 0.5}[background]
    shown = random.random((n, 1, 1)) < share
    return shown * WAVES * np.sin(2 * np.pi * (np.cos(angle) * y + np.sin(angle) * x) / length + phase)
