"""The real photographs with labels, as the real ViT wants them: prepared by hand, independent of the library."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


def photographs(folder: Path, n: int) -> tuple[Tensor, Tensor]:
    """The first n: pixels (n, 3, 224, 224) and classes (n,). Short side 249, centre 224, mean and std 0.5."""
    image = pytest.importorskip("PIL.Image")
    with open(folder / "images" / "labels.csv", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))[:n]

    def pixels(name: str) -> Tensor:
        picture = image.open(folder / "images" / name).convert("RGB")
        ratio = 249 / min(picture.size)
        picture = picture.resize([max(249, round(x * ratio)) for x in picture.size], image.BICUBIC)
        left, top = ((x - 224) // 2 for x in picture.size)
        cropped = np.asarray(picture.crop((left, top, left + 224, top + 224)))
        return (torch.tensor(cropped).permute(2, 0, 1) / 255 - 0.5) / 0.5

    return torch.stack([pixels(r["file"]) for r in listed]), torch.tensor([int(r["imagenet_class"]) for r in listed])
