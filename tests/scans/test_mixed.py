"""Models of images and text: both stacks are scanned, and every row says what its token is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import massact as ma
from massact.corpora import Corpus
from massact.interventions import evaluate
from massact.models import with_attention
from massact.records.errors import UserError
from massact.reports import answer_in_words
from massact.stats import Keep
from massact.trace import Probe, measure
from tests.facts import each, tells
from tests.families import build
from tests.mixed import IMAGE, llava, llava_inputs, qwen, qwen_inputs

OFF = {"null": False, "bos_contrast": False}
MANY = {"thresholds": {"magnitude": 0.0, "ratio": 3.2}, **OFF}
MODELS = {
    "llava": (llava, llava_inputs), "llava-siglip-qwen2": (lambda: llava("siglip", "qwen2"), llava_inputs),
    "qwen2-vl": (qwen, qwen_inputs), "qwen2.5-vl": (lambda: qwen("2.5"), qwen_inputs),
}  # fmt: skip
PATCHES = [f"image ({r}, {c})" for r in range(4) for c in range(4)]


def loaded(name: str) -> tuple[ma.Model, Corpus]:
    build_it, inputs = MODELS[name]
    corpus = ma.corpus(inputs())
    assert isinstance(corpus, Corpus)
    return ma.load(build_it()), corpus


def hidden_states(module: nn.Module, corpus: Corpus, path: str) -> list[list[np.ndarray]]:
    """What goes into the first block of a list and comes out of each, one sequence at a time: [layer][sequence]."""
    blocks = module.get_submodule(path)
    seen: list[list[np.ndarray]] = [[] for _ in range(len(blocks) + 1)]

    def keep(i: int, h: Any) -> None:
        h = h[0] if isinstance(h, tuple) else h
        seen[i].append(h.detach().reshape(-1, h.shape[-1]).numpy())

    handles = [blocks[0].register_forward_pre_hook(
        lambda m, a, k: keep(0, a[0] if a else k["hidden_states"]), with_kwargs=True)]  # fmt: skip
    handles += [b.register_forward_hook(lambda m, a, o, i=i: keep(i, o)) for i, b in enumerate(blocks, 1)]
    for i in range(corpus.n_sequences):
        inputs = corpus.part(i, i + 1).inputs
        if "image_grid_thw" in inputs:
            inputs = {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}
        with torch.no_grad():
            module(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_both_stacks_are_scanned_and_every_row_says_its_modality(name: str) -> None:
    model, corpus = loaded(name)
    tower, words = model.anatomy.stacks
    assert {model.reads(tower), model.reads(words)} == {"pixel_values", "input_ids"}
    result = ma.scan(model, corpus, **MANY)
    assert not result.info.notes or not any("not scanned" in note for note in result.info.notes)
    for stack in (tower, words):
        found = result.findings[result.findings["stack"] == stack.name]
        states = hidden_states(model.module, corpus, stack.path)
        assert {len(layer) for layer in states} == {corpus.n_sequences} and len(found) > 3
        wanted = {
            (layer, s, t, d)
            for layer, every in enumerate(states)
            for s, h in enumerate(every)
            for t, d in np.argwhere(np.abs(h) >= 3.2 * np.sort(np.abs(h).reshape(-1))[(h.size - 1) // 2])
        }
        assert set(zip(found.layer, found["sequence"], found.pos, found.dim, strict=True)) == wanted
        if stack is tower:
            assert set(found.modality) == {"image"}
            continue
        ids = corpus.inputs["input_ids"].numpy()[found.sequence, found.pos]
        assert list(found.modality) == ["image" if i == IMAGE else "text" for i in ids]
        assert set(found.modality) == {"image", "text"}
        peak = found[found.layer == found.loc[found.magnitude.idxmax()].layer].modality.value_counts()
        said = next(s for s in answer_in_words(result) if s.startswith(f"{words.name}: At layer"))
        assert all(f"{kind} tokens" + (f" ({n})" if len(peak) > 1 else " only") in said for kind, n in peak.items())


def test_images_of_other_sizes_do_not_reach_into_each_other() -> None:
    """Of qwen2-vl the patches of a batch are one row: each sequence is what it is alone."""
    model, corpus = loaded("qwen2-vl")
    assert corpus.packed == {"pixel_values": (24, 24, 16)} and corpus.part(1).packed == {"pixel_values": (24, 16)}
    assert corpus.part(2).inputs["pixel_values"].equal(corpus.inputs["pixel_values"][48:])
    assert [b.inputs["pixel_values"].shape[0] for b in corpus.batches(8)] == [24, 24, 16]
    together = ma.scan(model, corpus, **MANY)
    alone = ma.scan(model, corpus.part(2), **MANY)
    third = together.findings[together.findings.sequence == 2].reset_index(drop=True)
    columns = ["stack", "layer", "pos", "dim", "value", "token", "modality"]
    assert len(third) and third[columns].equals(alone.findings[columns])


def test_models_of_one_modality() -> None:
    text = ma.scan(ma.load(build("llama")), torch.randint(5, 90, (2, 9)), **MANY)
    assert set(text.findings.modality) == {"text"} and "text tokens" not in " ".join(answer_in_words(text))
    images = ma.scan(ma.load(build("vit")), {"pixel_values": torch.rand(2, 3, 20, 20)}, **MANY)
    assert set(images.findings.modality) == {"image"}


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_explain_and_intervene(name: str) -> None:
    model, corpus = loaded(name)
    tower, words = (s.name for s in model.anatomy.stacks)
    result = ma.scan(model, corpus, **MANY)
    why = ma.explain(model, corpus, result)
    assert set(why.heads["stack"]) == {tower, words} and not why.heads.mass_findings.isna().any()
    assert set(why.sinks.modality) == {"image", "text"} and why.decomposition.residual_error.max() < 1e-4
    done = ma.intervene(model, corpus, result, repetition=False)
    kl = done.effects[done.effects.metric == "kl"]
    assert len(kl) and (kl.edited > 0).any() and (done.effects.n_elements > 0).all()


def test_placeholders_are_no_targets() -> None:
    """The loss is that of the words; compared with one written out."""
    model, corpus = loaded("llava")
    nothing = ma.Edit("nudge", "language_model/3.resid_post", lambda h, batch: h * 1.0001)
    paired = evaluate(model, corpus, [nothing])
    with torch.no_grad():
        log_p = model.module(**corpus.inputs).logits[:, :-1].log_softmax(-1)
    targets = corpus.inputs["input_ids"][:, 1:]
    nll = -log_p.gather(2, targets[..., None])[..., 0]
    wanted = [float(x[t != IMAGE].mean()) for x, t in zip(nll, targets, strict=True)]
    np.testing.assert_allclose(paired.baseline["nll"], wanted, rtol=1e-5)
    assert list(paired.n_targets) == [8, 8, 8]


def test_an_edit_of_the_tower_reaches_the_features_that_are_taken_there() -> None:
    """LLaVA takes recorded hidden states: an edit is behind the record, and blocks are not skipped over it."""
    model, corpus = loaded("llava")
    with torch.no_grad():
        model.module(**corpus.inputs)  # transformers installs its recorders in the first pass
    site = ma.measure(model, corpus, [Probe("k", "language_model/0.resid_post", Keep)])
    plain = site.result("k", site.sites("k")[0]).values
    shapes = {}
    for layer in (2, 3):  # features are taken after block 2 of 3
        edit = ma.Edit("move", f"vision_tower/{layer}.resid_post", lambda h, batch: h + torch.linspace(-1, 1, 32))
        moved = measure(model, corpus, [Probe("k", "language_model/0.resid_post", Keep)], [edit])
        after = moved.result("k", moved.sites("k")[0]).values
        shapes[layer] = [np.flatnonzero((a != b).any(-1)).tolist() for a, b in zip(plain, after, strict=True)]
        paired = evaluate(model, corpus, [edit])
        assert (paired.edited["move"]["kl"] > 0).all() == (layer == 2)
    assert shapes == {2: [list(range(2, 18))] * 3, 3: [[]] * 3}


def test_grids_that_do_not_fit_are_refused() -> None:
    inputs = qwen_inputs()
    with pytest.raises(UserError, match="image_grid_thw"):
        ma.corpus(inputs | {"pixel_values": inputs["pixel_values"][:-1]})
    with pytest.raises(UserError, match=each("corpus")):
        ma.corpus(inputs | {"input_ids": inputs["input_ids"][:2]})


def test_attention_of_towers() -> None:
    """The tower of qwen2-vl is seen whole; of qwen2.5-vl the blocks that attend inside windows are not."""
    seen = with_attention(loaded("qwen2-vl")[0])
    assert len(seen.anatomy.attentions) == 6 and not seen.anatomy.no_attention
    windows = with_attention(loaded("qwen2.5-vl")[0])
    assert {str(s) for s in windows.anatomy.no_attention} == {"visual/1.attention", "visual/3.attention"}


def test_text_alone_reaches_only_the_language_model() -> None:
    model = ma.load(llava())
    result = ma.scan(model, {"input_ids": torch.randint(5, 90, (2, 9))}, **MANY)
    assert set(result.layers["stack"]) == {"language_model"}
    assert tells(result.info.notes, "'vision_tower'", "not", "scanned")


def test_images_of_another_size_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match=each("not", "images", "size")):
        ma.scan(ma.load(build("vit")), {"pixel_values": torch.rand(2, 3, 8, 8)}, **MANY)
