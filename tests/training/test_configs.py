"""Recipes say the published numbers, and what is not a configuration is refused."""

from __future__ import annotations

import math

import pytest
import torch

from massact.records.errors import UserError
from massact.training import RECIPES, TrainConfig
from massact.training.components import build_model, n_trained
from massact.training.configs import rate


def test_gpt2_124m_is_the_papers() -> None:
    c = RECIPES["gpt2-124m"]
    m = c.model
    assert (m["n_layer"], m["n_head"], m["n_embd"], m["n_positions"], m["vocab_size"]) == (12, 12, 768, 1024, 50304)
    assert (c.batch, c.accumulate, c.seq_len, c.tokens_per_step) == (12, 40, 1024, 491_520)
    assert (c.lr, c.min_lr, c.warmup, c.decay_steps, c.steps) == (6e-4, 6e-5, 2000, 600_000, 50_000)
    assert (c.betas, c.weight_decay, c.clip, c.seed, c.biases) == ((0.9, 0.95), 0.1, 1.0, 1337, False)
    assert not c.compile and c.dtype == "bf16" and m["activation_function"] == "gelu"
    # The two contradictions of the source, and what the notes say of them.
    assert c.steps * c.tokens_per_step == pytest.approx(24.6e9, rel=0.001)
    assert rate(c, 49_999) * c.lr == pytest.approx(5.9e-4, rel=0.005)
    said = " ".join(c.notes)
    assert all(word in said for word in ("2B", "24.6B", "600,000", "3.04", "nats"))


def test_gpt2_124m_has_124m_parameters() -> None:
    c = RECIPES["gpt2-124m"]
    with torch.device("meta"):
        model = build_model(c)
    embeddings, positions, block = 50304 * 768, 1024 * 768, 12 * 768**2 + 2 * 768
    assert n_trained(model) == embeddings + positions + 12 * block + 768 == 124_373_760
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))


def test_biases_are_held_at_zero_and_init_is_nanogpts() -> None:
    c = RECIPES["gpt2-124m"].changed(**{"model.n_layer": 2, "model.n_embd": 192, "model.vocab_size": 512})
    model = build_model(c)
    found = dict(model.named_parameters())
    assert all(not p.requires_grad and not p.any() for n, p in found.items() if n.endswith("bias"))
    assert found["transformer.h.0.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert found["transformer.h.0.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_llama_60m_is_gus() -> None:
    c = RECIPES["llama-60m"]
    assert c.batch_total == 512 and c.tokens_per_step == 512 * 2048 and c.steps == 20_000
    assert (c.lr, c.min_lr, c.schedule, c.warmup, c.decay, c.seed) == (4e-4, 4e-4, "constant", 100, "all", 42)
    with torch.device("meta"):
        model = build_model(c)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    assert blocks == 10 * (4 * 768**2 + 3 * 768 * 1536 + 2 * 768) and 55e6 < blocks < 65e6


def test_vit_tiny_is_deits_shape() -> None:
    with torch.device("meta"):
        model = build_model(RECIPES["vit-tiny"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(5.7e6, rel=0.01)


def test_tiny_is_the_embedded_models() -> None:
    from massact.models import load

    embedded = load().module.config
    built = build_model(RECIPES["tiny"]).config
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"):
        assert getattr(built, name) == getattr(embedded, name), name


def test_schedules_by_hand() -> None:
    c = TrainConfig(lr=1.0, min_lr=0.1, warmup=9, steps=109, decay_steps=0, schedule="cosine")
    assert [rate(c, s) for s in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9])
    assert rate(c, 9) == pytest.approx(1) and rate(c, 59) == pytest.approx(0.55) and rate(c, 109) == pytest.approx(0.1)
    linear = c.changed(schedule="linear")
    assert rate(linear, 59) == pytest.approx(0.55) and rate(linear, 200) == pytest.approx(0.1)
    cooldown = c.changed(schedule="cooldown", decay_steps=10)
    assert rate(cooldown, 98) == 1 and rate(cooldown, 108) == pytest.approx(0.1)
    assert rate(c.changed(schedule="constant"), 10**6) == 1


def test_options_are_read_as_their_fields_type() -> None:
    c = TrainConfig.of("tiny", lr="1e-3", steps="50", compile="true", betas="0.9,0.99" and "(0.9, 0.99)",
                       report_to="tensorboard,wandb", variant="kv-bias", **{"model.n_layer": "3",
                       "variant_options.std": "0.5"})  # fmt: skip
    assert (c.lr, c.steps, c.compile, c.betas) == (1e-3, 50, True, (0.9, 0.99))
    assert c.report_to == ("tensorboard", "wandb") and c.model["n_layer"] == 3 and c.model["n_embd"] == 128
    assert c.variant_options == {"std": 0.5} and RECIPES["tiny"].model["n_layer"] == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weigth_decay": 0.1}, "weight_decay"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"lr": -1.0}, "negative"),
        ({"lr": float("nan")}, "lr="),
        ({"schedule": "cosin"}, "cosine"),
        ({"val_share": 1.0}, "val_share"),
        ({"betas": "0.9"}, "betas"),
        ({"lr.x": 1}, "no entries"),
        ({"skip_first": 128}, "no loss"),
        ({"compile": "maybe"}, "compile"),
    ],
)
def test_bad_options_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        TrainConfig.of("tiny", **options)


def test_near_names() -> None:
    with pytest.raises(UserError, match="Did you mean 'gpt2-124m'"):
        TrainConfig.of("gpt2-124")
    with pytest.raises(UserError, match="n_layr"):
        build_model(TrainConfig.of("tiny", **{"model.n_layr": 2}))
    with pytest.raises(UserError, match="kv-bias"):
        build_model(TrainConfig.of("tiny", variant="kv-bais"))
    with pytest.raises(UserError, match="cannot be configured"):
        build_model(TrainConfig.of("tiny", architecture="gtp2"))


def test_only_what_matters_to_the_weights_must_be_the_same() -> None:
    c = TrainConfig.of("tiny")
    assert c.differences(c.as_dict()) == []
    assert c.changed(keep=5, report_to="wandb").differences(c.as_dict()) == []
    assert c.changed(lr=1.0).differences(c.as_dict()) == ["lr: 0.002 -> 1.0"]
