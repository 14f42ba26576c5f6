"""Every position of a model of images is named, by experiment and not by its family; else it is 'token 17'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import massact as ma
from massact.corpora import Corpus
from massact.positions import place_names, tokens_of
from massact.stats import Keep
from massact.trace import Probe, measure
from tests.families import build

OFF = {"null": False, "bos_contrast": False}
PATCHES = [f"patch ({r}, {c})" for r in range(5) for c in range(5)]
LAYOUTS = {
    "vit": ("", ["[CLS]"]), "deit": ("", ["[CLS]", "[DIST]"]), "dinov2": ("", ["[CLS]"]),
    "dinov2_with_registers": ("", ["[CLS]", "reg1", "reg2", "reg3"]),
    "dinov3_vit": ("", ["[CLS]", "reg1", "reg2", "reg3"]),
    "clip": ("vision_model", ["[CLS]"]), "siglip": ("vision_model", []),
}  # fmt: skip


def corpus_of(size: tuple[int, int] = (20, 20), n: int = 2) -> Corpus:
    made = ma.corpus({"pixel_values": torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(5))})
    assert isinstance(made, Corpus)
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    stack, extra = LAYOUTS[name]
    model, corpus = ma.load(build(name)), corpus_of()
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    names = place_names(model, corpus, stack)
    assert names == (*extra, *PATCHES)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())  # as it was
    # And so it is: other pixels in one patch change the position of that name, and no other.
    image = corpus.inputs["pixel_values"][:1]
    other = image.clone()
    other[:, :, 8:12, 16:20] += 1.0
    site = f"{stack}/0.resid_post" if stack else "0.resid_post"
    measured = measure(model, ma.corpus({"pixel_values": torch.cat([image, other])}), [Probe("k", site, Keep)])
    one, two = measured.result("k", next(iter(measured.sites("k")))).values
    assert [names[t] for t in np.flatnonzero((one != two).any(-1))] == ["patch (2, 4)"]


def test_images_of_another_shape() -> None:
    names = place_names(ma.load(build("dinov3_vit")), corpus_of((12, 28)), "")
    assert names is not None and names[4:6] == ("patch (0, 0)", "patch (0, 1)") and names[-1] == "patch (2, 6)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    names = place_names(ma.load(build("dinov2_with_registers").to(dtype)), corpus_of(), "")
    assert names == ("[CLS]", "reg1", "reg2", "reg3", *PATCHES)


def test_what_cannot_be_told_apart_has_no_name() -> None:
    """Masked autoencoders keep some patches in random order; the second stage of Swin has mixed them."""
    masked = ma.load(build("vit_mae"))
    assert {place_names(masked, corpus_of(), s.name) for s in masked.anatomy.stacks} == {None}
    swin = ma.load(build("swin"))
    assert place_names(swin, corpus_of((32, 32)), "1") is None
    read = tokens_of(swin, corpus_of((32, 32)), "1", 63)
    assert read.token(0, 17) == "token 17" and read.position_class(0, 17) == "other"
    text = ma.load(build("gpt2"))
    assert place_names(text, ma.corpus(torch.ones(1, 4, dtype=torch.long)), "") is None


class Odd(nn.Module):
    """Columns first, the learned token last and without a telling name: only the experiment can know."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.register_parameter(name, nn.Parameter(torch.randn(1, 1, 16)))
        self.name = name
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
                                    for _ in range(3))  # fmt: skip

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).transpose(2, 3).flatten(2).transpose(1, 2)
        x = torch.cat([x, getattr(self, self.name).expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("name", "last"), [("cls_token", "[CLS]"), ("reg_token", "reg1"), ("spare", "token 6")])
def test_a_module_of_ones_own(name: str, last: str) -> None:
    image = torch.rand(2, 3, 12, 8)
    model = ma.load(Odd(name), inputs={"image": image})
    names = place_names(model, ma.corpus({"image": image}), "")
    assert names == (*(f"patch ({r}, {c})" for c in range(2) for r in range(3)), last)


def test_findings_coordinates_and_words_show_the_names() -> None:
    model = ma.load(build("dinov2_with_registers"))
    result = ma.scan(model, corpus_of(n=3), thresholds={"magnitude": 0.0, "ratio": 2.5}, **OFF)
    names = np.array(["[CLS]", "reg1", "reg2", "reg3", *PATCHES])
    found = result.findings
    assert len(found) > 20 and list(found.token) == list(names[found.pos])
    assert set(found.position_class) <= {"start", "other"}
    assert list(result.portrait["tokens"]) == list(names)
    assert any(t in str(result.coordinates.tokens.iloc[0]) for t in names)
    assert result.info.answer["stacks"][0]["peak"]["token"] in names
