"""The vision toy lab: its images, what is measured of its models, and how it is run.

The margins of what comes of a training are taken from three seeds (table in docs/toy-vit.md).
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from massact.records.errors import UserError
from massact.records.kinds.shapes import ShapeLab
from massact.training import shape_lab, shape_toy
from massact.training.applied import apply_variant
from massact.training.lab_looks import opened
from massact.training.shape_lab import run_shapes, train_shapes
from massact.training.shape_looks import Held, effects_of, layer_rows, seen_in
from massact.training.shape_toy import ShapeConfig, arms_of, held_out_shapes, shape_model
from massact.training.shapes import CLASSES, COLOURS, SHAPES, draw_shapes

TINY = {"steps": 6, "every": 3, "batch": 8, "width": 16, "size": 16, "patch": 4, "heads": 2, "layers": 3}


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_toy, "N_HELD_OUT", 32)


def model_and_images(attention: str = "softmax", **options: Any) -> tuple[Any, Held, ShapeConfig]:
    config = ShapeConfig.of(attention=attention, **TINY | options)
    torch.manual_seed(1)
    module = shape_model(config)
    if attention != "softmax":
        module = apply_variant(module, attention)
    return module.eval(), Held.of(held_out_shapes(config), config.patch), config


# -------------------------------------------------------------------------------------------- the images
def test_a_shape_has_its_colour_and_the_background_is_grey() -> None:
    drawn = draw_shapes(200, 32, "textured", np.random.default_rng(0))
    known = np.array(list(COLOURS.values()))
    for pixels_HWC, label, covered_HW in zip(drawn.pixels_BHWC / 255, drawn.labels_B, drawn.covered_BHW, strict=True):
        shown = pixels_HWC[covered_HW].mean(0)
        assert list(COLOURS)[np.linalg.norm(known - shown, axis=1).argmin()] == CLASSES[label].split("-")[0]
        assert np.ptp(pixels_HWC[~covered_HW].mean(0)) < 0.02
    assert set(drawn.labels_B) == set(range(16)) and drawn.values().min() >= -1 and drawn.values().max() <= 1


def test_shapes_are_the_ones_they_are_called() -> None:
    drawn = draw_shapes(600, 48, "plain", np.random.default_rng(1))
    filled = {}
    for i, shape in enumerate(SHAPES):
        of_box = []
        for covered_HW in drawn.covered_BHW[drawn.labels_B // len(COLOURS) == i]:
            rows, columns = (np.flatnonzero(covered_HW.any(axis)) for axis in (1, 0))
            box_HW = covered_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            of_box.append(box_HW.mean())
            assert rows[0] > 0 or shape == "triangle" or covered_HW[0].sum() < 24  # inside the image
        filled[shape] = np.mean(of_box)
    # Of its box a disc fills pi / 4, a triangle a half, a cross with arms of 0.35 radius 1 - 0.65 ** 2.
    assert filled["disc"] == pytest.approx(np.pi / 4, abs=0.03) and filled["square"] == 1
    assert filled["triangle"] == pytest.approx(0.5, abs=0.06) and filled["cross"] == pytest.approx(0.58, abs=0.05)


def test_backgrounds_are_plain_or_textured_and_their_patches_hold_no_shape() -> None:
    spread = {}
    for background in ("plain", "textured", "mixed"):
        drawn = draw_shapes(60, 24, background, np.random.default_rng(2))
        outside = [p[~c].std() / 255 for p, c in zip(drawn.pixels_BHWC[..., 0], drawn.covered_BHW, strict=True)]
        spread[background] = np.mean(np.array(outside) > 0.04)
    assert spread["plain"] == 0 and spread["textured"] == 1 and 0.2 < spread["mixed"] < 0.8
    free_BP = drawn.background(4)
    for i in range(60):
        tiles = [drawn.covered_BHW[i, r : r + 4, c : c + 4].any() for r in range(0, 24, 4) for c in range(0, 24, 4)]
        assert list(free_BP[i]) == [not tile for tile in tiles]


def test_the_stream_is_that_of_its_seed_and_held_out_images_are_others() -> None:
    one, two, other = (held_out_shapes(ShapeConfig.of(seed=s)).pixels_BHWC for s in (0, 0, 1))
    train = draw_shapes(32, 30, "mixed", np.random.default_rng([0, 1])).pixels_BHWC
    assert (one == two).all() and not (one == other).all() and not (one == train).all()


# -------------------------------------------------------------------------------------------- the models
def test_registers_change_no_other_weight_at_the_start() -> None:
    config = ShapeConfig.of(**TINY)
    plain, registers = (shape_model(replace(config, registers=n)).state_dict() for n in (0, 3))
    name = "dinov2_with_registers.embeddings.register_tokens"
    assert plain[name].numel() == 0 and registers[name].shape == (1, 3, 16) and registers[name].std() > 0
    assert all(torch.equal(plain[key], registers[key]) for key in plain if key != name)


def test_the_head_reads_the_class_token_only() -> None:
    done = train_shapes(ShapeConfig.of(**TINY))
    weight = done.module.classifier.weight
    assert (weight[:, 16:] == 0).all() and (weight[:, :16] != 0).all()
    names = done.module.config.id2label
    assert [names[i] for i in range(16)] == list(CLASSES)


# -------------------------------------------------------------------------------------------- what is measured
@pytest.mark.parametrize("registers", [0, 3])
def test_sizes_and_attention_are_those_of_transformers(registers: int) -> None:
    module, held, config = model_and_images(registers=registers)
    rows = layer_rows(seen_in(opened(module), held, config), held, config)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(pixel_values=held.x_NCHW, output_hidden_states=True, output_attentions=True)
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    first = 1 + registers
    for row, h_NTD in zip(rows, out.hidden_states, strict=True):
        size_NX = h_NTD.abs().flatten(1).numpy()
        assert row["top1"] == pytest.approx(size_NX.max(), rel=1e-5)
        middle_N = np.sort(size_NX)[:, (size_NX.shape[1] - 1) // 2]  # the median, the lower of two
        assert row["ratio"] == pytest.approx((size_NX.max(1) / middle_N).mean(), rel=1e-5)
        norms_NT = h_NTD.norm(dim=-1).numpy()
        usual_N = np.median(norms_NT[:, first:], 1)
        assert row["patch_norm_ratio"] == pytest.approx((norms_NT[:, first:].max(1) / usual_N).mean(), rel=1e-5)
        assert row["class_norm_ratio"] == pytest.approx((norms_NT[:, 0] / usual_N).mean(), rel=1e-5)
        largest_N = norms_NT[:, first:].argmax(1)
        assert row["largest_on_background"] == np.mean([held.background_NP[i, p] for i, p in enumerate(largest_N)])
        at_N = size_NX.argmax(1) // h_NTD.shape[-1]
        assert row["at_class"] == (at_N == 0).mean() and row["at_registers"] == np.isin(at_N, range(1, first)).mean()
    assert np.isnan(rows[0]["class_to_class"])
    for row, p_NHTS in zip(rows[1:], out.attentions, strict=True):
        p_NTS = p_NHTS.mean(1).numpy()
        own_NQS = np.concatenate([p_NTS[:, :1], p_NTS[:, first:]], 1)
        top_N = first + own_NQS.mean(1)[:, first:].argmax(1)
        n = np.arange(len(top_N))
        assert row["class_to_top_patch"] == pytest.approx(p_NTS[n, 0, top_N].mean(), rel=1e-5)
        assert row["patches_to_top_patch"] == pytest.approx(p_NTS[n, first:, :][n, :, top_N].mean(), rel=1e-5)
        assert row["patches_to_class"] == pytest.approx(p_NTS[:, first:, 0].mean(), rel=1e-5)
        if registers:
            assert row["class_to_registers"] == pytest.approx(p_NTS[:, 0, 1:first].sum(1).mean(), rel=1e-5)
            assert row["patches_to_registers"] == pytest.approx(p_NTS[:, first:, 1:first].sum(2).mean(), rel=1e-5)
        else:
            assert np.isnan(row["class_to_registers"]) and np.isnan(row["patches_to_registers"])
        assert np.isnan(row["class_to_slot"])


def test_a_slot_has_what_is_missing_from_the_keys() -> None:
    module, held, config = model_and_images("softmax-off-by-one")
    row = layer_rows(seen_in(opened(module), held, config), held, config)[1]
    block = module.dinov2_with_registers.encoder.layer[0]
    with torch.no_grad():
        x_NTD = block.norm1(module.dinov2_with_registers.embeddings(held.x_NCHW))
        made_by = (block.attention.q_proj, block.attention.k_proj)
        q, k = (p(x_NTD).unflatten(-1, (2, 8)).transpose(1, 2) for p in made_by)
        z_NHTS = q @ k.transpose(-1, -2) * 8**-0.5
    slot_NHT = 1 / (1 + z_NHTS.exp().sum(-1))
    assert row["class_to_slot"] == pytest.approx(float(slot_NHT[..., 0].mean()), rel=1e-4)
    assert row["patches_to_slot"] == pytest.approx(float(slot_NHT[..., 1:].mean()), rel=1e-4)


def test_a_planted_outlier_patch_is_found() -> None:
    module, held, config = model_and_images(size=32)
    with torch.no_grad():  # a place far from all others, and one entry of it that is massive
        module.dinov2_with_registers.embeddings.position_embeddings[0, 1 + 9, 3] = 5000.0
    rows = layer_rows(seen_in(opened(module), held, config), held, config)
    for row in rows:
        assert row["massive"] == 1 and row["top1"] == pytest.approx(5000, rel=0.01)
        assert row["outliers"] == pytest.approx(1 / 64) and row["patch_norm_ratio"] > 100
        assert row["largest_on_background"] == held.background_NP[:, 9].mean()
        assert row["at_class"] == row["at_registers"] == 0


def test_effects_are_those_of_an_edit_by_hand() -> None:
    module, held, config = model_and_images(registers=2)
    model = opened(module)
    seen = seen_in(model, held, config)
    rows = {(e["layer"], e["target"], e["edit"]): e for e in effects_of(model, held, seen, config)}
    assert len(rows) == 2 * 4 * 2 and {e["tokens"] for e in rows.values()} == {1, 2}
    base = module.dinov2_with_registers
    top_N = 3 + seen.top_patch(3, config)

    def loss(put: Any) -> torch.Tensor:
        h_NTD = base.embeddings(held.x_NCHW)
        for i, block in enumerate(base.encoder.layer, 1):
            h_NTD = block(h_NTD)
            if i == 2:
                put(h_NTD)
        logits_NV = base.layernorm(h_NTD)[:, 0] @ module.classifier.weight[:, :16].T + module.classifier.bias
        return torch.nn.functional.cross_entropy(logits_NV, held.labels_N, reduction="none")

    def registers_to_mean(h_NTD: torch.Tensor) -> None:
        h_NTD[:, 1:3] = h_NTD[:, 1:3].mean(0)

    def top_to_zero(h_NTD: torch.Tensor) -> None:
        for i, p in enumerate(top_N):
            h_NTD[i, p] = 0

    with torch.no_grad():
        before_N = loss(lambda h: None)
        for put, what in ((registers_to_mean, ("registers", "mean")), (top_to_zero, ("top patch", "zero"))):
            delta_N, row = loss(put) - before_N, rows[(2, *what)]
            assert row["delta_nats"] == pytest.approx(float(delta_N.mean()), abs=1e-6)
            half = 1.96 * float(delta_N.std()) / len(delta_N) ** 0.5
            assert row["ci_high"] - row["ci_low"] == pytest.approx(2 * half, rel=1e-2)
            assert row["baseline_nats"] == pytest.approx(float(before_N.mean()), rel=1e-5)


def test_what_is_edited_to_compare_is_of_the_same_kind() -> None:
    from massact.training.shape_looks import _targets

    module, held, config = model_and_images(size=24, registers=3)
    seen = seen_in(opened(module), held, config)
    found = dict(_targets(seen, 1, held, config))
    assert (found["registers"] == torch.tensor([1, 2, 3])).all()
    for i, free_P in enumerate(held.background_NP):
        others = found["other patches"][i] - 4
        assert len(set(others.tolist())) == 3 and free_P[others].all()
        top, another = (int(found[name][i]) - 4 for name in ("top patch", "another patch"))
        assert top != another and free_P[top] == free_P[another]


def test_attention_that_cannot_be_seen_is_said_and_left_out() -> None:
    lab = run_shapes(["relu"], **TINY | {"registers": 2})
    assert [note.split(":")[0] for note in lab.info.notes] == ["relu", "relu+registers"]
    assert lab.shapes_layers["class_to_class"].isna().all() and (lab.shapes_layers["top1"] > 0).all()
    assert set(lab.shapes_effects["target"]) == {"registers", "other patches"}


# -------------------------------------------------------------------------------------------- how it is run
def test_the_same_seed_gives_the_same_numbers_and_files_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one = run_shapes(["softmax", "kv-bias"], out=tmp_path / "lab", **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.arms == ["softmax", "softmax+registers", "kv-bias"]
    two = run_shapes(["softmax", "kv-bias"], **TINY | {"registers": 0})
    assert two.arms == ["softmax", "kv-bias"]
    free = [c for c in one.shapes.columns if c != "wall_s"]
    both = one.shapes[one.shapes["arm"] != "softmax+registers"].reset_index(drop=True)
    assert both[free].equals(two.shapes[free]) and list(two.shapes["step"]) == [0, 3, 6] * 2
    assert run_shapes(["softmax"], **TINY | {"seed": 1}).last("softmax")["nats"] != one.last("softmax")["nats"]
    again = ShapeLab.open(tmp_path / "lab")
    assert again is not None and again.shapes_effects.equals(one.shapes_effects)
    assert one.info.arms["kv-bias"]["key_std"] == pytest.approx(1, rel=0.3)
    assert one.info.arms["softmax+registers"]["registers"] == 4
    with pytest.raises(UserError, match="holds a finished run"):
        run_shapes(["softmax"], out=tmp_path / "lab", **TINY)


def test_a_training_goes_to_another_process_and_back(tmp_path: Path) -> None:
    """Processes side by side are tested with the other toy lab; what goes to them and comes back must be picklable."""
    one, config = pickle.loads(pickle.dumps((shape_lab._one, ShapeConfig.of(**TINY))))
    made = one(config, tmp_path, shape_lab._silent)
    assert str(pickle.loads(pickle.dumps(made))) == str(made) and made["attention_seen"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 3}, "no option 'step'"),
        ({"background": "grey"}, "background='grey'"),
        ({"optimiser": "adam"}, "adamw"),
        ({"size": 31}, "size=31"),
        ({"size": 5}, "radius of two pixels"),
        ({"steps": 0}, "steps=0"),
        ({"registers": -1}, "registers=-1"),
        ({"registers": 35}, "from 0 to 34"),
        ({"heads": 5}, "5 heads"),
        ({"learning_rate": -1.0}, "must not be negative"),
        ({"options.sdt": 1.0}, "has the option 'sdt'"),
        ({"variants": ["softmax", "softmax"]}, "every variant once"),
        ({"variants": ["softmaxx"]}, "softmax"),
        ({"variants": ["sink-token"]}, "Set registers=1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_shapes(**{"variants": ["softmax", "kv-bias"]} | options)


def test_options_of_a_variant_go_to_those_that_have_them() -> None:
    one, registers, kv = arms_of(["softmax", "kv-bias"], {"options.std": "0.5", "registers": "2"})
    assert (one.options, registers.options, kv.options) == ({}, {}, {"std": 0.5})
    assert (one.registers, registers.registers, kv.registers) == (0, 2, 0)


def test_colours_are_learned_first() -> None:
    """The softmax arm of three seeds after 100 steps: loss 1.32 to 1.42, from 3.20 to 3.26; top-1 not below 0.3."""
    lab = run_shapes(["softmax"], steps=100, every=100, registers=0)
    start, end = lab.shapes.iloc[0], lab.shapes.iloc[-1]
    assert start["nats"] > 2.6 and end["nats"] < 1.65 and end["accuracy"] > 0.18
    assert end["top1"] < 100 and end["ratio"] < 100 and lab.shapes_layers["massive"].max() == 0  # nothing is massive


def test_a_loss_that_is_not_finite_is_told() -> None:
    with pytest.raises(UserError, match="not finite"):
        run_shapes(["softmax"], **TINY | {"learning_rate": 1e30, "registers": 0})
