"""The layout of an image is found by experiment: class token, registers, grid of patches; and again under edits."""

from __future__ import annotations

import pytest
import torch

import massact as ma
from massact.corpora import Corpus
from massact.positions import layout_of, place_names, read_layout
from massact.records.errors import UserError
from massact.trace import AddedTokens, edited
from massact.training import apply_variant
from tests.families import build


def pictures() -> Corpus:
    return ma.corpus({"pixel_values": torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))})


@pytest.mark.parametrize(("name", "prefix", "registers"), [("vit", 1, ()), ("deit", 2, ()), ("dinov2", 1, ()),
                         ("dinov2_with_registers", 4, (1, 2, 3)), ("dinov3_vit", 4, (1, 2, 3)), ("clip", 1, ()),
                         ("siglip", 0, ())])  # fmt: skip
def test_layout_is_found_by_experiment(name: str, prefix: int, registers: tuple[int, ...]) -> None:
    found = read_layout(ma.load(build(name)), pictures())
    assert (found.n_prefix, found.registers, found.grid) == (prefix, registers, (5, 5))
    assert found.n_tokens == prefix + 25 and found.place(prefix + 7) == (1, 2)
    assert found.stack == ("vision_model" if name in ("clip", "siglip") else "")


def test_a_layout_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        read_layout(ma.load(build("vit")), ma.corpus(torch.randint(5, 90, (2, 9))))
    with pytest.raises(UserError, match="told apart"):
        read_layout(ma.load(build("swin")), ma.corpus({"pixel_values": torch.rand(2, 3, 32, 32)}), stack="1")


def test_names_that_are_known_are_not_those_of_a_longer_sequence() -> None:
    model, corpus = ma.load(build("dinov2_with_registers")), pictures()
    plain = place_names(model, corpus, "")
    for at, where in ((None, (29, 30)), (1, (1, 2)), (4, (4, 5))):
        with edited(model, AddedTokens("two", n=2, at=at)):
            names, layout = place_names(model, corpus, ""), layout_of(model, corpus, "")
            model.module(pixel_values=corpus.inputs["pixel_values"])
        assert names is not None and [names[i] for i in where] == [f"token {i}" for i in where]
        assert layout is not None and layout.added == where and layout.class_tokens == (0,)
        assert [names[i] for i in range(31) if i not in where] == list(plain or ())
        assert [names[p] for p in layout.registers] == ["reg1", "reg2", "reg3"]
    assert place_names(model, corpus, "") == plain
    vit = ma.load(build("vit"))
    assert len(place_names(vit, corpus, "") or ()) == 26
    changed = ma.load(apply_variant(vit.module, "sink-token"))
    after = layout_of(changed, corpus, "")
    assert after is not None and (after.registers, after.class_tokens, after.n_tokens) == ((26,), (0,), 27)
