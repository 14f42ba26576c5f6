"""The toy lab: the paper's story at small size, and the parts that it is told with.

The margins of the outcomes are taken from five seeds (`python benchmarks/lab.py --seeds 5`, table in docs/toy-lab.md).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from massact.labs.backcopy import random_backcopy
from massact.labs.job import STORY, configs_of, held_out_of, run_lab, train_toy
from massact.labs.looks import key_scale, look, losses, opened, task_losses, uniform
from massact.labs.toy import FAR, FROM_QUERY, ORDINARY, PRESETS, LabConfig, task_of, toy_model
from massact.models.transformers_models import from_pretrained
from massact.records.errors import UserError
from massact.records.kinds.lab import Lab

TINY = {"steps": 6, "every": 3, "batch": 8, "width": 16, "mlp": 32, "length": 20, "layers": 2}


def model_and_ids(attention: str = "softmax", **options: object) -> tuple[torch.nn.Module, torch.Tensor, LabConfig]:
    from massact.variants.application import apply_variant

    config = LabConfig.of("story", attention=attention, **TINY | options)
    torch.manual_seed(1)
    module = apply_variant(toy_model(config, task_of(config).bos + 1), attention).eval()
    return module, held_out_of(config, task_of(config))[1][:16], config


# -------------------------------------------------------------------------------------------- what is measured
def eager_weights(module: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Attention (L, B, H, T, T) as transformers itself returns it."""
    module.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(module(input_ids=ids_BT, output_attentions=True).attentions)


def test_attention_on_the_first_position_is_that_of_transformers() -> None:
    module, ids_BT, config = model_and_ids()
    row = look(opened(module), ids_BT, config)
    first_LH = eager_weights(module, ids_BT)[..., FROM_QUERY:, 0].mean((1, 3))
    assert row["first_attention"] == pytest.approx(float(first_LH.mean()), rel=1e-5)
    assert row["first_attention_max"] == pytest.approx(float(first_LH.max()), rel=1e-5)
    assert math.isnan(row["slot_mass"])


@pytest.mark.parametrize("attention", ["relu", "sigmoid", "softpick", "clipped-softmax"])
def test_weights_that_do_not_sum_to_one_are_asked_of_the_variant(attention: str) -> None:
    module, ids_BT, config = model_and_ids(attention)
    before = module(input_ids=ids_BT).logits
    row = look(opened(module), ids_BT, config)
    assert 0 <= row["first_attention"] <= row["first_attention_max"] <= 1.0 + 1e-6 or attention == "relu"
    assert torch.equal(module(input_ids=ids_BT).logits, before)  # as it was


def test_a_slot_and_a_sink_token_are_told_from_the_first_position() -> None:
    for attention in ("softmax-off-by-one", "sink-token"):
        module, ids_BT, config = model_and_ids(attention)
        row = look(opened(module), ids_BT, config)
        assert 0 < row["slot_mass"] < 1 and 0 < row["first_attention"] < 1 - row["slot_mass"]
        assert losses(module, ids_BT, task_of(config))[0].shape == (16, config.length - 1)


def test_keys_of_the_start_have_the_scale_of_sharpness() -> None:
    module, ids_BT, _ = model_and_ids(width=64, mlp=64)
    assert key_scale(module, ids_BT) == pytest.approx(0.25 * 64**0.5, rel=0.1)


def test_losses_are_about_what_can_be_known() -> None:
    task = random_backcopy(seed=0)
    ids_BT = task.draw(400, 20, "bos", torch.Generator().manual_seed(0))

    class Knowing(torch.nn.Module):
        """Says what the chain says, and copies."""

        def forward(self, input_ids: torch.Tensor) -> object:
            known_WV = torch.cat([task.transition_VV, torch.full((1, task.bos), 1 / task.bos, dtype=torch.double)])
            p_BTV = known_WV[input_ids].clone()
            copies_BT = torch.nn.functional.pad(task.kinds(input_ids)[0], (0, 1))
            one_hot = torch.nn.functional.one_hot(input_ids.roll(1, 1), task.bos + 1)[..., : task.bos].double()
            p_BTV[copies_BT] = one_hot[copies_BT]
            p_BTV = torch.nn.functional.pad(p_BTV, (0, 1))
            return type("Out", (), {"logits": (p_BTV + 1e-12).log()})()

    found = task_losses(Knowing(), ids_BT, task)
    assert found["backcopy_nats"] == pytest.approx(0, abs=1e-6)
    assert found["bigram_excess_nats"] == pytest.approx(0, abs=0.05)
    assert uniform(10) == pytest.approx((1 / 9 + 1 / 10) / 2)


def test_effects_are_those_of_an_edit_by_hand() -> None:
    done = train_toy(LabConfig.of("story", **TINY))
    task, module = task_of(done.config), done.module
    ids_BT = held_out_of(done.config, task)[1]
    row = next(e for e in done.effects if (e["layer"], e["edit"], e["position"], e["targets"]) == (1, "zero", 0, "far"))

    def late(zeroed: bool) -> torch.Tensor:
        base = module.transformer
        h_BTD = base.wte(ids_BT) + base.wpe(torch.arange(ids_BT.shape[1]))
        for i, block in enumerate(base.h):
            h_BTD = block(h_BTD)
            h_BTD = h_BTD[0] if isinstance(h_BTD, tuple) else h_BTD
            if i == 0 and zeroed:
                h_BTD[:, 0] = 0
        logits_BTV = module.lm_head(base.ln_f(h_BTD))[:, :-1]
        loss_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
        return loss_BT[:, ORDINARY + FAR :].mean(1)  # no BOS, so every target counts

    with torch.no_grad():
        delta_B = late(True) - late(False)
    assert row["delta_nats"] == pytest.approx(float(delta_B.mean()), abs=1e-6)
    width = 2 * scipy.stats.t.ppf(0.975, len(delta_B) - 1) * float(delta_B.std()) / len(delta_B) ** 0.5
    assert row["ci_high"] - row["ci_low"] == pytest.approx(width, rel=1e-3)
    assert {(e["layer"], e["position"]) for e in done.effects} == {(1, 0), (1, ORDINARY)}


# -------------------------------------------------------------------------------------------- what comes of it
@pytest.mark.long
def test_a_sink_grows_its_state_becomes_a_bias_and_the_slot_takes_it_over() -> None:
    """The defaults, a minute for each variant on a quiet core. The margins hold in five seeds of five."""
    lab = run_lab(["softmax", "kv-bias"], every=1500)
    softmax, kv, even = lab.last("softmax"), lab.last("kv-bias"), uniform(32)
    # Softmax looks at the first position: 0.072 to 0.141; kv-bias 0.035 to 0.057, its slot has 0.42 to 0.51.
    assert softmax["first_attention"] > 1.25 * even and math.isnan(softmax["slot_mass"])
    assert kv["first_attention"] < 0.6 * softmax["first_attention"] and kv["slot_mass"] > 0.4
    assert softmax["nats"] < 3.1 and abs(softmax["nats"] - kv["nats"]) < 0.03  # from 4.6; the slot costs nothing
    # Without its state everybody suffers: 0.015 to 0.085 nats; its mean does as well: -0.002 to 0.000.
    zero, mean = lab.effect("softmax", "zero", 0), lab.effect("softmax", "mean", 0)
    assert zero is not None and mean is not None
    assert zero["ci_low"] > 0 and zero["cosine"] > 0.8 and mean["ci_high"] < zero["delta_nats"] / 4
    # Nothing here is massive.
    assert lab.lab["top1"].max() < 100 and lab.lab["ratio"].max() < 100


# -------------------------------------------------------------------------------------------- how it is run
def test_the_same_seed_gives_the_same_numbers_in_any_process(tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one = run_lab(["softmax", "kv-bias"], **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    two = run_lab(["softmax", "kv-bias"], workers=2, out=tmp_path / "lab", **TINY)
    free = [c for c in one.lab.columns if c != "wall_s"]
    assert one.lab[free].equals(two.lab[free]) and one.lab_effects.equals(two.lab_effects)
    other = run_lab(["softmax"], **TINY | {"seed": 1})
    assert other.last("softmax")["nats"] != one.last("softmax")["nats"]
    assert list(one.lab["step"]) == [0, 3, 6] * 2 and Lab.open(tmp_path / "lab").variants == ["softmax", "kv-bias"]
    saved = from_pretrained(tmp_path / "lab" / "model-kv-bias")
    assert saved.state_dict()["transformer.h.0.attn.massact_k"].std() > 0.3
    texts = [json.loads(line)["text"] for line in (tmp_path / "lab" / "held_out.jsonl").read_text().splitlines()]
    assert {len(t) for t in texts} == {20}
    with pytest.raises(UserError, match="holds a finished run"):
        run_lab(["softmax"], out=tmp_path / "lab", **TINY)


def test_an_error_in_a_process_is_told() -> None:
    with pytest.raises(UserError, match="not finite"):
        run_lab(["softmax", "softmax-off-by-one"], workers=2, **TINY | {"learning_rate": 1e30, "steps": 40})


def test_kv_bias_starts_at_the_scale_of_real_keys_unless_told() -> None:
    lab = run_lab(["softmax", "kv-bias"], **TINY)
    assert lab.info.variants["softmax"]["key_std"] is None
    assert lab.info.variants["kv-bias"]["key_std"] == pytest.approx(0.25 * 16**0.5, rel=0.3)
    told = run_lab(["softmax", "kv-bias"], **TINY | {"options.std": "0.02"})
    assert told.info.variants["kv-bias"]["key_std"] is None


def test_every_start_optimiser_and_chain_trains() -> None:
    for options in ({"starts": "bos", "optimiser": "sgd"}, {"starts": "none", "chain": "text"}, {"layers": 1}):
        lab = run_lab(["softmax"], **TINY | options)
        assert np.isfinite(lab.lab.drop(columns=["variant", "slot_mass"]).to_numpy(float)).all()
        assert (len(lab.lab_effects) == 0) == (options.get("layers") == 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 3}, "no option 'step'"),
        ({"starts": "some"}, "starts='some'"),
        ({"optimiser": "adam"}, "adamw"),
        ({"length": 12}, "length=12"),
        ({"share": 1.0}, "starts=bos"),
        ({"steps": 0}, "steps=0"),
        ({"heads": 3}, "3 heads"),
        ({"steps": "many"}, "steps='many'"),
        ({"options.sdt": 1.0}, "has the option 'sdt'"),
        ({"steps.x": 1.0}, "no option of the toy lab"),
        ({"preset": "goo"}, "guo"),
        ({"variants": ["softmax", "softmax"]}, "every variant once"),
        ({"variants": ["softmaxx"]}, "softmax"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_lab(**{"variants": ["softmax", "kv-bias"]} | options)


def test_the_published_preset_is_as_published() -> None:
    c = PRESETS["guo"]
    assert (c.heads, c.width, c.length, c.batch, c.learning_rate, c.weight_decay) == (1, 256, 256, 512, 3e-4, 1e-4)
    assert (c.chain, c.starts, c.layers) == ("text", "bos", 3)
    assert [x.attention for x in configs_of(STORY, "guo", {"layers": 1})] == list(STORY)
