"""Schemes by name: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from massact.quantisation.number_formats import Format
from massact.quantisation.schemes import DEFAULT, SITES, scheme
from massact.records.errors import UserError


def test_a_name_says_targets_formats_and_remedies() -> None:
    one = scheme("int8-tensor-static+hadamard+exempt")
    assert one.sites == SITES and one.rotated and one.exempt and one.static and not one.insert
    assert {p.form for p in one.parts} == {Format("int", 8, "tensor", static=True)}
    two = scheme("k:int4-channel/v:int4-token")
    assert [(p.target, p.form.sharing) for p in two.parts] == [("k", "channel"), ("v", "token")]
    assert scheme("kv:int4-token").told(scales=False) == "keys and values: int4"
    three = scheme("weights:int4-group64/act:int8-token+smooth=0.8")
    assert three.weights == Format("int", 4, "group", 64) and three.smooth == 0.8
    assert {*SITES} - {*three.smooth_sites} == {"o_in", "mlp_act"} and scheme(
        "int8-tensor+smooth-all"
    ).smooth_sites == SITES
    assert scheme("weights:int8-channel").told() == "weights: int8 by row"
    assert scheme("mlp_act:fp8-none").form("mlp_act") == Format("fp8", sharing="none")
    assert scheme("int8-static").parts == scheme("int8-tensor-static").parts
    assert scheme("nvfp4-static").static


def test_presets_are_those_of_compressed_tensors() -> None:
    both = scheme("W8A8+exempt")
    assert both.weights == Format("int", 8, "token") and both.exempt
    assert both.form("o_in") == Format("int", 8, "token")
    assert scheme("W4A16").sites == () and scheme("W4A16").weights == Format("int", 4, "group", 128)
    assert scheme("FP8").form("attn_in") == Format("fp8", 8, "tensor", static=True)
    assert scheme("MXFP4").weights == Format("mxfp4", 4, "block")


def test_the_default_table_can_be_read_and_has_no_name_twice() -> None:
    assert len(set(DEFAULT)) == len(DEFAULT)
    read = [scheme(name) for name in DEFAULT]
    plain = {s.name for s in read if s == s.plain()}
    assert {s.name.partition("+")[0] for s in read if s.exempt} <= plain  # each exemption has what it is compared with


@pytest.mark.parametrize(
    "name",
    [
        "", "int9-tensor", "int8-tenser", "int8-group", "int8-tensor32", "q:int8-tensor", "mxfp4-tensor", "int8-none",
        "int8-tensor+exemt", "int8-head", "weights:int8-token", "kv:int8-tensor-static", "int8-token-static", "W9A9",
        "int8-tensor+super", "int8-tensor+smooth=2", "int8-tensor+exempt=1", "W4A16_ASYM", "mxfp4-static",
        "int8-tensor/mlp_in:int4-token", "int8-group0", "weights:int4-group00", "int8-tensor0", "int8-group\u0663",
        "int8-tensor+exempt+exempt", "int8-tensor+smooth+smooth-all", "MXFP8", "MXFP8A16",
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_with_what_would(name: str) -> None:
    with pytest.raises(UserError) as refused:
        scheme(name)
    assert refused.value.do


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("weights:int8-channel+exempt", "exempt"), ("W4A16+insert", "insert"), ("kv:int8-tensor+insert", "insert"),
        ("kv:int8-tensor+smooth", "smooth"), ("mlp_act:int8-tensor+smooth", "smooth"),
        ("int8-tensor+slots+exempt", "exempt"), ("int8-tensor+insert+slots", "insert"),
        ("int8-tensor-static+smooth+hadamard", "static"), ("int8-channel-static+hadamard", "static"),
    ],
)  # fmt: skip
def test_a_remedy_that_would_do_nothing_is_refused(name: str, remedy: str) -> None:
    with pytest.raises(UserError) as refused:
        scheme(name)
    assert remedy in str(refused.value) and name in refused.value.what


def test_every_preset_is_read_or_refused() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    read = set()
    for name, given in PRESET_SCHEMES.items():
        try:
            one = scheme(name)
        except UserError as refused:
            assert refused.do
            continue
        read.add(name)
        weights, inputs = given["weights"], given.get("input_activations")
        assert (one.weights is None) == (weights is None) and bool(one.sites) == (inputs is not None)
        assert one.weights is not None and one.weights.bits == weights.num_bits
    assert {"W8A8", "W4A16", "FP8", "FP8_DYNAMIC", "NVFP4", "MXFP4"} <= read
    assert not {n for n, v in PRESET_SCHEMES.items() for a in v.values() if a is not None and not a.symmetric} & read


def test_some_sites_of_it_and_some_left_out() -> None:
    one = scheme("W8A8").at(("mlp_act",))
    assert one.sites == ("mlp_act",) and one.weights is not None
    assert scheme("int8-tensor").at(("mlp_act",)).without([(2, "mlp_act")]).skipped == {(2, "mlp_act")}
