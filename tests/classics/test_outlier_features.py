"""Outlier features: naive NumPy on what linear layers read, planted truth at the edges, zeroing by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.classics import CLASSICS, Ground, classics
from massact.classics.outlier_features import OUTLIER_FEATURES, outlier_features
from massact.models import with_attention
from massact.records.kinds.classics import Classics
from massact.stats.hits import CountResult
from tests.facts import tells
from tests.families import build
from tests.planted import Plant, Planted

OFF = {"null": False, "bos_contrast": False}
T = 40
# What reads the residual stream: the first linear layer of attention and of the MLP; and the blocks.
LINEAR = {
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc", "transformer.h.{}"),
    "llama": ("model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.gate_proj", "model.layers.{}"),
    "bert": ("bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.{}.intermediate.dense",
             "bert.encoder.layer.{}"),
    "vit": ("vit.layers.{}.attention.q_proj", "vit.layers.{}.mlp.fc1", "vit.layers.{}"),
}  # fmt: skip


def tokens(n: int = 6, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def graded(name: str) -> nn.Module:
    """A tiny model whose norms and embeddings are scaled up dim by dim, so that shares of hits come in all sizes."""
    module = build(name)
    with torch.no_grad():
        for i, part in enumerate(p for p in module.modules() if "Norm" in type(p).__name__):
            part.weight[26:30] *= torch.linspace(1, 1 + 3 * i, 4)  # grows from layer to layer
            part.weight[:16] *= torch.linspace(1, 20 if hasattr(module, "lm_head") else 5, 16)
        if hasattr(module, "lm_head"):
            module.get_input_embeddings().weight *= 100
            module.get_input_embeddings().weight[:, 18:26] *= torch.linspace(1, 5, 8)
    return module


def seen(module: nn.Module, name: str, inputs: dict[str, Tensor]) -> dict[str, list[list[np.ndarray]]]:
    """kind -> layer -> its tensors (N, T, D), by hand-written hooks on the linear layers themselves."""
    found: dict[str, list[list[np.ndarray]]] = {"inputs": [[], [], []], "hidden": [[], [], []]}
    handles = []
    for layer in range(3):
        for path in LINEAR[name][:2]:
            handles.append(module.get_submodule(path.format(layer)).register_forward_pre_hook(
                lambda m, args, layer=layer: found["inputs"][layer].append(args[0].double().numpy())))  # fmt: skip
        handles.append(module.get_submodule(LINEAR[name][2].format(layer)).register_forward_hook(
            lambda m, args, out, layer=layer: found["hidden"][layer].append(
                (out if isinstance(out, Tensor) else out[0]).double().numpy())))  # fmt: skip
    with torch.no_grad():
        states = module(**inputs, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for layer in (1, 2):  # the last one of Hugging Face is behind the last norm
        np.testing.assert_array_equal(found["hidden"][layer - 1][0], states[layer].double().numpy())
    return found


def naive(layers: list[list[np.ndarray]], lengths: list[int]) -> dict[int, dict[str, float]]:
    """dim -> shares, straight from the definition."""
    N, D, found = len(lengths), layers[0][0].shape[-1], {}
    for dim in range(D):
        hold, of_layers, of_tokens = [], [], []
        for s, n in enumerate(lengths):
            shares = [max(float(np.mean(np.abs(x[s, :n, dim]) >= 6)) for x in sites) for sites in layers]
            of_layers.append(np.mean([share >= 0.06 for share in shares]))
            of_tokens.append(np.mean(shares))
            hold.append(of_layers[-1] >= 0.25)
        if sum(hold) >= 0.9 * N:
            found[dim] = {"share_of_sequences": np.mean(hold), "share_of_layers": np.mean(of_layers),
                          "share_of_tokens": np.mean(of_tokens)}  # fmt: skip
    return found


def done(module: nn.Module, inputs: Any) -> Classics:
    model = ma.load(module, inputs=inputs if isinstance(module, Planted) else None)
    return classics(model, inputs, ma.scan(model, inputs, **OFF), which=("outlier-features",))


def told(result: Classics, subject: str, site: str = "") -> dict[int, dict[str, float]]:
    rows = result.classics[(result.classics.subject == subject) & (result.classics.dim >= 0)]
    rows = rows[rows.site == site] if site else rows
    return {int(dim): dict(zip(part.metric, part.value, strict=True)) for dim, part in rows.groupby("dim")}


def check(got: dict[int, dict[str, float]], want: dict[int, dict[str, float]]) -> None:
    assert list(got) == list(want)
    for dim, shares in want.items():
        assert got[dim] == pytest.approx(shares, abs=1e-12)


# ----------------------------------------------------------------------------------------------------- oracle
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_features_are_those_of_the_definition(name: str) -> None:
    if name == "vit":
        inputs = {"pixel_values": torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))}
    else:
        inputs = {"input_ids": tokens()}
    module = graded(name)
    oracle = seen(module, name, inputs)
    lengths = [oracle["hidden"][0][0].shape[1]] * 6
    result = done(module, inputs)
    want = {kind: naive(layers, lengths) for kind, layers in oracle.items()}
    check(told(result, "inputs"), want["inputs"])
    check(told(result, "hidden", "resid_post"), want["hidden"])
    assert 0 < len(want["inputs"]) < 32 and (name == "vit" or 0 < len(want["hidden"]) < 32)
    assert any(0 < x["share_of_layers"] < 1 for x in want["inputs"].values())
    numbers = result.info.outcomes["outlier-features"][""]
    assert (numbers["n_inputs"], numbers["n_hidden"]) == (len(want["inputs"]), len(want["hidden"]))
    at = numbers["at"]["inputs"]
    assert at["dims"] == list(want["inputs"]) and (at["n_sequences"], at["n_layers"]) == (6, 3)
    reached = [[any((np.abs(x[s]) >= 6).mean(0)[at["dims"]].max() >= 0.06 for x in sites) for s in range(6)]
               for sites in oracle["inputs"]]  # fmt: skip
    assert at["layers_affected"] == pytest.approx(np.mean(reached))
    assert at["tokens_affected"] == pytest.approx(np.mean([x["share_of_tokens"] for x in want["inputs"].values()]))


def test_padding_does_not_count() -> None:
    """Prompts of different lengths: positions that are padded are none."""
    module, ids, lengths = graded("llama"), tokens(), [40, 23, 31, 18, 40, 27]
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    result, oracle = done(module, inputs), seen(module, "llama", inputs)
    for kind, layers in oracle.items():
        want = naive(layers, lengths)
        check(told(result, kind), want)
        unmasked = naive(layers, [T] * 6)
        assert want != unmasked


# ----------------------------------------------------------------------------------------------- planted truth
def counts(hits: list[int], n_tokens: list[int]) -> CountResult:
    return CountResult(np.arange(len(hits)), np.array(n_tokens), np.array(hits)[:, None])


@pytest.mark.parametrize(
    ("hits", "n_layers", "with_hits", "n", "holding", "feature"),
    [
        (60, 4, 1, 10, 10, True),  # 6 % of 1,000 positions, 25 % of the layers, all sequences
        (59, 4, 4, 10, 10, False),  # 5.9 % of the positions
        (60, 100, 25, 10, 10, True),
        (60, 100, 24, 10, 10, False),  # 24 % of the layers
        (60, 4, 1, 10, 9, True),  # 90 % of the sequences
        (1000, 4, 4, 10, 8, False),
        (1000, 4, 4, 19, 17, False),  # 89.5 %
        (0, 4, 0, 10, 10, False),
    ],
)
def test_the_edges_of_the_rule(hits: int, n_layers: int, with_hits: int, n: int, holding: int, feature: bool) -> None:
    yes = counts([hits if s < holding else 0 for s in range(n)], [1000] * n)
    no = counts([0] * n, [1000] * n)
    found = outlier_features({layer: [no, yes] if layer <= with_hits else [no] for layer in range(1, n_layers + 1)})
    assert found.dims.tolist() == [0] * feature
    if feature:
        assert found.of_sequences[0] == holding / n
        assert found.of_layers[0] == pytest.approx(with_hits / n_layers * holding / n)
        assert found.layers_affected == pytest.approx(with_hits / n_layers * holding / n)
        assert found.of_tokens[0] == pytest.approx(hits / 1000 * with_hits / n_layers * holding / n)


def test_half_of_the_hits_at_each_of_two_inputs_is_not_enough() -> None:
    """A layer counts if the rule holds at one of its inputs; hits of different inputs are not added."""
    half, none = counts([3] * 5, [100] * 5), counts([0] * 5, [100] * 5)
    assert not len(outlier_features({1: [half, half], 2: [none, none]}).dims)


def test_sequences_without_tokens_are_left_out() -> None:
    found = outlier_features({1: [counts([9, 0], [10, 0])]})
    assert found.dims.tolist() == [0] and found.n_sequences == 1
    assert not len(outlier_features({1: [counts([0], [0])]}).dims)
    with pytest.raises(ValueError, match="one layer"):
        outlier_features({})


@pytest.mark.parametrize(("n_layers", "feature"), [(4, True), (5, False)])
def test_planted_dims_are_found_where_they_are(n_layers: int, feature: bool) -> None:
    """By hand, 1,000 positions: one layer of four is 25 %, of five 20 %; inputs are one layer behind the stream.

    A massive activation (one position) is no outlier feature.
    """
    plants = [Plant(2, 2, 10 * t, 1, 6.5) for t in range(60)]  # 6 %, one layer
    plants += [Plant(1, 3, 10 * t, 2, 6.5) for t in range(59)]  # 5.9 %
    plants += [Plant(1, 3, 10 * t, 3, 5.99) for t in range(90)]  # too small
    plants += [Plant(1, 3, 0, 4, -3000.0)]  # massive
    plants += [Plant(n_layers, n_layers, 10 * t, 5, -6.5) for t in range(60)]  # after the last block: nothing reads it
    plants += [Plant(1, 3, 10 * t, 6, -6.5) for t in range(60)]
    module = Planted(n_layers, 1000, 16, plants)
    x = torch.randn(3, 1000, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    x[:, :70, 7] = 7.0  # of the input only, which is no layer of the stream, but is read by block 1
    module.layers[0].mlp.plan[:70, 7] = 1e-3
    result = done(module, {"x": x})
    assert list(told(result, "hidden")) == ([1, 5, 6] if feature else [6])
    assert list(told(result, "inputs")) == ([1, 6, 7] if feature else [6])
    numbers = result.info.outcomes["outlier-features"][""]
    for where in ("inputs", "resid_post"):
        assert numbers["at"][where]["n_massive"] == 1 and numbers["at"][where]["massive"] == []
    assert tells(result.info.notes, "attn_in", "unavailable", "layers 1, 2")
    assert numbers["zeroed"] == {} and any("gives no logits" in note for note in result.info.notes)
    assert not len(result.classic_effects)


def test_a_dim_that_is_both_is_counted_as_both() -> None:
    plants = [Plant(1, 3, t, 4, -3000.0) for t in range(5)]
    module, x = Planted(3, 50, 16, plants), torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    at = done(module, {"x": x}).info.outcomes["outlier-features"][""]["at"]
    assert at["resid_post"]["massive"] == at["inputs"]["massive"] == [4]


# ----------------------------------------------------------------------------------------------------- zeroing
def by_hand(module: nn.Module, dims: list[int], ids: Tensor) -> Tensor:
    """Logits with dims of what every first linear layer of GPT-2 reads at zero."""

    def hook(m: nn.Module, args: tuple) -> tuple:
        new = args[0].clone()
        new[..., dims] = 0
        return (new,)

    parts = [module.get_submodule(p.format(i)) for p in LINEAR["gpt2"][:2] for i in range(3)]
    handles = [part.register_forward_pre_hook(hook) for part in parts]
    with torch.no_grad():
        logits = module(ids).logits
    for handle in handles:
        handle.remove()
    return logits.double().log_softmax(-1)


def test_zeroing_is_that_of_every_linear_input() -> None:
    module, ids = build("gpt2"), tokens()
    with torch.no_grad():
        module.lm_head.weight = nn.Parameter(module.lm_head.weight * 30)
        for block in module.transformer.h:
            block.ln_1.bias[3] = block.ln_2.bias[3] = 40.0
            block.ln_2.bias[11] = -30.0
            block.mlp.c_fc.weight[3] *= 5
    result = done(module, ids)
    numbers = result.info.outcomes["outlier-features"][""]
    dims, drawn = numbers["at"]["inputs"]["dims"], numbers["zeroed"]["random_dims"]
    assert dims == [3, 11] and len(drawn) == len(dims) and not set(dims) & set(drawn)
    with torch.no_grad():
        before = module(ids).logits.double().log_softmax(-1)
    effects = result.classic_effects.set_index(["edit", "metric"])
    assert set(effects.index.get_level_values("metric")) == {"perplexity", "top1_probability", "kl", "top1_agreement"}
    for name, chosen in (("outlier dims to zero", dims), ("random dims to zero", drawn)):
        after = by_hand(module, chosen, ids)
        loss = [-x[:, :-1].gather(2, ids[:, 1:, None]).mean().item() for x in (before, after)]
        assert effects.loc[(name, "perplexity"), "baseline"] == pytest.approx(np.exp(loss[0]), rel=1e-4)
        assert effects.loc[(name, "perplexity"), "edited"] == pytest.approx(np.exp(loss[1]), rel=1e-4)
        top = after[:, :-1].exp().amax(-1).mean().item()
        assert effects.loc[(name, "top1_probability"), "edited"] == pytest.approx(top, rel=1e-4)
        kl = (before.exp() * (before - after)).sum(-1)[:, :-1].mean().item()
        assert effects.loc[(name, "kl"), "edited"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        same = (before.argmax(-1) == after.argmax(-1))[:, :-1].double().mean().item()
        assert effects.loc[(name, "top1_agreement"), "edited"] == pytest.approx(same)
        assert numbers["zeroed"][name]["kl"] == [0, effects.loc[(name, "kl"), "edited"]]
    kl = effects.edited.xs("kl", level="metric")
    assert kl["outlier dims to zero"] > 3 * kl["random dims to zero"]


def test_no_outliers_is_said_in_numbers() -> None:
    result = done(build("gpt2"), tokens(2))
    numbers = result.info.outcomes["outlier-features"][""]
    assert numbers["n_inputs"] == numbers["n_hidden"] == 0 and numbers["zeroed"] == {}
    rows = result.classics.set_index(["subject", "metric"]).value
    assert rows["inputs", "outlier_features"] == rows["hidden", "outlier_features"] == 0
    assert (result.classics.dim == -1).all() and not len(result.classic_effects)
    assert any("nothing was zeroed" in note for note in result.info.notes)


def test_what_is_special_about_a_model_is_said() -> None:
    """Without a head there are measurements and no effects; post-LN blocks read the stream itself; short sequences."""
    headless = done(graded("llama").model, tokens(2))
    assert headless.info.outcomes["outlier-features"][""]["n_inputs"] > 0 and not len(headless.classic_effects)
    assert any("gives no logits" in note for note in headless.info.notes)
    bert = done(graded("bert"), tokens(2, 16))
    assert tells(bert.info.notes, "residual stream", "itself")
    assert tells(bert.info.notes, "16 positions", f"{100 // 16} %")
    assert set(bert.info.outcomes["outlier-features"][""]["at"]) == {"inputs", "resid_post", "resid_post_prenorm"}
    assert set(bert.classic_effects.metric) == {"top1_probability", "kl", "top1_agreement"}  # nothing is hidden
    llama = done(graded("llama"), tokens(2, 17))
    assert not any("one alone" in note or "stream itself" in note for note in llama.info.notes)


def test_every_stack_is_told_apart() -> None:
    module = build("t5")
    with torch.no_grad():
        module.decoder.block[1].layer[1].layer_norm.weight[6] = 500.0  # what cross-attention reads
    inputs = {"input_ids": tokens(2), "decoder_input_ids": tokens(2, seed=2)}
    model = ma.load(module)
    ground = Ground(with_attention(model), ma.corpus(inputs), ma.scan(model, inputs, **OFF))
    outcome = OUTLIER_FEATURES.run(ground)
    assert set(outcome.numbers) == {"encoder", "decoder"} and CLASSICS["outlier-features"] is OUTLIER_FEATURES
    assert 6 in outcome.numbers["decoder"]["at"]["inputs"]["dims"]
    assert 6 not in outcome.numbers["encoder"]["at"]["inputs"]["dims"]
    assert {e["stack"] for e in outcome.effects} >= {"decoder"}
