"""What a scan and an explanation of images keep for figures, against hidden states and attentions written out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.models import Model
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.reports.kinds.scan.images import PATCH_FIGURES, draw_patch_attention
from massact.reports.render.figures import write_figures
from massact.scans.thumbnails import small_pictures
from tests.families import build

N, K, REGISTERS, PATCHES = 10, 8, [1, 2, 3], list(range(4, 29))
RULE = {"thresholds": {"magnitude": 0.0, "ratio": 5.5}, "null": False, "bos_contrast": False, "batch_size": 2}


def module() -> torch.nn.Module:
    made = build("dinov2_with_registers")
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 2:
                p.mul_(10)
    return made


def pixels() -> Tensor:
    return torch.rand(N, 3, 20, 20, generator=torch.Generator().manual_seed(0))


@cache
def scanned() -> tuple[Model, ScanResult, Explanation]:
    model, corpus = ma.load(module()), ma.corpus({"pixel_values": pixels()})
    result = ma.scan(model, corpus, **RULE)
    return model, result, ma.explain(model, corpus, result)


@cache
def naive() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states (L, N, T, D), attentions (L, N, T, S) and massive patches by the findings (N, 5, 5)."""
    eager = module()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(pixel_values=pixels(), output_hidden_states=True, output_attentions=True)
    massive = np.zeros((N, 25), bool)
    for row in scanned()[1].findings.itertuples():
        if row.pos >= 4:
            massive[row.sequence, row.pos - 4] = True
    assert massive.any() and not massive.all(1).any()
    states = torch.stack(out.hidden_states).double().numpy()
    return states, torch.stack([a.mean(1) for a in out.attentions]).double().numpy(), massive.reshape(N, 5, 5)


def test_maps_of_the_massive_dim_are_those_of_the_hidden_states_and_none_is_made_up() -> None:
    images, (states, _, massive) = scanned()[1].images, naive()
    found = scanned()[1].findings
    best = found[found["pos"] >= 4].nlargest(1, "magnitude").iloc[0]
    assert images["dim_at"].tolist() == [best["layer"], best["dim"]]
    size_KPD = np.abs(states[best["layer"], :K, 4:])
    largest_KC = np.argsort(-size_KPD.max(1), axis=1)[:, :8]
    for n, map_YX in enumerate(images["dim_size"]):
        if best["dim"] in largest_KC[n]:
            np.testing.assert_allclose(map_YX, size_KPD[n, :, best["dim"]].reshape(5, 5), rtol=1e-5)
        else:
            assert np.isnan(map_YX).all() and not massive[n].all()
    assert np.isfinite(images["dim_size"]).any()


def test_norm_maps_and_massive_patches() -> None:
    images, (states, _, massive) = scanned()[1].images, naive()
    want = np.linalg.norm(states, axis=-1)[:, :K, 4:].reshape(4, K, 5, 5).swapaxes(0, 1)
    np.testing.assert_allclose(images["norms"], want, rtol=1e-5)
    np.testing.assert_array_equal(images["massive"], massive[:K])
    np.testing.assert_allclose(images["massive_share"], massive.mean(0))
    assert images["patches"].tolist() == PATCHES and images["registers"].tolist() == REGISTERS
    assert (images["class_tokens"].tolist(), images["layers"].tolist(), images["n_images"]) == ([0], [0, 1, 2, 3], N)
    np.testing.assert_array_equal(images["pictures"], (pixels()[:K] * 255).round().byte().permute(0, 2, 3, 1))


def test_histograms_are_over_all_images() -> None:
    table, norms = scanned()[1].patch_norms, np.linalg.norm(naive()[0], axis=-1)[:, :, 4:]
    for layer, rows in table.groupby("layer"):
        edges = np.append(rows["low"], rows["high"].iloc[-1])
        edges[[0, -1]] *= [1 - 1e-6, 1 + 1e-6]  # float32 of the library, float64 here
        want = np.histogram(norms[layer], edges)[0]
        assert rows["count"].sum() == want.sum() == N * 25
        assert np.abs(rows["count"].to_numpy() - want).sum() <= 2  # one that sits on an edge
        np.testing.assert_allclose(rows["share"], rows["count"] / (N * 25))
    assert set(table["layer"]) == {0, 1, 2, 3} and (table["stack"] == "").all()


def test_cosines_to_neighbours_of_massive_and_other_patches() -> None:
    states, _, massive = naive()
    x = states[:, :, 4:].reshape(4, N, 5, 5, -1)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    table = scanned()[1].patch_cosines
    assert len(table) == 8
    for row in table.itertuples():
        found = []
        for n in range(N):
            for y, z in np.ndindex(5, 5):
                if massive[n, y, z] == (row.group == "massive"):
                    near = [p for p in ((y + 1, z), (y - 1, z), (y, z + 1), (y, z - 1)) if 0 <= min(p) <= max(p) < 5]
                    found.append(np.mean([x[row.layer, n, y, z] @ x[(row.layer, n, *p)] for p in near]))
        assert row.n == len(found)
        want = [np.mean(found), *np.quantile(found, [0.1, 0.5, 0.9])]
        np.testing.assert_allclose([row.mean, row.p10, row.p50, row.p90], want, rtol=1e-3, atol=1e-5)


def test_attention_between_groups() -> None:
    _, probs, massive = naive()
    table = scanned()[2].patch_attention
    for row in table.itertuples():
        found = []
        for n in range(N):
            chosen = [4 + int(p) for p in np.flatnonzero(massive[n])]
            groups = {"class": [0], "registers": REGISTERS, "massive": chosen,
                      "patches": [p for p in PATCHES if p not in chosen]}  # fmt: skip
            if groups[row.query] and groups[row.key]:
                found.append(probs[row.layer - 1, n][groups[row.query]][:, groups[row.key]].sum(1).mean())
        assert row.n_images == len(found) and row.mass == pytest.approx(np.mean(found), rel=1e-4, abs=1e-6)
    assert len(table) == 3 * 16


def test_the_run_directory_holds_it_and_its_figures(tmp_path: Path) -> None:
    _, result, explanation = scanned()
    result.save(tmp_path)
    explanation.save(tmp_path)
    again, told = ma.open_run(tmp_path), Explanation.open(tmp_path)
    assert told is not None and told.patch_attention.equals(explanation.patch_attention)
    assert again.patch_norms.equals(result.patch_norms) and again.patch_cosines.equals(result.patch_cosines)
    assert again.images.keys() == result.images.keys()
    for name, value in result.images.items():
        np.testing.assert_array_equal(again.images[name], value)
    written = write_figures(again, PATCH_FIGURES, tmp_path, ("png", "svg"))
    assert {p.stem.removeprefix("patches_") for p in written} == {
        "overlay",
        "dim",
        "share",
        "norms",
        "histograms",
        "neighbours",
    }
    written += write_figures(told, {"attention": draw_patch_attention}, tmp_path, ("png", "svg"))
    assert len(written) == 14 and all(p.stat().st_size > 2000 for p in written)


def test_no_pictures_and_text_and_nothing_massive(tmp_path: Path) -> None:
    model, corpus = scanned()[0], ma.corpus({"pixel_values": pixels()})
    quiet = ma.scan(model, corpus, pictures=False, **{**RULE, "thresholds": {"magnitude": 1e9}})
    assert "pictures" not in quiet.images and len(quiet.images["norms"]) == K
    assert not quiet.images["massive_share"].any()
    names = {p.stem for p in write_figures(quiet, PATCH_FIGURES, tmp_path, ("png", "svg"))}
    assert names == {"patches_norms", "patches_histograms", "patches_neighbours"} and set(
        quiet.patch_cosines["group"]
    ) == {"other"}
    assert len(quiet.patch_norms) == len(scanned()[1].patch_norms)
    text = ma.scan(ma.load(build("gpt2")), ma.corpus(torch.randint(5, 90, (2, 9))), null=False)
    assert text.images == {} and not len(text.patch_norms)
    assert not (text.save(tmp_path / "text") / "images.npz").exists() and ma.open_run(tmp_path / "text").images == {}


def test_an_interrupted_scan_goes_on(tmp_path: Path) -> None:
    model, corpus = scanned()[0], ma.corpus({"pixel_values": pixels()})

    def stop(stage: str, done: int, _: int) -> None:
        if stage == "scan" and done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ma.scan(model, corpus, out=tmp_path / "run", progress=stop, **RULE)
    went_on = ma.scan(model, corpus, out=tmp_path / "run", resume=True, **RULE)
    assert went_on.patch_norms.equals(scanned()[1].patch_norms)
    assert went_on.patch_cosines.equals(scanned()[1].patch_cosines)
    np.testing.assert_array_equal(went_on.images["norms"], scanned()[1].images["norms"])


def test_tensors_are_stretched_and_large_pictures_made_small() -> None:
    x = torch.linspace(-3, 5, 2 * 448 * 224).reshape(2, 1, 448, 224)
    small = small_pictures(ma.corpus({"pixel_values": x}))
    assert small is not None and small.shape == (2, 224, 112, 3) and small.dtype == np.uint8
    want = (x.reshape(2, 224, 2, 112, 2).mean((2, 4)) + 3) / 8 * 255
    assert np.abs(small[..., 0] - want.numpy()).max() <= 0.51
    assert small_pictures(ma.corpus({"pixel_values": torch.rand(2, 4, 8, 8)})) is None
