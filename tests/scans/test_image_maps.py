"""Maps, histograms, neighbours and attention shares against loops; and the figures of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import massact as ma
from massact.corpora import Corpus
from massact.explanations import attention_shares
from massact.models import Model
from massact.positions import Layout, read_layout
from massact.records.errors import UserError
from massact.reports.pictures import (
    draw_attention_shares,
    draw_neighbour_cosines,
    draw_norm_histograms,
    draw_norm_maps,
    draw_overlay,
    write_pictures,
)
from massact.scans import PatchMaps, marked, massive_patches, neighbour_cosines, norm_histograms, patch_maps
from massact.stats import Where
from massact.stats.neighbours import NeighbourCosines
from tests.families import build

OUTLIERS = {0: [4, 9], 2: [28], 3: []}


@cache
def ground() -> tuple[Model, Corpus, Layout, PatchMaps]:
    module = build("dinov2_with_registers")
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                p.mul_(10)
    x = torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    m, corpus = ma.load(module), ma.corpus({"pixel_values": x})
    layout = read_layout(m, corpus)
    return m, corpus, layout, patch_maps(m, corpus, layout, batch_size=3)


def test_norms_are_those_of_the_hidden_states() -> None:
    m, corpus, layout, maps = ground()
    with torch.no_grad():
        states = m.module(**corpus.inputs, output_hidden_states=True).hidden_states
    for layer, h in enumerate(states):
        np.testing.assert_allclose(maps.norms[:, layer], h.norm(dim=-1), rtol=1e-5)
        np.testing.assert_allclose(maps.maxima[:, layer], h.abs().amax(-1), rtol=1e-6)
    assert maps.layers == (0, 1, 2, 3) and maps.on_grid(maps.norms).shape == (4, 4, 5, 5)
    assert maps.on_grid(maps.norms)[1, 2, 3, 4] == maps.norms[1, 2, 4 + 3 * 5 + 4]
    with pytest.raises(UserError, match="not measured"):
        maps.at(9)


def test_cosines_to_neighbours_against_a_loop() -> None:
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    x[1, 1] = 0
    a, want = x.double().numpy(), np.full((3, 4), np.nan)
    for y in range(3):
        for z in range(4):
            near = [(y + dy, z + dz) for dy, dz in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            found = [a[y, z] @ a[p] / np.linalg.norm(a[y, z]) / np.linalg.norm(a[p]) for p in near
                     if 0 <= p[0] < 3 and 0 <= p[1] < 4 and a[p].any() and a[y, z].any()]  # fmt: skip
            want[y, z] = np.mean(found) if found else np.nan
    seen = NeighbourCosines(range(1, 13), (3, 4))
    seen.update(torch.cat([torch.ones(1, 6), x.reshape(12, 6)]), Where(5))
    more = NeighbourCosines(range(1, 13), (3, 4))
    more.update(torch.cat([torch.ones(1, 6), -x.flip(0).reshape(12, 6)]), Where(2))
    again = NeighbourCosines.from_state(more.state())
    again.merge(seen)
    for result in (again.result(), NeighbourCosines.from_state(again.state()).result()):
        np.testing.assert_allclose(result, np.stack([want[::-1], want]), rtol=1e-5, atol=1e-6)
    alone = NeighbourCosines([0], (1, 1))
    alone.update(torch.ones(1, 3), Where(0))
    assert np.isnan(alone.result()).all() and alone.result().shape == (1, 1, 1)
    with pytest.raises(ValueError, match="different options"):
        seen.merge(alone)


def test_neighbours_of_massive_patches_beside_others() -> None:
    _, _, layout, maps = ground()
    table = neighbour_cosines(maps, OUTLIERS)
    mask = marked(OUTLIERS, layout, 4)
    assert mask.sum() == 3 and mask[0, 0, 0] and mask[0, 1, 0] and mask[2, 4, 4]
    for row in table.itertuples():
        values = maps.cosines[:, row.layer][mask if row.group == "massive" else ~mask]
        assert row.n == len(values) and row.mean == pytest.approx(values.mean(), rel=1e-5)
    assert set(neighbour_cosines(maps, {})["group"]) == {"other"}


def test_histograms_count_every_patch() -> None:
    _, _, layout, maps = ground()
    table = norm_histograms(maps, bins=7)
    assert (table.groupby("layer")["count"].sum() == 4 * 25).all() and len(table) == 4 * 7
    row = table.iloc[10]
    values = maps.norms[:, int(row["layer"])][:, 4:]
    assert row["count"] == ((values >= row["low"]) & (values < row["high"])).sum()


def test_findings_of_a_scan_as_patches() -> None:
    _, _, layout, _ = ground()
    findings = pd.DataFrame({"stack": "", "sequence": [0, 0, 1, 1, 1], "layer": [2, 3, 2, 2, 3],
                             "pos": [0, 5, 2, 7, 9]})  # fmt: skip
    assert massive_patches(findings, layout) == {0: [5], 1: [7, 9]}
    assert massive_patches(findings, layout, layer=2) == {1: [7]}


def test_shares_against_the_probabilities_written_out() -> None:
    m, corpus, layout, _ = ground()
    module = build("dinov2_with_registers")
    module.load_state_dict(m.module.state_dict())
    module.set_attn_implementation("eager")
    with torch.no_grad():
        probs = [p.mean(1).double().numpy() for p in module(**corpus.inputs, output_attentions=True).attentions]
    table = attention_shares(m, corpus, layout, OUTLIERS, batch_size=3)
    groups = {"class": [0], "registers": [1, 2, 3]}
    for row in table.itertuples():
        found = []
        for image in range(4):
            mine = groups | {"massive": OUTLIERS.get(image, [])}
            mine["patches"] = [p for p in range(4, 29) if p not in mine["massive"]]
            if mine[row.query] and mine[row.key]:
                found.append(probs[row.layer - 1][image][mine[row.query]][:, mine[row.key]].sum(1).mean())
        assert row.n_images == len(found) and row.mass == pytest.approx(np.mean(found), rel=1e-4, abs=1e-6)
    assert len(table) == 3 * 16
    of_class = table[(table["query"] == "class") & (table["key"] == "registers")]
    assert (of_class["n_keys"] == 3).all()


def test_figures_are_written(tmp_path: Path) -> None:
    m, corpus, layout, maps = ground()
    pictures, mask = corpus.inputs["pixel_values"].permute(0, 2, 3, 1).numpy(), marked(OUTLIERS, layout, 4)
    norms = maps.on_grid(maps.norms)
    written = write_pictures(
        {
            "overlay": lambda: draw_overlay(pictures, mask),
            "grey": lambda: draw_overlay(pictures[..., 0], mask, ["a", "b", "$c$", "d"]),
            "norms": lambda: draw_norm_maps(norms[0], range(4), pictures[0], mask[0]),
            "even": lambda: draw_norm_maps(np.ones((9, 5, 5)), range(9)),
            "histograms": lambda: draw_norm_histograms(norm_histograms(maps)),
            "shares": lambda: draw_attention_shares(attention_shares(m, corpus, layout, OUTLIERS), onset=2),
            "neighbours": lambda: draw_neighbour_cosines(neighbour_cosines(maps, OUTLIERS)),
        },
        tmp_path,
    )
    assert len(written) == 7 and all(p.stat().st_size > 2000 for p in written)


def test_figures_of_nothing_are_refused() -> None:
    for draw in (
        lambda: draw_overlay(np.zeros((2, 8, 8, 3)), np.zeros((3, 2, 2), bool)),
        lambda: draw_norm_maps(np.zeros((1, 2, 2)), [0]),
        lambda: draw_norm_maps(np.ones((2, 2, 2)), [0]),
        lambda: draw_norm_histograms(pd.DataFrame({"layer": [1], "low": [1.0], "high": [2.0], "share": [1.0]}), [5]),
        lambda: draw_attention_shares(pd.DataFrame({"layer": [1], "query": ["x"], "key": ["y"], "mass": [0.5]})),
        lambda: draw_neighbour_cosines(pd.DataFrame()),
    ):
        with pytest.raises(UserError):
            draw()
