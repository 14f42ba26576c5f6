"""Which patch each image token of a text is, and which modality a position has: proved, not counted."""

from __future__ import annotations

import torch
from torch import nn

import massact as ma
from massact.positions import tokens_of
from tests.mixed import llava, llava_inputs, qwen, qwen_inputs

PATCHES = [f"image ({r}, {c})" for r in range(4) for c in range(4)]


def test_names_of_image_tokens() -> None:
    for module in (llava(), llava("siglip", "qwen2")):
        model, corpus = ma.load(module), ma.corpus(llava_inputs())
        read = tokens_of(model, corpus, "language_model", 24)
        assert [read.token(1, t) for t in range(2, 18)] == PATCHES and read.token(1, 18).startswith("id ")
    model, corpus = ma.load(qwen()), ma.corpus(qwen_inputs())
    read = tokens_of(model, corpus, "language_model", 19)
    assert [read.token(0, t) for t in range(3, 9)] == [f"image ({r}, {c})" for r in (0, 1) for c in (0, 1, 2)]
    assert [read.token(2, t) for t in range(3, 7)] == [f"image ({r}, {c})" for r in (0, 1) for c in (0, 1)]
    assert read.modality(2, 7) == "text"  # the mark behind the image


def test_a_name_is_proved_and_not_counted() -> None:
    """Image tokens in another order than the patches are named by where they come from; mixed ones get none."""

    class Turned(nn.Module):
        def __init__(self, inner: nn.Module, mix: bool) -> None:
            super().__init__()
            self.inner, self.mix = inner, mix

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner(x).flip(1)
            return x + x.mean(1, keepdim=True) if self.mix else x

    for mix, wanted in ((False, PATCHES[::-1]), (True, [f"image {i}" for i in range(16)])):
        module = llava()
        module.model.multi_modal_projector = Turned(module.model.multi_modal_projector, mix)
        read = tokens_of(ma.load(module), ma.corpus(llava_inputs()), "language_model", 24)
        assert [read.token(0, t) for t in range(2, 18)] == wanted


def test_where_ids_do_not_tell_the_experiment_does() -> None:
    """GIT puts its image in front of the text, without placeholders."""
    import transformers

    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=12,
                  patch_size=6)  # fmt: skip
    config = transformers.GitConfig(vision_config=vision, vocab_size=99, hidden_size=32, num_hidden_layers=2,
                                    num_attention_heads=4, intermediate_size=40)  # fmt: skip
    model = ma.load(transformers.GitForCausalLM(config).eval())
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (2, 7), generator=g)
    corpus = ma.corpus({"input_ids": ids, "pixel_values": torch.randn(2, 3, 12, 12, generator=g)})
    words = next(s.name for s in model.anatomy.stacks if model.reads(s) == "input_ids")
    read = tokens_of(model, corpus, words, 11)
    assert [read.modality(0, t) for t in range(12)] == ["image"] * 5 + ["text"] * 7
