"""Biases of attention: roles against the layouts known of each family, invariances, planted values, nothing left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.classics import attention_biases
from massact.classics.job import classics
from massact.models import with_attention
from massact.models.weight_values import weights_hash
from massact.records.kinds.classics import Classics
from massact.trace.bias_roles import bias_roles
from tests.facts import each, tells
from tests.families import build

NAME = "attention-biases"


def tokens(n: int = 3, length: int = 24) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(2))


def biased(name: str, size: float = 0.5) -> nn.Module:
    """All biases at random: at initialisation they are zero. Greater matrices, so that attention is not uniform."""
    module = build(name)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for own, p in module.named_parameters():
            if own.endswith("bias") and p.ndim == 1:
                p.copy_(size * torch.randn(p.shape, generator=draw))
            elif p.ndim == 2:
                p.mul_(4)
    return module


def ran(module: nn.Module, data: object = None, **given: object) -> Classics:
    model = ma.load(module)
    data = tokens() if data is None else data
    scan = ma.scan(model, data, null=False, bos_contrast=False)
    return classics(model, data, scan, which=(NAME,), **given)


def roles(name: str) -> list[dict[str, dict[str, Tensor]]]:
    model = with_attention(ma.load(biased(name)))
    return bias_roles(model.module, model.example, list(model.anatomy.attentions.values()))


# ---- roles
SEPARATE = ["opt", "qwen2", "bert", "vit", "albert", "phi", "starcoder2", "gpt_oss", "distilbert"]


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_projections_have_one_role_each(name: str) -> None:
    """Named after their role in these families, which the experiment does not look at."""
    for by_name in roles(name):
        letters = {}
        for parameter, by_role in by_name.items():
            (role,) = by_role
            assert by_role[role].all()
            letters[role] = parameter.split(".")[-2][0]
        assert letters == {"q": "q", "k": "k", "v": "v"}


def test_fused_in_three_parts() -> None:
    """GPT-2: queries, then keys, then values. The bias of the output projection has no role."""
    for i, by_name in enumerate(roles("gpt2")):
        ((parameter, by_role),) = by_name.items()
        assert parameter == f"transformer.h.{i}.attn.c_attn.bias"
        for j, role in enumerate("qkv"):
            wanted = torch.zeros(96, dtype=torch.bool)
            wanted[32 * j : 32 * (j + 1)] = True
            assert torch.equal(by_role[role], wanted)


def test_fused_head_by_head() -> None:
    """GPT-NeoX: of every head its query, its key and its value, 8 entries each."""
    for by_name in roles("gpt_neox"):
        ((_, by_role),) = by_name.items()
        for j, role in enumerate("qkv"):
            assert torch.equal(by_role[role], (torch.arange(96) // 8) % 3 == j)


def test_families_without_some_or_all() -> None:
    assert [set().union(*(r for r in by_name.values())) for by_name in roles("whisper")][0] == {"q", "v"}
    assert all(not by_name for by_name in roles("llama"))
    assert all(set(r) == {"v"} for by_name in roles("bloom") for r in by_name.values())  # written out: q, k unseen


def test_the_experiment_leaves_no_trace() -> None:
    """Flags, gradients and bits as before, also when called where no gradients are taken."""
    module = biased("gpt2")
    module.transformer.wte.weight.requires_grad_(False)
    model = with_attention(ma.load(module))
    before, flags = weights_hash(module), {n: p.requires_grad for n, p in module.named_parameters()}
    with torch.inference_mode():
        found = bias_roles(module, model.example, list(model.anatomy.attentions.values()))
    assert len(found) == 3 and all(found)
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags and False in flags.values()
    assert all(p.grad is None for p in module.parameters()) and weights_hash(module) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


# ---- effects
@pytest.mark.parametrize("name", ["gpt2", "bert", "opt"])
def test_key_biases_are_redundant_and_the_others_are_not(name: str) -> None:
    module = biased(name)
    before = weights_hash(module)
    done = ran(module)
    found = done.info.outcomes[NAME][""]
    assert weights_hash(module) == before
    assert found["entries"] == {"q": 96, "k": 96, "v": 96}
    assert found["keys_redundant"] and found["keys_max_delta_logit"] < 1e-5
    for kind in ("zero", "random"):
        assert found["effects"][f"key biases {kind}"]["kl"] < 5e-7
        for role in ("query", "value"):
            assert found["effects"][f"{role} biases {kind}"]["max_delta_logit"] > 1e-3
    assert found["value_bias_identity_error"] < 1e-5
    assert ("perplexity_delta" in found["effects"]["value biases zero"]) == (name != "bert")  # no tokenizer, no mask
    rows = done.classics
    errors = rows[rows.metric == "value_bias_identity_error"]
    assert list(errors.layer) == [1, 2, 3] and (errors.value < 1e-5).all()
    assert (rows[rows.metric == "bias_entries"].value == 32).all()
    assert set(done.classic_effects.edit) == set(found["effects"]) and (done.classic_effects.n_elements > 0).all()


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_behind_rotary_embeddings_key_biases_are_not_redundant(name: str) -> None:
    done = ran(biased(name, 2.0))
    found = done.info.outcomes[NAME][""]
    assert not found["keys_redundant"] and found["keys_max_delta_logit"] > 1e-2
    assert found["value_bias_identity_error"] < 1e-5
    assert any("not redundant" in note and "rotary" in note for note in done.info.notes)


def test_a_learned_sink_takes_its_share_of_the_value_bias() -> None:
    done = ran(biased("gpt_oss", 2.0))
    assert done.info.outcomes[NAME][""]["value_bias_identity_error"] > 1e-2
    assert tells(done.info.notes, "sum", "less than 1")


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_logits_are_those_of_a_model_changed_by_hand(role: str) -> None:
    module, ids = biased("gpt2"), tokens()
    found = ran(module, ids).info.outcomes[NAME][""]["effects"]
    with torch.no_grad():
        plain = module(ids[:1]).logits
        third = slice(32 * "qkv".index(role), 32 * ("qkv".index(role) + 1))
        for block in module.transformer.h:
            block.attn.c_attn.bias[third] = 0
        moved = module(ids[:1]).logits
    wanted = float((moved - plain).abs().max() / plain.abs().max())
    word = {"q": "query", "k": "key", "v": "value"}[role]
    assert found[f"{word} biases zero"]["max_delta_logit"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_planted_value_bias_is_all_that_attention_gives() -> None:
    """Values without a matrix: each head gives exactly its bias, so that without it nothing is left."""
    module = biased("gpt2")
    with torch.no_grad():
        for block in module.transformer.h:
            block.attn.c_attn.weight[:, 64:] = 0
            block.attn.c_attn.bias[64:] = torch.arange(32.0)
    seen: list[Tensor] = []
    handle = module.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    done = ran(module)
    handle.remove()
    assert any(torch.allclose(x, torch.arange(32.0).expand_as(x), atol=1e-4) for x in seen)
    assert any(torch.equal(x, torch.zeros_like(x)) for x in seen)
    rows = done.classics
    norms = rows[(rows.metric == "bias_norm") & (rows.subject == "v")]
    np.testing.assert_allclose(norms.value, np.linalg.norm(np.arange(32.0)), rtol=1e-6)
    assert done.info.outcomes[NAME][""]["value_bias_identity_error"] < 1e-5


def test_random_values_have_the_same_mean_and_spread() -> None:
    old = torch.tensor([1.0, 2.0, 6.0, -3.0, 0.5])
    new, again, other = (attention_biases._random(old, np.random.default_rng(s)) for s in (0, 0, 1))
    assert torch.equal(new, again) and not torch.equal(new, other) and not torch.equal(new, old)
    torch.testing.assert_close(new.mean(), old.mean())
    torch.testing.assert_close(new.std(), old.std())


# ---- what is not there
def test_without_logits_there_are_roles_and_no_effects() -> None:
    images = {"pixel_values": torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))}
    done = ran(biased("dinov2"), images)
    found = done.info.outcomes[NAME][""]
    assert "effects" not in found and found["entries"] == {"q": 96, "k": 96, "v": 96}
    assert found["value_bias_identity_error"] < 1e-5 and not len(done.classic_effects)
    assert any("unavailable" in note and "logits" in note for note in done.info.notes)
    classifier = ran(biased("vit"), images).info.outcomes[NAME][""]
    assert classifier["keys_redundant"] and classifier["effects"]["value biases zero"]["kl"] > 0


@pytest.mark.parametrize(("name", "says"), [("llama", "no bias"), ("bloom", "written out")])
def test_models_without_roles_say_why(name: str, says: str) -> None:
    done = ran(build(name))
    assert says in done.info.outcomes[NAME]["unavailable"] and not len(done.classics)


def test_biases_that_are_zero_are_said_to_be() -> None:
    done = ran(build("gpt2"))  # as initialised
    found = done.info.outcomes[NAME][""]
    assert found["entries"]["q"] == 96 and "effects" not in found and "keys_redundant" not in found
    assert sum("are zero" in note for note in done.info.notes) == 3


def test_an_entry_of_two_roles_is_refused() -> None:
    """Keys that are the values, as where one projection makes both."""
    both = {"b": torch.tensor([True, True, False])}
    with pytest.raises(attention_biases.Unavailable, match=each("2 entries", "b", "key", "value")):
        attention_biases._check({"q": {}, "k": both, "v": both})
    attention_biases._check({"q": {}, "k": both, "v": {"b": ~both["b"]}})


def test_two_stacks_have_numbers_of_their_own() -> None:
    done = ran(biased("bart"))
    found = done.info.outcomes[NAME]
    assert found["encoder"]["entries"] == {"q": 96, "k": 96, "v": 96}
    assert found["decoder"]["entries"] == {"q": 128, "k": 128, "v": 128}  # two layers, each with cross-attention
    assert all(found[s]["keys_redundant"] and found[s]["value_bias_identity_error"] < 1e-5 for s in found)
    assert set(done.classic_effects["stack"]) == {"encoder", "decoder"}
