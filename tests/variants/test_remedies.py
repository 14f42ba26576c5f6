"""Norms in place of norms: each against its formula, and on models of transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import massact as ma
from massact.models.transformers_models import from_pretrained
from massact.records.errors import UserError
from massact.variants.application import apply_variant
from massact.variants.remedies import REMEDIES, DyT, GatedNorm, NormedHeads, PreAffineNorm, apply_remedy
from tests.families import build


def tokens(n: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(1))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# -------------------------------------------------------------------------------------------- norms
def test_dyt_is_its_formula() -> None:
    x, module = drawn(2, 3, 5), DyT(5, 0.7).double()
    with torch.no_grad():
        module.weight.copy_(drawn(5))
        module.bias.copy_(drawn(5) + 1)
    torch.testing.assert_close(module(x), module.weight * torch.tanh(module.alpha * x) + module.bias)
    assert module.alpha.item() == pytest.approx(0.7)


def test_gated_and_pre_affine_norms_are_their_formulas() -> None:
    x, norm = drawn(2, 3, 6), nn.RMSNorm(6).double()
    gated = GatedNorm(norm, 6, rank=2, std=1.0).double()
    y = norm(x)
    torch.testing.assert_close(gated(x), y * torch.sigmoid(y @ gated.massact_down.T @ gated.massact_up.T))
    before = PreAffineNorm(norm, 6).double()
    torch.testing.assert_close(before(x), y)
    with torch.no_grad():
        before.massact_before.copy_(drawn(6))
    torch.testing.assert_close(before(x), norm(x * drawn(6)))


def test_normed_heads_have_rms_1() -> None:
    module = NormedHeads(nn.Linear(6, 12, bias=False).double(), 3, 4, eps=0.0)
    out = module.double()(drawn(2, 5, 6)).unflatten(-1, (3, 4))
    torch.testing.assert_close(out.square().mean(-1), torch.ones(2, 5, 3).double())


@pytest.mark.parametrize("name", list(REMEDIES))
@pytest.mark.parametrize("family", ["llama", "opt", "vit", "gpt2"])
def test_models_train_save_and_are_proved(name: str, family: str, tmp_path: Path) -> None:
    model = build(family)
    if name == "qk-norm" and family == "gpt2":
        with pytest.raises(UserError, match="separate linear projections"):
            apply_remedy(model, name)
        return
    apply_remedy(model, name)
    given = {"pixel_values": torch.rand(2, 3, 20, 20)} if family == "vit" else {"input_ids": tokens()}
    model.train()(**given)[0].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        wanted = model(**given)[0]
        # A vector of ones before the norm is no change to begin with.
        assert torch.equal(wanted, build(family)(**given)[0]) == (name == "pre-affine")
        model.save_pretrained(tmp_path)
        assert torch.equal(from_pretrained(tmp_path)(**given)[0], wanted)
        assert torch.equal(ma.load(str(tmp_path)).module(**given)[0], wanted)
    ma.load(model)


def test_a_variant_and_a_remedy_go_together(tmp_path: Path) -> None:
    model = apply_remedy(apply_variant(build("llama"), "kv-bias"), "dyt")
    ids = tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        model.save_pretrained(tmp_path)
        again = from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, wanted)
        assert torch.equal(copy.deepcopy(model)(ids).logits, wanted)
    assert [c["name"] for c in again.config.massact["changes"]] == ["kv-bias", "dyt"]
    assert not [m for m in again.modules() if "RMSNorm" in type(m).__name__]


def test_wrong_remedies_are_refused() -> None:
    with pytest.raises(UserError, match="'dyt'"):
        apply_remedy(build("llama"), "dytt")
    with pytest.raises(UserError, match="no option 'alfa'"):
        apply_remedy(build("llama"), "dyt", alfa=1.0)
    with pytest.raises(UserError, match="already has"):
        apply_remedy(apply_remedy(build("llama"), "dyt"), "dyt")
    with pytest.raises(UserError, match="separate linear projections"):
        apply_remedy(build("qwen3"), "qk-norm")  # has one
