"""Registers at test time: the planted neuron is found and moved; added tokens alone do nothing; nothing is left."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.explanations import attention_shares
from massact.interventions import cut_attention, evaluate, moved_neurons, register_neurons
from massact.interventions import test_time_registers as with_registers
from massact.models import Model, with_attention
from massact.positions import read_layout
from massact.records.errors import UserError, WorkError
from massact.scans import marked, outlier_patches, patch_maps
from massact.trace import AddedTokens, Edit, edited
from tests.facts import each
from tests.families import build
from tests.photographs import photographs
from tests.planted_images import DIM, LAYER, NEURON, SIZE, Planted, images


@cache
def planted() -> Model:
    return ma.load(Planted(), inputs={"pixel_values": images(2, seed=9)[0]})


def hidden(m: Model, x: Tensor, layer: int) -> Tensor:
    """What a block gives, with whatever tokens it has."""
    seen: list[Tensor] = []
    handle = m.module.blocks[layer - 1].register_forward_hook(lambda _, __, out: seen.append(out.clone()), prepend=True)
    with torch.no_grad():
        m.module(x)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------------------- planted truth
def test_the_planted_neuron_is_found_first() -> None:
    x, bright = images()
    m, corpus = planted(), ma.corpus({"pixel_values": x})
    layout = read_layout(m, corpus)
    maps = patch_maps(m, corpus, layout)
    assert outlier_patches(maps) == bright
    assert outlier_patches(maps, threshold=1e9) == {i: [] for i in range(6)}
    table = register_neurons(m, corpus, bright, layout, batch_size=2)
    assert (table["layer"][0], table["neuron"][0]) == (LAYER, NEURON)
    assert table["elsewhere"][0] == 0 and table["activation"][0] == pytest.approx(40, rel=0.1)
    # All of them, against a loop.
    acts: list[Tensor] = []
    handles = [b.down.register_forward_pre_hook(lambda _, args: acts.append(args[0].clone())) for b in m.module.blocks]
    with torch.no_grad():
        m.module(x)
    for handle in handles:
        handle.remove()
    naive = np.array([[abs(a[i, p].double().numpy()) for i, at in bright.items() for p in at] for a in acts]).mean(1)
    for row in table.itertuples():
        assert row.activation == pytest.approx(naive[row.layer - 1, row.neuron], rel=1e-5, abs=1e-7)
    assert len(table) == naive.size and table["activation"].is_monotonic_decreasing
    assert set(register_neurons(m, corpus, bright, layout, layers=[1, 3])["layer"]) == {1, 3}
    with pytest.raises(UserError, match="No patch"):
        register_neurons(m, corpus, {0: []}, layout)


@pytest.mark.parametrize("n", [1, 3])
def test_moved_the_patches_lose_it_and_the_added_token_has_it(n: int) -> None:
    m, (x, bright) = planted(), images()
    before = hidden(m, x, LAYER)
    assert all(before[i, at, DIM].min() > 0.9 * SIZE for i, at in bright.items())
    with torch.no_grad():
        plain = m.module(x)
        with with_registers(m, [(LAYER, NEURON)], n) as fired:
            after, last = hidden(m, x, LAYER), hidden(m, x, 3)
            assert m.module(x).shape == plain.shape
        assert torch.equal(m.module(x), plain), "bit for bit as before"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in m.module.modules())
    assert after.shape == last.shape == (6, 10 + n, 16), "every block has the added tokens, the last one too"
    assert after[:, :10, DIM].abs().max() < 1
    for i, at in bright.items():
        torch.testing.assert_close(after[i, 10:, DIM], before[i, at, DIM].max().expand(n), rtol=0.02, atol=1)
    assert fired[0].n_elements > 0


def test_a_model_that_ignores_it_gives_the_same_logits() -> None:
    """The head does not read the massive dim; with nobody attending to the token, logits are what they were."""
    m, (x, _) = with_attention(planted()), images()
    blind = Planted()
    with torch.no_grad():
        for block in blind.blocks:
            block.qkv.weight[:, DIM] = 0
    one = with_attention(ma.load(blind, inputs={"pixel_values": x[:2]}))
    edits = [moved_neurons(one, [(LAYER, NEURON)]), cut_attention([10])]
    with torch.no_grad():
        plain = one.module(x)
        with edited(one, *edits):
            torch.testing.assert_close(one.module(x), plain, rtol=1e-5, atol=1e-6)
        with edited(m, moved_neurons(m, [(LAYER, NEURON)])):
            assert not torch.allclose(m.module(x), planted_logits(x), atol=1e-4), "one that reads it does not"


def planted_logits(x: Tensor) -> Tensor:
    with torch.no_grad():
        return Planted().eval()(x)


def test_an_activation_goes_with_its_sign() -> None:
    m, (x, _) = planted(), images(2)
    move = moved_neurons(m, [(1, 3), (1, 4), (2, 0)], 2)
    assert [e.site for e in move.edits[1:]] == ["1.mlp_act", "2.mlp_act"]
    a = torch.zeros(2, 12, 24)
    a[0, 4, 3], a[0, 5, 3], a[1, 0, 4] = -7.0, 5.0, 2.0
    a[:, 10:] = 99.0  # what the added tokens have is not looked at
    new = move.edits[1].apply(a, None)
    assert new[0, 10:, 3].tolist() == [-7, -7] and new[1, 10:, 4].tolist() == [2, 2]
    assert (
        (new[:, :10, [3, 4]] == 0).all()
        and (new[:, 10:, 5] == 99).all()
        and torch.equal(a[:, 10:], torch.full((2, 2, 24), 99.0))
    )
    with pytest.raises(UserError, match="no neuron 24"), edited(m, moved_neurons(m, [(1, 24)])):
        m.module(x)
    with pytest.raises(UserError, match="no neurons"):
        moved_neurons(m, [])
    with pytest.raises(UserError, match="No site matches"):
        moved_neurons(m, [(9, 1)])


def test_nothing_moved_is_an_error_and_tokens_alone_are_an_edit() -> None:
    m, (x, _) = planted(), images()
    with pytest.raises(WorkError, match="changed nothing"), with_registers(m, [(LAYER, NEURON)]):
        m.module(x.clamp(max=0.1))
    alone = moved_neurons(m, [], n=2, tokens_only=True)
    with pytest.raises(UserError, match="already"), edited(m, alone, AddedTokens("more")):
        pass
    with edited(m, alone) as fired, torch.no_grad():
        m.module(x)
    assert (fired[0].n_calls, fired[0].n_elements) == (1, 6 * 2 * 16)


def test_evaluated_like_any_other_edit() -> None:
    m, x = ma.load(build("vit")), torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    edits = [moved_neurons(m, [(1, 2), (3, 4)]), moved_neurons(m, [], tokens_only=True)]
    paired = evaluate(m, ma.corpus({"pixel_values": x}), edits, labels=torch.tensor([0, 1, 0, 1, 1]), batch_size=2)
    with torch.no_grad(), edited(m, edits[0]):
        alone = torch.cat([m.module(pixel_values=x[i : i + 1]).logits for i in range(5)])
    want = alone.argmax(-1) == torch.tensor([0, 1, 0, 1, 1])
    assert paired.edited[edits[0].name]["accuracy"].tolist() == want.tolist()
    assert paired.fired[edits[0].name].n_calls == 3 * 3 and paired.fired[edits[1].name].n_elements == 5 * 32


# ------------------------------------------------------------------------------------ added tokens, in all families
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "siglip"])
def test_tokens_that_nobody_attends_to_do_nothing(name: str) -> None:
    m = with_attention(ma.load(build(name)))
    stack = m.anatomy.stacks[[s.name for s in m.anatomy.stacks].index("vision_model")] if name in ("clip", "siglip") \
        else m.anatomy.stacks[0]  # fmt: skip
    given = m.example
    move = moved_neurons(m, [(1, 2)], n=2)
    added = move.edits[0]
    with torch.no_grad():
        plain = m.module(**given)
        site = f"{stack.name}/*.attention" if stack.name else "*.attention"
        n_tokens = read_layout(m, ma.corpus({"pixel_values": given["pixel_values"]})).n_tokens
        begin = n_tokens if added.at is None else added.at
        with edited(m, added, cut_attention([begin, begin + 1], site)):
            cut = m.module(**given)
        with edited(m, move):
            moved = m.module(**given)
        again = m.module(**given)
    for key, value in plain.items():
        if isinstance(value, Tensor):
            assert moved[key].shape == value.shape and torch.equal(again[key], value)
            torch.testing.assert_close(cut[key], value, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(moved[k], v) for k, v in plain.items() if isinstance(v, Tensor))


def test_rotary_positions_put_the_token_in_front_or_are_refused() -> None:
    module = build("dinov3_vit")
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                p.mul_(8)
    m = ma.load(module)
    corpus = ma.corpus({"pixel_values": torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))})
    layout = read_layout(m, corpus)
    maps, plain = patch_maps(m, corpus, layout), attention_shares(m, corpus, layout, {0: [5]})
    assert moved_neurons(m, [(3, 2)]).edits[0].at == 1
    with pytest.raises(UserError, match=each("by themselves")):
        moved_neurons(m, [(3, 2)], at=29)
    with with_registers(m, [(3, 2)], 2):
        now = read_layout(m, corpus)
        assert (now.added, now.registers, now.n_prefix, now.class_tokens) == ((1, 2), (3, 4, 5), 6, (0,))
        after, shares = patch_maps(m, corpus, layout), attention_shares(m, corpus, layout, {0: [5]})
    np.testing.assert_array_equal(after.norms[:, 0], maps.norms[:, 0])
    assert after.norms.shape == maps.norms.shape and after.layout == layout
    counts = [{(r.query, r.key): r.n_keys for r in t.itertuples()} for t in (plain, shares)]
    assert counts[1].items() >= counts[0].items() and counts[1]["class", "added"] == 2
    first = shares[(shares["layer"] == 1) & (shares["query"] == "class")]
    assert first["mass"].sum() >= 1 - 1e-6 and (shares["mass"] >= 0).all()


def test_an_edit_of_one_tower_runs_in_every_batch_of_it_alone() -> None:
    """A tower that is run without the model around it starts a forward pass of its own."""
    m = ma.load(build("clip"))
    x = torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    doubled = Edit("double", "vision_model/1.mlp_out", lambda h, b: h * 2)
    with edited(m, doubled) as fired, torch.no_grad():
        for i in range(3):
            m.module.vision_model(pixel_values=x[i : i + 1])
    assert fired[0].n_calls == 3


def test_a_pass_that_ends_early_leaves_no_token_behind() -> None:
    m, (x, bright) = planted(), images()
    corpus = ma.corpus({"pixel_values": x})
    layout = read_layout(m, corpus)
    with edited(m, AddedTokens("one", n=1)), torch.no_grad():
        patch_maps(m, corpus, layout, layers=[0, 1], batch_size=2)  # ends behind block 1
        assert m.module(x).shape == (6, 4)
        shares = attention_shares(m, corpus, layout, bright)
        assert read_layout(m, corpus).added == (10,)
    assert set(shares["key"]) == {"class", "massive", "added", "patches"}
    assert torch.equal(planted_logits(x), m.module(x).detach())


# ------------------------------------------------------------------------------------------------------ real data
@pytest.mark.long
def test_real_vit_three_neurons_carry_its_massive_patches(real_data: Path) -> None:
    pixels, _ = photographs(real_data, 16)
    m = ma.load(real_data / "models" / "vit-tiny-imagenet")
    corpus = ma.corpus({"pixel_values": pixels})
    layout = read_layout(m, corpus)
    assert (layout.n_prefix, layout.grid, layout.registers) == (1, (14, 14), ())
    maps = patch_maps(m, corpus, layout, [8, 12])
    outliers = outlier_patches(maps)
    corners = {1, 14, 183, 196}
    assert all(set(p) <= corners and len(p) >= 2 for p in outliers.values())
    neurons = register_neurons(m, corpus, outliers, layout, layers=range(1, 9))
    assert [(r.layer, r.neuron) for r in neurons.head(3).itertuples()] == [(8, 417), (7, 189), (7, 59)]
    assert neurons["activation"][0] > 10 * neurons["activation"][1]
    before = attention_shares(m, corpus, layout, outliers)
    with with_registers(m, neurons.head(3)):
        after, moved = attention_shares(m, corpus, layout, outliers), patch_maps(m, corpus, layout, [8, 12])
    was = marked(outliers, layout, len(pixels))
    assert maps.on_grid(maps.norms)[:, 0][was].mean() > 400
    assert moved.on_grid(moved.norms).max() < 60

    def mass(table: object, key: str) -> float:
        mine = table[(table["layer"] > 8) & (table["query"] == "patches") & (table["key"] == key)]  # type: ignore[index]
        return float(mine["mass"].mean())

    assert mass(before, "massive") > 0.5 and mass(after, "massive") < 0.05 and mass(after, "added") > 0.3
