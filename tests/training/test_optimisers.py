"""A loss, rescaling and optimisers: each against its formula, and on models of transformers."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from massact.records.errors import UserError
from massact.training.optimisers import (
    MuonWithAdamW,
    OptimizerSettings,
    TargetVarianceRescaling,
    optimizer,
    param_groups,
    rescale_weights,
    tweo_loss,
)
from massact.variants.application import apply_variant
from tests.families import build


def tokens(n: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(1))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# -------------------------------------------------------------------------------------------- losses, rescaling
def test_tweo_is_its_formula_and_has_its_gradient() -> None:
    hidden = [drawn(2, 3, 4).requires_grad_(), (2 * drawn(2, 3, 4)).requires_grad_()]
    wanted = sum(float(((h.detach().abs() / (3.0 + 1e-6)) ** 4).mean()) for h in hidden) / 2
    assert float(tweo_loss(hidden)) == pytest.approx(wanted)
    assert torch.autograd.gradcheck(lambda *h: tweo_loss(h), hidden)
    assert tweo_loss([torch.full((1, 1, 1), 100.0, dtype=torch.bfloat16)]).dtype == torch.float32
    with pytest.raises(UserError, match="output_hidden_states"):
        tweo_loss([])


def test_tweo_pulls_down_a_spike_and_leaves_small_values() -> None:
    h = torch.tensor([[[0.1, 0.5, 300.0]]], requires_grad=True)
    tweo_loss([h]).backward()
    assert h.grad is not None
    assert h.grad[0, 0, 2] > 1e6 * h.grad[0, 0, 1]


def test_rescaling_changes_only_matrices_that_are_too_wide() -> None:
    model = build("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    w = model.get_parameter(name)
    with torch.no_grad():
        w.mul_(50.0).add_(0.3)
        others = {n: p.clone() for n, p in model.named_parameters() if n != name}
    std = {n: float(p.std()) for n, p in others.items() if p.ndim == 2 and "layers" in n}
    target = 1.05 * max(std.values())
    before = w.detach().clone()
    assert rescale_weights(model, target=target, factor=1.2) == [name]
    wanted = (before - before.mean()) / before.std() * target
    torch.testing.assert_close(w.detach(), wanted)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n != name)
    assert rescale_weights(model, target=target, factor=1.2) == []


def test_the_callback_rescales_every_so_many_steps() -> None:
    model, callback = build("llama"), TargetVarianceRescaling(target=0.001, every=3)
    for step in range(1, 7):
        callback.on_step_end(None, SimpleNamespace(global_step=step), None, model=model)
    assert {step for step, _ in callback.rescaled} == {3}  # at step 6 nothing is too wide any more


# -------------------------------------------------------------------------------------------- optimisers
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_optimisers_lower_the_loss_and_go_on_exactly(name: str) -> None:
    """Every parameter is in one group once; a state put back gives the same steps bit for bit."""
    torch.manual_seed(0)
    model, ids = apply_variant(build("llama"), "kv-bias").train(), tokens()
    settings = OptimizerSettings(lr=0.05 if name == "sgd" else 1e-3, muon_lr=1e-3)
    opt = optimizer(model, name, settings)
    held = [p for g in opt.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters())

    def steps(m: nn.Module, o: torch.optim.Optimizer, n: int) -> list[float]:
        losses = []
        for _ in range(n):
            loss = m(ids, labels=ids).loss
            loss.backward()
            o.step()
            o.zero_grad()
            losses.append(loss.item())
        return losses

    first = steps(model, opt, 8)
    assert first[-1] < first[0]
    twin = copy.deepcopy(model)
    other = optimizer(twin, name, settings)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert steps(model, opt, 3) == steps(twin, other, 3)


def test_muon_takes_hidden_matrices_and_a_schedule_reaches_both_parts() -> None:
    model = apply_variant(build("llama"), "kv-bias")
    opt = optimizer(model, "muon", OptimizerSettings(lr=1.0, muon_lr=2.0))
    assert isinstance(opt, MuonWithAdamW)
    names = {id(p): n for n, p in model.named_parameters()}
    muon = {names[id(p)] for g in opt.parts[0].param_groups for p in g["params"]}
    assert all(n.endswith("_proj.weight") for n in muon) and len(muon) == 3 * 7
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    opt.step()
    schedule.step()
    assert [g["lr"] for g in opt.parts[0].param_groups] == [1.0]
    assert {g["lr"] for g in opt.parts[1].param_groups} == {0.5}
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"] = 7.0
    assert opt.parts[0].param_groups[0]["lr"] == 7.0


def test_weight_decay_falls_on_matrices_or_all_or_none() -> None:
    model = apply_variant(build("gpt2"), "kv-bias")
    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups(model, 0.1)
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert "transformer.h.0.attn.massact_k" in decayed and "transformer.h.0.ln_1.weight" not in decayed
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert [g["weight_decay"] for g in param_groups(model, 0.1, "all")] == [0.1]
    assert {g["weight_decay"] for g in optimizer(model, "adamw", OptimizerSettings(weight_decay=0.0)).param_groups} == {
        0
    }
    with pytest.raises(UserError, match="decay rule"):
        param_groups(model, 0.1, "some")
    with pytest.raises(UserError, match="'adamw'"):
        optimizer(model, "adam")
