"""What a scan says must be true: planted coordinates, naive oracles, real models, null models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import massact as ma
from massact.records.kinds.scan import ScanResult
from tests.families import build
from tests.planted import Plant, Planted
from tests.scans import naive

OFF = {"null": False, "bos_contrast": False}
T, D, L = 20, 24, 5


def rows(result: ScanResult, site: str = "resid_post") -> set[tuple[int, int, int, int, float]]:
    f = result.findings[result.findings.site == site]
    return set(zip(f.layer, f.sequence, f.pos, f.dim, f.value, strict=True))


# ------------------------------------------------------------------------------------------------ (a) planted
@st.composite
def plants(draw: st.DrawFn) -> list[Plant]:
    places = draw(
        st.lists(st.tuples(st.integers(0, T - 1), st.integers(0, D - 1)), min_size=1, max_size=25, unique=True)
    )
    made = []
    for pos, dim in places:
        first = draw(st.integers(1, L))
        value = draw(st.floats(200, 50_000)) * draw(st.sampled_from([1, -1]))
        made.append(Plant(first, draw(st.integers(first, L)), pos, dim, float(torch.tensor(value).bfloat16())))
    return made


@settings(max_examples=25)
@given(plants(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_planted_activations_are_found_and_nothing_else(planted: list[Plant], dtype: torch.dtype) -> None:
    """Recall and precision 1.0, values exact; more plants than the scan keeps at first (top_k 4)."""
    torch.manual_seed(1)
    module = Planted(L, T, D, planted).to(dtype)
    x = (0.02 * torch.randn(3, T, D)).to(dtype)
    model = ma.load(module, inputs={"x": x})
    result = ma.scan(model, {"x": x.float()}, top_k=4, rank_sequences=0, **OFF)
    states = naive.hidden_states(module, module.layers, {"x": x})
    wanted = {(layer, s, p.pos, p.dim) for p in planted for layer in range(p.first, p.last + 1) for s in range(3)}
    assert {r[:4] for r in rows(result)} == wanted
    for layer, sequence, pos, dim, value in rows(result):
        assert value == states[layer][sequence, pos, dim]
    exact = {(p.pos, p.dim): p.value for p in planted}
    assert all(abs(v - exact[pos, dim]) <= abs(v) * torch.finfo(dtype).eps for _, _, pos, dim, v in rows(result))


def test_planted_onset_offset_and_constancy() -> None:
    module = Planted(6, T, D, [Plant(2, 4, 0, 7, 3000.0), Plant(3, 3, 5, 1, -700.0)])
    x = 0.02 * torch.randn(4, T, D, generator=torch.Generator().manual_seed(0))
    result = ma.scan(ma.load(module, inputs={"x": x}), {"x": x}, **OFF)
    answer = result.info.answer["stacks"][0]
    assert (answer["onset"], answer["offset"], answer["layers"]) == (2, 4, [2, 3, 4])
    assert answer["onset_jump"] > 1000 and answer["dims"][0] == [7, 12 / 16]
    assert answer["group"] == "start" or answer["peak"]["layer"] == 3
    c = result.coordinates.set_index(["layer", "dim", "position_class"])
    assert c.loc[(2, 7, "start"), "share"] == 1.0 and c.loc[(2, 7, "start"), "count"] == 4
    assert c.loc[(2, 7, "start"), "mean"] == pytest.approx(3000, rel=1e-6)
    assert c.loc[(2, 7, "start"), "spread"] < 1e-6
    assert c.loc[(3, 1, "other"), "mean"] == pytest.approx(-700, rel=1e-6)
    ranks = result.ranks[(result.ranks.source == "corpus") & (result.ranks["rank"] == "top 1")].iloc[0]
    assert ranks.value_mean == pytest.approx(3000, rel=1e-6) and ranks.same_dim == 1.0


# ------------------------------------------------------------------------------------------------- (b) oracle
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer", "vit": "vit.layers"}
THRESHOLDS = {"gpt2": (0.05, 3.0), "llama": (0.05, 3.0), "bert": (1.0, 3.5), "vit": (0.05, 3.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_tables_equal_the_naive_scan(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = build(name, seed=3).to(dtype)
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        corpus = {"pixel_values": torch.rand(5, 3, 20, 20, generator=generator)}
        inputs = {"pixel_values": corpus["pixel_values"].to(dtype)}
    else:
        corpus = torch.randint(5, 90, (5, 40), generator=generator)  # type: ignore[assignment]
        inputs = {"input_ids": corpus}  # type: ignore[dict-item]
    magnitude, ratio = THRESHOLDS[name]
    result = ma.scan(
        ma.load(module),
        corpus,
        thresholds={"magnitude": magnitude, "ratio": ratio},
        top_k=8,
        batch_size=5,
        out=tmp_path / "run",
        **OFF,
    )
    saved = ma.open_run(tmp_path / "run")
    states = naive.hidden_states(module, module.get_submodule(BLOCKS[name]), inputs)
    layers = saved.layers[saved.layers.site == "resid_post"].set_index("layer")
    for layer, row in enumerate(naive.layer_rows(states)):
        for column, value in row.items():
            exact = column in ("top1", "top2", "top3", "median", "max", "nonfinite", "ratio_max")
            near = 1e-6 * row["std"] if column == "mean" else 0  # the mean is a small difference of large sums
            got = layers.loc[layer, column]
            assert got == pytest.approx(value, rel=1e-12 if exact else 2e-5, abs=near), (layer, column)
    wanted = naive.findings(states, magnitude, ratio)
    assert len(wanted) > 20
    assert rows(saved) == wanted
    assert len(result.findings) == len(saved.findings)


def test_dims_table_equals_numpy() -> None:
    module = build("gpt2", seed=3)
    ids = torch.randint(5, 90, (4, 30), generator=torch.Generator().manual_seed(2))
    result = ma.scan(ma.load(module), ids, **OFF)
    for layer, h in enumerate(naive.hidden_states(module, module.transformer.h, {"input_ids": ids})):
        flat = h.reshape(-1, h.shape[-1])
        d = result.dims[result.dims.layer == layer].sort_values("dim")
        assert np.array_equal(d["max"], np.abs(flat).max(0))
        np.testing.assert_allclose(d["mean"], flat.mean(0), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(d["mean_abs"], np.abs(flat).mean(0), rtol=1e-5)
        np.testing.assert_allclose(d["std"], flat.std(0), rtol=1e-5)


def test_post_norm_model_reports_both_sites() -> None:
    """BERT's values live in the sum before the norm: plant one there and it must be found at that site."""
    module = build("bert", seed=3)
    with torch.no_grad():
        module.bert.encoder.layer[1].output.dense.bias[11] = 900.0
    ids = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(2))
    result = ma.scan(ma.load(module), ids, thresholds={"ratio": 100.0}, **OFF)
    found = result.findings
    assert set(found.site) == {"resid_post_prenorm"} and set(found.dim) == {11} and set(found.layer) == {2}
    assert len(found) == 40  # every token of both sequences: more than the scan keeps at first


# --------------------------------------------------------------------------------------------------- (c) real
def test_real_vit_has_massive_activations_at_one_dim(real_data: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    paths = sorted((real_data / "images").glob("*.JPEG"))[:6]
    model = ma.load(real_data / "models" / "vit-tiny-imagenet")

    def pixels(path: Path) -> torch.Tensor:
        picture = image.open(path).convert("RGB").resize((224, 224))
        return (torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 255 - 0.5) / 0.5

    corpus = ma.corpus({"pixel_values": torch.stack([pixels(p) for p in paths])})
    # "at least or around 1,000 times the median" (Sun 2024): these stand at 650 to 1,100.
    result = ma.scan(model, corpus, thresholds={"ratio": 500.0}, **OFF)
    assert set(result.findings.dim) == {41}
    assert result.info.answer["stacks"][0]["layers"] == [8, 9, 10, 11, 12]
    strict = ma.scan(model, corpus, **OFF)
    assert set(strict.findings.layer) <= {8} and set(strict.near_misses.dim) == {41}
    assert len(strict.findings) + len(strict.near_misses) == len(result.findings)


def test_real_llama_has_none(real_data: Path) -> None:
    result = ma.scan(ma.load(real_data / "models" / "stories260k"), n_sequences=6, seq_len=128, **OFF)
    assert not result.found and not len(result.near_misses)
    assert result.info.answer["stacks"][0]["largest"]["ratio"] < 100


# --------------------------------------------------------------------------------------------------- (d) null
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "qwen3", "opt", "modernbert"])
def test_random_models_have_none(name: str) -> None:
    corpus = {"pixel_values": torch.rand(4, 3, 20, 20)} if name == "vit" else torch.randint(5, 90, (4, 40))
    result = ma.scan(ma.load(build(name, seed=7)), corpus, bos_contrast=False)
    assert not result.found and not len(result.near_misses)
    null = result.info.answer["null"]
    assert null["n_findings"] == 0 and null["largest_ratio"] > 1
