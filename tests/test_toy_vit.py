"""`recipes/toy_vit.py`: it runs with the massact of today, draws what it says, and would find an outlier."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import massact as ma
from massact.models import with_attention

_spec = importlib.util.spec_from_file_location("toy_vit", Path(__file__).parents[1] / "recipes" / "toy_vit.py")
assert _spec and _spec.loader
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)

TINY = {"size": 16, "patch": 4, "width": 16, "layers": 3, "heads": 2, "steps": 4, "batch": 8, "held_out": 24}


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(**options: Any) -> Namespace:
    return Namespace(**recipe.DEFAULTS | {"background": "mixed"} | TINY | options)


def test_it_runs_and_tells_every_arm(threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    recipe.main([*asked, "--attention", "softmax", "kv-bias"])
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: dict(zip(head.split()[2:], line.split()[2:], strict=False)) for line in lines[::2]}
    assert list(rows) == ["softmax", "kv-bias", "softmax+registers"]
    for arm, row in rows.items():
        assert (row["p>reg"] == row["c>reg"] == row["reg"] == "-") == ("registers" not in arm)
        assert (row["p>slot"] == row["c>slot"] == "-") == (arm != "kv-bias")
        assert float(row["loss"]) > 1 and row["massive"] == "0"
    assert 0 < float(rows["kv-bias"]["p>slot"]) < 1 and 0 < float(rows["softmax+registers"]["p>reg"]) < 1
    assert ["registers to mean" in line for line in lines[1::2]] == [False, False, True]
    assert all(f"{which} patch to zero" in line for line in lines[1::2] for which in ("top", "other"))


def test_a_shape_has_its_colour_and_other_patches_are_grey() -> None:
    x_BCHW, labels_B, background_BP = recipe.draw(60, settings(size=24), np.random.default_rng(0))
    for x_CHW, label, free_P in zip(x_BCHW.numpy(), labels_B, background_BP, strict=True):
        tiles_PCX = x_CHW.reshape(3, 6, 4, 6, 4).transpose(1, 3, 0, 2, 4).reshape(36, 3, 16)
        spread_P = np.ptp(tiles_PCX.mean(2), axis=1)  # of the channels; noise of 0.04 a pixel is 0.01 in a patch of 16
        assert (spread_P[free_P] < 0.08).all() and 0 < free_P.sum() < 36
        full_C = tiles_PCX.mean(2)[spread_P.argmax()]  # the most coloured patch
        assert np.linalg.norm(2 * recipe.COLOURS - 1 - full_C, axis=1).argmin() == label % 4


@pytest.mark.parametrize("registers", [0, 2])
def test_a_planted_outlier_is_found(registers: int) -> None:
    c = settings(size=32)
    held = recipe.draw(c.held_out, c, np.random.default_rng(1))
    torch.manual_seed(0)
    module = recipe.built(c, registers, seed=0).eval()
    with torch.no_grad():  # a place far from all others, and one entry of it that is massive
        module.dinov2_with_registers.embeddings.position_embeddings[0, 1 + 9, 3] = 5000.0
    row, _ = recipe.looked_into(with_attention(ma.load(module)), held, c, registers, seed=0)
    assert row["massive"] > 0 and row["max|h|"] == pytest.approx(5000, rel=0.01)
    assert row["outliers"] == pytest.approx(1 / 64) and row["patch"] > 100 and row["class"] < 3


def test_effects_are_those_of_an_edit_by_hand() -> None:
    c = settings()
    x_BCHW, labels_B, _ = recipe.draw(c.held_out, c, np.random.default_rng(1))
    torch.manual_seed(0)
    module = recipe.built(c, 2, seed=0).eval()
    base, at_BC = module.dinov2_with_registers, np.tile([1, 2], (c.held_out, 1))
    found_B = recipe.with_states(ma.load(module), "2.resid_post", at_BC, torch.full((2, 16), 0.5), x_BCHW, labels_B)
    with torch.no_grad():
        h_BTD = base.embeddings(x_BCHW)
        for i, block in enumerate(base.encoder.layer, 1):
            h_BTD = block(h_BTD)
            if i == 2:
                h_BTD[:, 1:3] = 0.5
        logits_BV = base.layernorm(h_BTD)[:, 0] @ module.classifier.weight[:, :16].T + module.classifier.bias
    wanted_B = torch.nn.functional.cross_entropy(logits_BV, labels_B, reduction="none")
    torch.testing.assert_close(found_B, wanted_B.double(), rtol=1e-4, atol=1e-5)
