"""LLaVA-NeXT: the small whole image, the tiles without their padding, and a mark at the end of each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import massact as ma
from massact.positions import tokens_of
from tests.mixed import _TEXT, IMAGE

SIDE = 4  # patches of a tile, which has 24 x 24 pixels


def llava_next() -> nn.Module:
    v: Any = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=24,
                  patch_size=6)  # fmt: skip
    words = transformers.LlamaConfig(**_TEXT | {"max_position_embeddings": 256})
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**v, projection_dim=32), text_config=words,
        image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaNextForConditionalGeneration(config).eval()


def rows_and_columns(height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that are left of the tiles without their padding, by hand: the image keeps its shape,
    and what it leaves over of the tiles is cut off on both sides alike."""
    rows, columns = grid[0] * SIDE, grid[1] * SIDE
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - kept) // 2), columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - kept) // 2)


def expected(height: int, width: int, grid: tuple[int, int]) -> list[str]:
    names = [f"base ({r}, {c})" for r in range(SIDE) for c in range(SIDE)]
    rows, columns = rows_and_columns(height, width, grid)
    for r in range(rows):
        names += [*(f"({r}, {c})" for c in range(columns)), f"newline {r}"]
    return names


def inputs(images: list[tuple[int, int, tuple[int, int]]], n_tokens: list[int]) -> dict[str, Tensor]:
    """One text with images between words; tiles are filled up to as many as the greatest image has."""
    most = max(1 + g[0] * g[1] for *_, g in images)
    g = torch.Generator().manual_seed(1)
    parts = [torch.tensor([1, 7])] + [x for n in n_tokens for x in (torch.full((n,), IMAGE), torch.tensor([9, 11]))]
    return {"input_ids": torch.cat(parts)[None], "pixel_values": torch.randn(len(images), most, 3, 24, 24, generator=g),
            "image_sizes": torch.tensor([(h, w) for h, w, _ in images])}  # fmt: skip


@pytest.mark.parametrize("image", [(40, 44, (2, 2)), (20, 46, (1, 2)), (47, 30, (2, 2))])
def test_tokens_of_one_image(image: tuple[int, int, tuple[int, int]]) -> None:
    want = expected(*image)
    model, given = ma.load(llava_next()), inputs([image], [len(want)])
    stack = model.anatomy.stacks[-1].name
    read = tokens_of(model, ma.corpus(given), stack, given["input_ids"].shape[1] - 1)
    assert [read.token(0, 2 + i) for i in range(len(want))] == [f"image {name}" for name in want]
    assert read.modality(0, 2) == "image" and read.modality(0, 1) == "text"


def test_two_images_of_other_sizes_and_a_planted_activation() -> None:
    """A huge value at one token of the second image is found there, under its name."""
    images = [(40, 44, (2, 2)), (20, 46, (1, 2))]
    names = [expected(*image) for image in images]
    given = inputs(images, [len(n) for n in names])
    at = 2 + len(names[0]) + 2 + 16 + 5  # in the row of the tiles that begins behind the 16 of the base
    module = llava_next()
    inner = module.model.language_model.layers[0].mlp

    class Planted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = inner(x).clone()
            if out.shape[1] > at:
                out[:, at, 5] = 4000.0
            return out

    module.model.language_model.layers[0].mlp = Planted()
    model, corpus = ma.load(module), ma.corpus(given)
    assert corpus.n_images(0) == 2
    found = ma.scan(model, corpus, null=False, bos_contrast=False).findings
    want = "image#2 " + names[1][16 + 5]
    mine = found[found.layer == 1]
    assert [(r.pos, r.dim, r.token, r.modality) for r in mine.itertuples()] == [(at, 5, want, "image")]
