"""Patches in one row for all images: each by its row and column, as the processor of these models lays them out."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.positions import tokens_of
from massact.positions.patch_grids import merged_order, packed_names
from massact.records.errors import UserError
from tests.facts import tells
from tests.mixed import IMAGE, llava, llava_inputs, qwen, qwen_inputs


def naive(rows: int, columns: int) -> list[tuple[int, int]]:
    """Squares of 2 x 2 from left to right and top to bottom, inside each the same, written out."""
    return [
        (2 * i + a, 2 * j + b) for i in range(rows // 2) for j in range(columns // 2) for a in (0, 1) for b in (0, 1)
    ]


@pytest.mark.parametrize("grid", [(4, 6), (2, 2), (8, 4)])
def test_the_order_is_that_of_the_processor(grid: tuple[int, int]) -> None:
    """An image whose patches are of one colour each, the number of the patch: where does the processor put it?"""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rows, columns = grid
    number = np.kron(np.arange(rows * columns).reshape(rows, columns), np.ones((4, 4))).astype(np.uint8)
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=16,
                                         max_pixels=10**6, do_rescale=False, do_normalize=False)  # fmt: skip
    made = processor(images=[np.stack([number] * 3, -1)], return_tensors="np")
    assert made["image_grid_thw"].tolist() == [[1, rows, columns]]
    placed = [divmod(int(row.mean()), columns) for row in made["pixel_values"]]
    assert placed == merged_order(rows, columns, 2) == naive(rows, columns)


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_each_position_is_named_by_the_patch_that_moves_it(version: str) -> None:
    """One patch changed at a time, against all at once by bits; Qwen2.5-VL puts its patches in windows first."""
    grids = ((4, 6), (8, 8), (4, 4))
    model, inputs = ma.load(qwen(version)), qwen_inputs(grids)
    corpus = ma.corpus(inputs)
    tower = next(s for s in model.anatomy.stacks if model.reads(s) == "pixel_values")
    found, start = packed_names(model, corpus, tower.name), 0
    assert found is not None
    for s, (rows, columns) in enumerate(grids):
        x, grid = inputs["pixel_values"][start : start + rows * columns], inputs["image_grid_thw"][s : s + 1]
        start += rows * columns
        want = [""] * len(x)
        before = layer_0(model.module, tower.path, x, grid)
        for k, (r, c) in enumerate(naive(rows, columns)):
            other = x.clone()
            other[k] += 1
            (at,) = (layer_0(model.module, tower.path, other, grid) != before).any(-1).nonzero().flatten().tolist()
            want[at] = f"patch ({r}, {c})"
        assert list(found[s]) == want
    assert (list(found[1]) != [f"patch ({r}, {c})" for r, c in naive(8, 8)]) == (version == "2.5")


def layer_0(module: nn.Module, blocks: str, x: Tensor, grid: Tensor) -> Tensor:
    """What the first block of a tower is given."""
    seen: list[Tensor] = []
    first = module.get_submodule(blocks)[0]
    handle = first.register_forward_pre_hook(lambda _, args, kw: seen.append((args or tuple(kw.values()))[0].clone()),
                                             with_kwargs=True)  # fmt: skip
    with torch.no_grad():
        module.get_image_features(x, grid)
    handle.remove()
    return seen[0]


class Planted(nn.Module):
    """A sublayer that also writes one huge value."""

    def __init__(self, inner: nn.Module, pos: int, dim: int) -> None:
        super().__init__()
        self.inner, self.pos, self.dim = inner, pos, dim

    def forward(self, *args: Tensor, **kw: Tensor) -> Tensor:
        out = self.inner(*args, **kw).clone()
        out.reshape(-1, out.shape[-1])[self.pos, self.dim] = 4000.0
        return out


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_a_planted_activation_is_found_at_its_patch(version: str) -> None:
    module = qwen(version)
    blocks = module.model.visual.blocks
    blocks[1].mlp = Planted(blocks[1].mlp, 9, 5)
    model, corpus = ma.load(module), ma.corpus(qwen_inputs(((4, 6), (4, 4), (4, 4))))
    tower = next(s for s in model.anatomy.stacks if model.reads(s) == "pixel_values").name
    names = packed_names(model, corpus, tower)
    assert names is not None
    found = ma.scan(model, corpus, null=False, bos_contrast=False).findings
    mine = found[(found["stack"] == tower) & (found.layer == 2)]
    assert [(r.sequence, r.pos, r.dim, r.token) for r in mine.itertuples()] == [
        (s, 9, 5, names[s][9]) for s in range(3)
    ]
    if version == "2":
        assert [n[9] for n in names] == ["patch (0, 5)", "patch (2, 1)", "patch (2, 1)"]


def two_images(grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    """One text with images of these grids, a word between them."""
    parts = [torch.tensor([1, 7])]
    for r, c in grids:
        parts += [torch.tensor([97]), torch.full((r * c // 4,), IMAGE), torch.tensor([98, 9])]
    g = torch.Generator().manual_seed(2)
    pixels = torch.randn(sum(r * c for r, c in grids), 96, generator=g)
    return {"input_ids": torch.cat(parts)[None], "pixel_values": pixels,
            "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}  # fmt: skip


def test_several_images_a_sequence_of_packed_patches() -> None:
    """Each image is numbered, in the text and in the tower; hidden states are those of the model run by itself."""
    grids = [(4, 6), (4, 4)]
    one, model = two_images(grids), ma.load(qwen())
    n = one["input_ids"].shape[1]
    twice = {k: torch.cat([x, x]) for k, x in one.items()}
    corpus = ma.corpus(twice)
    assert corpus.n_sequences == 2 and corpus.n_images(1) == 2
    words = tokens_of(model, corpus, "language_model", n - 1)
    want = [f"image#{i} ({r}, {c})" for i, (h, w) in enumerate(grids, 1) for r in range(h // 2) for c in range(w // 2)]
    at = (one["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    assert [words.token(1, t) for t in at] == want
    tower = next(s for s in model.anatomy.stacks if model.reads(s) == "pixel_values").name
    read = tokens_of(model, corpus, tower, 39)
    assert [read.token(0, p) for p in range(40)] == [
        f"image#{i} patch ({r}, {c})" for i, grid in enumerate(grids, 1) for r, c in naive(*grid)
    ]
    scan = ma.scan(model, corpus, null=False, bos_contrast=False)
    with torch.no_grad():
        hidden = model.module(**one, mm_token_type_ids=(one["input_ids"] == IMAGE).long(), output_hidden_states=True)
    norms = [float(h.abs().max()) for h in hidden.hidden_states[1:-1]]
    layers = scan.layers[(scan.layers["stack"] == "language_model") & (scan.layers.site == "resid_post")].set_index(
        "layer"
    )
    np.testing.assert_allclose([layers.top1[i + 1] for i in range(len(norms))], norms, rtol=1e-5)


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_attention_of_several_images_is_unavailable_in_such_a_tower(version: str) -> None:
    """It is one call for each image there; in the text it is seen as ever."""
    one, model = two_images([(4, 6), (4, 4)]), ma.load(qwen(version))
    corpus = ma.corpus({k: torch.cat([x, x]) for k, x in one.items()})
    scan = ma.scan(model, corpus, thresholds={"magnitude": 0.0, "ratio": 2.0}, null=False, bos_contrast=False)
    why = ma.explain(model, corpus, scan)
    assert set(why.heads["stack"]) == {"language_model"}
    assert any(tells(note, "visual", "images") for note in why.info.notes)
    ma.intervene(model, corpus, scan, sets=("zero",), stack="language_model", repetition=False)


def test_as_many_images_as_a_text_has() -> None:
    """n_images says how many each has; numbers that do not fit are refused."""
    a, b = two_images([(4, 4), (4, 4)]), two_images([(4, 4)])
    width = a["input_ids"].shape[1]
    b["input_ids"] = torch.nn.functional.pad(b["input_ids"], (0, width - b["input_ids"].shape[1]), value=9)
    both = {k: torch.cat([a[k], b[k]]) for k in a}
    corpus = ma.corpus(both | {"n_images": torch.tensor([2, 1])})
    assert [corpus.n_images(s) for s in (0, 1)] == [2, 1] and corpus.packed["pixel_values"] == (32, 16)
    model = ma.load(qwen())
    read = tokens_of(model, corpus, "language_model", width - 1)
    assert (read.token(0, 3), read.token(1, 3)) == ("image#1 (0, 0)", "image (0, 0)")
    ma.scan(model, corpus, null=False, bos_contrast=False)
    for wrong in ([1, 1], [3, 0], [2]):
        with pytest.raises(UserError, match="3 images for 2"):
            ma.corpus(both | {"n_images": torch.tensor(wrong)})
    with pytest.raises(UserError):
        ma.corpus(both)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_several_images_a_sequence_of_a_tower_with_a_row_for_each(vision: str) -> None:
    """LLaVA: its tower has two rows for one text; they are one sequence of twice as many positions."""
    module = llava(vision)
    inputs = llava_inputs(2)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, 1:]], 1)
    g = torch.Generator().manual_seed(3)
    pixels = torch.randn(4, 3, 24, 24, generator=g)
    layers = (
        module.model.vision_tower.vision_model.encoder.layers
        if hasattr(module.model.vision_tower, "vision_model")
        else module.model.vision_tower.encoder.layers
    )
    per = 17 if vision == "clip" else 16
    layers[0].mlp = Planted(layers[0].mlp, per + 6, 5)  # of the second image
    model, corpus = ma.load(module), ma.corpus({"input_ids": ids, "pixel_values": pixels})
    words = tokens_of(model, corpus, "language_model", ids.shape[1] - 1)
    at = (ids[0] == IMAGE).nonzero().flatten().tolist()
    want = [f"image#{i} ({r}, {c})" for i in (1, 2) for r, c in product(range(4), range(4))]
    assert [words.token(1, t) for t in at] == want
    scan = ma.scan(model, corpus, null=False, bos_contrast=False)
    tower = next(s for s in model.anatomy.stacks if model.reads(s) == "pixel_values").name
    mine = scan.findings[(scan.findings["stack"] == tower) & (scan.findings.layer == 1)]
    row, column = divmod(6 - (per - 16), 4)
    name = f"image#2 patch ({row}, {column})"
    assert [(r.sequence, r.pos, r.dim, r.token) for r in mine.itertuples()] == [(s, per + 6, 5, name) for s in (0, 1)]
    why = ma.explain(model, corpus, scan)
    heads = why.heads[(why.heads["stack"] == tower) & (why.heads.layer == 1)]
    assert len(heads) == 4 and heads.mass_first.between(0, 1).all()
    done = ma.intervene(model, corpus, scan, sets=("zero",), stack=tower, repetition=False, hold_out=False)
    assert (done.effects.n_elements == 2).all()
