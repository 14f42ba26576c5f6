"""Slots are the prefix in front: on tiny random models of many families, with windows, tables, caches and padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import massact as ma
from massact.models import with_attention
from massact.prefixes.construction import Folded, build, keys_and_values, refilled
from massact.prefixes.equality import in_front, prove_equal
from massact.prefixes.position_shift import Positions, apart, positions_of
from massact.records.errors import ProofError, UserError
from massact.variants.storage import load_variant
from tests.prefixes.planted import model_of, texts

IDS = (5, 7, 9)
RELATIVE = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt_neox", "cohere", "deepseek_v3", "granite")
FAMILIES = (*RELATIVE, "gpt2", "opt")


def folded_of(family: str, n: int) -> tuple[Any, Folded]:
    model = model_of(family)
    return model, build(model, IDS[:n], positions_of(model))


def logits(module: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return module(input_ids=ids, **more).logits


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_the_prefix_in_front(family: str, n: int) -> None:
    """Without any function of ours but `build`: by the plain calls of transformers."""
    model, folded = folded_of(family, n)
    text = torch.stack(texts())
    wanted = logits(model.module, in_front(IDS[:n], text))[:, n:]
    assert apart(logits(folded.model.module, text), wanted) < 1e-4
    assert apart(logits(model.module, text), wanted) > 1e-2  # the prefix matters


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_a_cache_and_padding_change_nothing(family: str) -> None:
    """Two texts of different length, padded on the left; a cache that grows, none, one of a fixed length."""
    model, folded = folded_of(family, 2)
    long, short = texts(2)
    ids = torch.stack([long, torch.cat([torch.zeros(6, dtype=torch.long), short[:14]])])
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    with torch.no_grad():
        ways: list[dict[str, Any]] = [
            {},
            {"use_cache": False},
            {"cache_implementation": "static", "disable_compile": True},
        ]
        made = [folded.model.module.generate(ids, attention_mask=mask, **given, **way) for way in ways]
        alone = [model.module.generate(in_front(IDS[:2], row[None]), **given)[0, 2:] for row in (long, short[:14])]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert torch.equal(made[0][0], alone[0]) and torch.equal(made[0][1, 6:], alone[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_holds_and_says_how_well(family: str) -> None:
    model, folded = folded_of(family, 2)
    proof = prove_equal(model, folded, texts())
    assert proof.error < 1e-4 < proof.allowed and proof.crossed and proof.n_generated >= 32 and not proof.ties
    windows = {"mistral": {1: 12, 2: 12, 3: 12}, "gemma3": {1: 8, 3: 8}, "qwen2": {2: 10, 3: 10}}
    assert proof.windows == windows.get(family, {})
    if proof.windows:
        assert max(length for length, _ in proof.lengths) > max(proof.windows.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_slots_of_another_prefix_are_refused(family: str) -> None:
    model, folded = folded_of(family, 2)
    other = refilled(folded, with_attention(model), (5, 8))
    assert prove_equal(model, other, texts()).error < 1e-4
    wrong = Folded(other.model, folded.ids, folded.positions, folded.windows)
    with pytest.raises(ProofError, match="allowed"):
        prove_equal(model, wrong, texts())


def test_a_slot_that_stays_behind_a_window_is_refused() -> None:
    model, folded = folded_of("mistral", 1)
    for module in folded.model.module.modules():
        if hasattr(module, "massact_variant"):
            module.massact_variant.options["placed"] = False  # type: ignore[union-attr,operator]
    with pytest.raises(ProofError):
        prove_equal(model, folded, texts())


def test_a_window_too_wide_to_cross_is_said() -> None:
    model = model_of("llama")
    folded = build(model, IDS[:1], positions_of(model))
    far = Folded(folded.model, folded.ids, folded.positions, {2: 4096})
    proof = prove_equal(model, far, texts())
    assert not proof.crossed and proof.windows == {2: 4096}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_16_bits_as_near_as_rounding(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    folded = build(model, IDS[:2], positions_of(model))
    proof = prove_equal(model, folded, texts())
    assert 0 < proof.error <= proof.allowed < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_read_as_any_variant(family: str, tmp_path: Path) -> None:
    _, folded = folded_of(family, 2)
    folded.model.module.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    text = torch.stack(texts())
    assert torch.equal(logits(load_variant(plain), text), logits(folded.model.module, text))


def test_the_folded_model_leaves_the_other_as_it_was() -> None:
    model = model_of("gpt2")
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    config = copy.deepcopy(model.module.config.to_dict())
    build(model, IDS[:2], positions_of(model))
    assert all(torch.equal(x, before[name]) for name, x in model.module.state_dict().items())
    assert model.module.config.to_dict() == config


# -------------------------------------------------------------------------------------------- positions
@pytest.mark.parametrize("family", RELATIVE)
def test_rotary_positions_are_relative(family: str) -> None:
    assert positions_of(model_of(family)).way == "relative"


@pytest.mark.parametrize(("family", "table", "offset"), [
    ("gpt2", "transformer.wpe", 0), ("opt", "model.decoder.embed_positions", 2),
])  # fmt: skip
def test_a_table_of_positions_is_found_and_shifted(family: str, table: str, offset: int) -> None:
    model = model_of(family)
    assert positions_of(model) == Positions("table", table, offset)
    folded = build(model, IDS[:2], positions_of(model)).model
    assert folded.context == 62 and model.context == 64
    old, new = (m.module.get_submodule(table).weight for m in (model, folded))
    assert torch.equal(new[offset:], old[offset + 2 :]) and torch.equal(new[:offset], old[:offset])


def test_a_table_that_is_no_embedding_is_refused() -> None:
    """Sinusoids are absolute, and no learned table can be shifted."""
    torch.manual_seed(0)
    config = transformers.XGLMConfig(vocab_size=99, d_model=32, ffn_dim=56, num_layers=2, attention_heads=4)
    model = ma.load(transformers.XGLMForCausalLM(config).eval())
    with pytest.raises(UserError, match="absolute"):
        positions_of(model)


# -------------------------------------------------------------------------------------------- keys and values
def test_keys_of_a_prefix_are_those_of_the_cache() -> None:
    """The oracle: what transformers keeps of a pass over the prefix alone, at positions 0 and 1."""
    model = with_attention(model_of("qwen3"))
    pairs = keys_and_values(model, IDS[:2])
    with torch.no_grad():
        cache = model.module(input_ids=torch.tensor([IDS[:2]]), use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):
        k, v = pairs[f"model.layers.{i}.self_attn"]
        torch.testing.assert_close(k, layer.keys[0])
        torch.testing.assert_close(v, layer.values[0])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "deepseek_v3"])
def test_attention_of_a_folded_model_is_seen_with_its_slots(family: str, n: int) -> None:
    """Every call is proved again, that of DeepSeek (wider keys than values) as one more column of the kernel."""
    _, folded = folded_of(family, n)
    seen = with_attention(folded.model)
    assert len(seen.anatomy.attentions) == 3 and not seen.anatomy.no_attention
    for place in seen.anatomy.attentions.values():
        assert place.via == "interface" and place.row_sum < 0.99 and place.error <= place.allowed


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_slots_can_be_trained_on(family: str) -> None:
    """Every slot has a gradient; that of GPT-2, all in 64 bits, is the slope along a direction."""
    _, folded = folded_of(family, 2)
    module = folded.model.module.double()
    slots = [p for name, p in module.named_parameters() if "massact_" in name]
    ids = torch.stack(texts(2))

    def loss() -> Tensor:
        found: Tensor = module(input_ids=ids).logits.log_softmax(-1)[..., 5].sum()
        return found

    grads = torch.autograd.grad(loss(), slots)
    assert len(slots) == 6 and all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in grads)
    if family != "gpt2":  # norms in 32 bits
        return
    step, moves = 1e-5, [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p) for p in slots]
    values = []
    with torch.no_grad():
        for far in (step, -2 * step):
            for p, move in zip(slots, moves, strict=True):
                p.add_(far * move)
            values.append(float(loss()))
    slope = sum(float((g * m).sum()) for g, m in zip(grads, moves, strict=True))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_texts_of_any_length_are_proved() -> None:
    """A text of one token does not make the others short."""
    model, folded = folded_of("llama", 1)
    long, other, *_ = texts()
    proof = prove_equal(model, folded, [torch.tensor([4]), other[:15], long])
    assert [length for length, _ in proof.lengths] == [15, 20]
    assert [length for length, _ in prove_equal(model, folded, [long[:9]]).lengths] == [9, 4]
