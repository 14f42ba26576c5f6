"""Schemes as edits: equal to formulas written out on the same tensors, and exemption equal to a cached prefix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.corpora import Batch
from massact.prefixes import super_weights_of
from massact.quantisation.rotations import rotation
from massact.quantisation.roundings import Prepared, edit_of, predicted_zeros, site_edit
from massact.quantisation.schemes import SITES as ALL_SITES
from massact.quantisation.schemes import scheme
from massact.records.sites import Site
from massact.scans.earlier_scan import Reopened
from massact.trace import observing

SITES = [point for point in ALL_SITES if point.startswith(("attn", "o_", "mlp"))]  # of a model that attends


def tokens_at(scanned: Reopened, site: Site, sequences: int = 2) -> tuple[Tensor, Batch]:
    """What passes a site (B, T, F), and the batch."""
    batch, held = next(iter(scanned.corpus.batches(sequences))), []
    look = ma.Edit("look", str(site), lambda h, _: (held.append(h.clone()), h)[1])
    with torch.inference_mode(), observing(scanned.model, (), [look], batch=batch, lenient=("edits",)) as seen:
        scanned.model.run(batch.inputs, places=seen.places)
    return held[0], batch


def rounded(x: Tensor, amax: Tensor) -> Tensor:
    return (x / (amax / 127.5)).round().clamp(-128, 127) * (amax / 127.5)


@pytest.mark.parametrize("point", SITES)
def test_one_scale_for_each_sequence_and_none_for_massive_tokens(
    scanned: Reopened, prepared: Prepared, point: str
) -> None:
    site = Site("", 2, point)
    x_BTF, batch = tokens_at(scanned, site)
    whole = site_edit(prepared, scheme("int8-tensor"), site)
    spared = site_edit(prepared, scheme("int8-tensor+exempt"), site)
    assert whole is not None and spared is not None
    got, kept = whole.apply(x_BTF, batch), spared.apply(x_BTF, batch)
    for b in range(len(x_BTF)):
        torch.testing.assert_close(got[b], rounded(x_BTF[b], x_BTF[b].abs().amax()), rtol=1e-5, atol=1e-6)
        assert torch.equal(kept[b, 0], x_BTF[b, 0])  # the massive one
        torch.testing.assert_close(kept[b, 1:], rounded(x_BTF[b, 1:], x_BTF[b, 1:].abs().amax()), rtol=1e-5, atol=1e-6)


def test_rotation_smoothing_constants_and_static_scales_are_their_formulas(
    scanned: Reopened, prepared: Prepared
) -> None:
    site = Site("", 1, "mlp_act")
    x_BTF, batch = tokens_at(scanned, site, 8)
    x_NF = x_BTF.reshape(-1, x_BTF.shape[-1])

    def by(name: str) -> Tensor:
        edit = site_edit(prepared, scheme(name), site)
        assert edit is not None
        return edit.apply(x_BTF, batch)

    turn = rotation(x_BTF.shape[-1], 0)(torch.eye(x_BTF.shape[-1]))  # the matrix itself
    y = x_BTF[0] @ turn
    torch.testing.assert_close(by("int8-tensor+hadamard")[0], rounded(y, y.abs().amax()) @ turn.T, rtol=1e-4, atol=1e-4)
    down = scanned.model.module.get_submodule("transformer.h.0.mlp.c_proj")
    greatest_w = down.weight.abs().amax(1) if type(down).__name__ == "Conv1D" else down.weight.abs().amax(0)
    s = (x_NF.abs().amax(0).clamp(min=1e-5) ** 0.5 / greatest_w.clamp(min=1e-5) ** 0.5).clamp(min=1e-5).detach()
    z = x_BTF[1] / s
    torch.testing.assert_close(by("int8-tensor+smooth-all")[1], rounded(z, z.abs().amax()) * s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by("int8-tensor-static")[2], rounded(x_BTF[2], x_NF.abs().amax()), rtol=1e-5, atol=1e-6)
    rest = x_BTF[:, 1:].abs().amax()
    torch.testing.assert_close(
        by("int8-tensor-static+exempt")[2, 1:], rounded(x_BTF[2, 1:], rest), rtol=1e-5, atol=1e-6
    )
    constant = by("int8-tensor+insert")[:, 0]
    torch.testing.assert_close(constant, x_BTF[:, 0].mean(0).expand_as(constant), rtol=1e-5, atol=1e-6)


def test_entries_that_round_to_zero_are_predicted_from_the_calibration(scanned: Reopened, prepared: Prepared) -> None:
    for name in ("int8-tensor-static", "int8-tensor-static+exempt", "int8-token", "int4-group32", "fp8-none"):
        for point in SITES:
            site, one = Site("", 1, point), scheme(name)
            x_BTF, batch = tokens_at(scanned, site, 8)
            edit = site_edit(prepared, one, site)
            assert edit is not None
            rest, new = x_BTF[:, 1:], edit.apply(x_BTF, batch)[:, 1:]
            truth = float(((new == 0) & (rest != 0)).sum() / (rest != 0).sum())
            form = one.form(point)
            assert form is not None
            assert predicted_zeros(prepared, one, site, form) == pytest.approx(truth, abs=0.01), (name, point)


def test_exemption_is_a_cached_prefix(scanned: Reopened, prepared: Prepared) -> None:
    """A massive first token that no scale knows is what it is where its keys and values were made before (IntactKV)."""
    module, batch = scanned.model.module, next(iter(scanned.corpus.batches(1)))
    ids = batch.inputs["input_ids"]
    nothing = replace(prepared, massive=type(prepared.massive)())
    with torch.inference_mode():
        with ma.edited(scanned.model, edit_of(prepared, scheme("int8-tensor+exempt")), sequences=[0]):
            exempt = module(input_ids=ids).logits[:, 1:]
        with ma.edited(scanned.model, edit_of(prepared, scheme("int8-tensor")), sequences=[0]):
            plain = module(input_ids=ids).logits[:, 1:]
        cache = module(input_ids=ids[:, :1], use_cache=True).past_key_values
        with ma.edited(scanned.model, edit_of(nothing, scheme("int8-tensor"))):
            behind = module(input_ids=ids[:, 1:], past_key_values=cache).logits
    most = exempt.abs().amax()
    assert float((exempt - behind).abs().amax() / most) < 1e-4
    assert float((plain - behind).abs().amax() / most) > 1e-2


def rows_rounded(w_OF: Tensor, most: int, group: int) -> Tensor:
    """Each group of each row with its own scale."""
    split = w_OF.reshape(len(w_OF), -1, group)
    scale = split.abs().amax(-1, keepdim=True) / (most + 0.5)
    return ((split / scale).round().clamp(-most - 1, most) * scale).reshape(w_OF.shape)


def test_weights_are_rounded_in_the_coordinates_that_they_are_multiplied_in(prepared: Prepared) -> None:
    site = Site("", 1, "mlp_act")
    (name,) = prepared.linears.readers[site]
    down = prepared.model.module.get_submodule(name)
    before = {n: p.detach().clone() for n, p in prepared.model.module.named_parameters()}
    w_OF = before[f"{name}.weight"].T  # Conv1D keeps (inputs, outputs)
    width = w_OF.shape[1]
    turn = rotation(width, 0)(torch.eye(width))
    s = (prepared.ranges[site].channels[False].clamp(min=1e-5) / w_OF.abs().amax(0).clamp(min=1e-5)) ** 0.5
    wanted = {
        "weights:int8-channel": rows_rounded(w_OF, 127, width),
        "weights:int4-group32": rows_rounded(w_OF, 7, 32),
        "weights:int4-group32/int8-token+hadamard": rows_rounded(w_OF @ turn, 7, 32) @ turn.T,
        "weights:int8-channel/int8-token+smooth-all": rows_rounded(w_OF * s, 127, width) / s,
    }
    for scheme_name, want in wanted.items():
        with ma.edited(prepared.model, edit_of(prepared, scheme(scheme_name))):
            changed = {n for n, p in prepared.model.module.named_parameters() if not torch.equal(p, before[n])}
            got = down.weight.detach().T.clone()
            prepared.model.module(**prepared.model.example)
        assert changed == {f"{n}.weight" for n in prepared.linears.modules}, scheme_name
        # The greatest of a group is a tie, which may go to either side where a rotation has rounded before.
        space = turn if "hadamard" in scheme_name else torch.eye(width)
        off = ((got - want) @ space).abs() > 1e-4 * w_OF.abs().max()
        assert float(off.double().mean()) < (1 / 32 if "hadamard" in scheme_name else 1e-3), scheme_name
    assert all(torch.equal(p, before[n]) for n, p in prepared.model.module.named_parameters())


def test_exemption_never_raises_a_scale(prepared: Prepared) -> None:
    for ranges in prepared.ranges.values():
        for rotated in (False, True):
            assert float(ranges.amax[rotated, True]) <= float(ranges.amax[rotated, False]) * (1 + 1e-6)
        assert bool((ranges.channels[True] <= ranges.channels[False]).all())
        template = ranges.template()
        assert template is not None and np.isfinite(template.numpy()).all()


def test_super_weights_are_kept_and_left_out_of_scales(prepared: Prepared) -> None:
    (name,) = prepared.linears.readers[Site("", 1, "mlp_act")]
    down = prepared.model.module.get_submodule(name)
    w_OF = down.weight.detach().T.clone()  # Conv1D keeps (inputs, outputs)
    place = divmod(int(w_OF.abs().argmax()), w_OF.shape[1])
    bare = w_OF.clone()
    bare[place] = 0
    want = rows_rounded(bare, 7, 32)
    want[place] = w_OF[place]
    spared = replace(prepared, spared={name: [place]}, _kept={})
    with ma.edited(prepared.model, edit_of(spared, scheme("weights:int4-group32+super"))):
        got = down.weight.detach().T.clone()
        prepared.model.module(**prepared.model.example)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, rows_rounded(w_OF, 7, 32), atol=1e-4)


def test_super_weights_of_the_embedded_model_carry_its_massive_activation(scanned: Reopened) -> None:
    weights, _ = super_weights_of(scanned.model, scanned.corpus, scanned.scan)
    dims = set(scanned.scan.findings["dim"])
    assert weights and all(w.dim in dims and w.share >= 0.1 for w in weights)
    down = scanned.model.module.get_parameter(weights[0].parameter)
    assert float(down[weights[0].entry]) == pytest.approx(weights[0].value)
