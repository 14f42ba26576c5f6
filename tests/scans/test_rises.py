"""Hybrids: massive activations are found where they are planted, and one scan says where they rise and what is kept."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.records.kinds.scan import open_run
from massact.records.tables import frame
from massact.reports.kinds.scan import READING
from massact.scans.rises import RISE, attends, rises_table
from tests.anatomy.test_mixers import Mixed, scan, weigh
from tests.anatomy.test_own_modules import D, Own
from tests.facts import tells
from tests.hybrids import HYBRIDS, hybrid

TOKEN, DIM, T = 2, 7, 24
NORMED = ("minimax", "rwkv")  # their stream goes through a norm first: what stands in an embedding does not go on


def text(n: int = 3) -> Tensor:
    ids = torch.randint(3, 96, (n, T), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = TOKEN
    return ids


@pytest.mark.parametrize("name", [n for n in HYBRIDS if n not in NORMED])
def test_planted_activations_are_found_at_their_place(name: str) -> None:
    """One embedding is large at one dim, and is the first token; what is found is what plain hooks see."""
    module = hybrid(name)
    with torch.no_grad():
        module.get_input_embeddings().weight[TOKEN, DIM] = 2e5
    model, ids = ma.load(module), text()
    found = ma.scan(model, ma.corpus(ids), null=False)
    seen: dict[int, Tensor] = {}
    blocks = model.anatomy.stacks[0].blocks

    def keep(layer: int) -> object:
        return lambda m, args, out: seen.__setitem__(layer, (out[0] if isinstance(out, tuple) else out).detach())

    handles = [module.get_submodule(b.module).register_forward_hook(keep(b.layer)) for b in blocks]
    with torch.no_grad():
        module(input_ids=ids, use_cache=False)  # the cache of xLSTM has other shapes than its states
    for handle in handles:
        handle.remove()
    for layer, h_BTD in seen.items():
        rows = found.findings[found.findings["layer"] == layer].set_index("sequence")
        assert list(rows.index) == [0, 1, 2] and set(rows["pos"]) == {0} and set(rows["dim"]) == {DIM}
        assert rows["value"].to_numpy() == pytest.approx(h_BTD[:, 0, DIM].numpy(), rel=1e-4)
    layers = found.layers.set_index("layer")["mixer"]
    assert list(layers) == ["", *HYBRIDS[name][3]]


def naive(v: list[float], mixers: list[str]) -> list[dict[str, float]]:
    """Rises of one dim, written out: v[0..L], mixers[1..L]."""
    n_layers, rows = len(v) - 1, []
    for n in range(1, n_layers + 1):
        if v[n] - v[n - 1] < max(v) / 4:
            continue
        nexts = [m for m in range(n + 1, n_layers + 1) if "attention" in mixers[m]]
        later = [m for m in range(n + 1, n_layers + 1) if v[m] - v[m - 1] >= max(v) / 4]
        end = later[0] - 1 if later else n_layers
        rows.append({"layer": n, "next_attention": nexts[0] if nexts else -1,
                     "kept": v[nexts[0] - 1] / v[n] if nexts else np.nan, "next_rise": later[0] if later else -1,
                     "kept_between": min(v[n : end + 1]) / v[n]})  # fmt: skip
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_rises_are_those_written_out(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = int(draw.integers(2, 12))
    v = [float(x) for x in np.exp(draw.normal(0, 2, n + 1))]
    mixers = ["", *(str(m) for m in draw.choice(["attention", "ssm", "attention+ssm", "none"], n))]
    layers = pd.DataFrame({"stack": "", "site": "resid_post", "layer": range(n + 1), "mixer": mixers})
    dims = pd.DataFrame({"stack": "", "site": "resid_post", "layer": range(n + 1), "dim": 5, "max": v})
    clusters = pd.DataFrame({"stack": [""], "site": ["resid_post"], "dim": [5], "n_findings": [1]})
    mine = rises_table(layers, dims, clusters)
    if len(set(mixers[1:])) < 2:
        assert not len(mine)
        return
    wanted = frame("rises", None) if not (rows := naive(v, mixers)) else pd.DataFrame(rows)
    assert len(mine) == len(wanted) and RISE == 0.25
    for column in wanted if len(wanted) and rows else ():
        np.testing.assert_allclose(mine[column].astype(float), wanted[column].astype(float))
    for row in mine.itertuples():
        assert row.mixer == mixers[row.layer] and row.value == v[row.layer] and row.before == v[row.layer - 1]
        assert row.next_mixer == (mixers[row.layer + 1] if row.layer < n else "")


def test_a_layer_attends_by_its_own_name() -> None:
    assert attends("attention+ssm") and attends("attention") and not attends("linear_attn") and not attends("")


class Writes(nn.Module):
    """Adds a constant at dim 3 of the first token."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.out = nn.Linear(D, D)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        add = torch.zeros_like(x)
        add[:, 0, 3] = self.value
        return 0.01 * self.out(torch.nn.functional.layer_norm(x, x.shape[-1:])) + add


class Layer(nn.Module):
    def __init__(self, mixer: nn.Module, value: float) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(D), mixer, Writes(value)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(x)


def test_spikes_before_attention_and_what_is_kept_come_out_of_one_scan(tmp_path) -> None:
    """ssm, ssm (spike), attention (half of it is taken), ssm (a second spike), ssm, attention."""
    torch.manual_seed(0)
    state = scan(lambda v, s: v * s, lambda s: torch.exp(-s))
    mixers = [state, state, weigh(lambda s_BTS: s_BTS.softmax(-1)), state, state,
              weigh(lambda s_BTS: s_BTS.softmax(-1))]  # fmt: skip
    values = [0.0, 4000.0, -2000.0, 6000.0, -2000.0, -5990.0]
    module = Own([Layer(Mixed(mix), value) for mix, value in zip(mixers, values, strict=True)]).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.3)
    model = ma.load(module, inputs={"signal": torch.randn(2, 13, 5)})
    found = ma.scan(model, ma.corpus({"signal": torch.randn(3, 13, 5)}), null=False, out=tmp_path / "run")
    rows = open_run(tmp_path / "run").rises.set_index("layer")
    assert list(rows.index) == [2, 4] and set(rows["dim"]) == {3}
    assert list(rows["mixer"]) == ["ssm", "ssm"] and list(rows["next_mixer"]) == ["attention", "ssm"]
    assert list(rows["next_attention"]) == [3, 6] and list(rows["next_rise"]) == [4, -1]
    assert rows["kept"].tolist() == pytest.approx([1.0, 0.75], rel=0.01)
    assert rows["kept_between"].tolist() == pytest.approx([0.5, 10 / 8000], rel=0.3)
    said = READING.words(found)
    assert tells(said, "state-space", "attention", 3, 6) and tells(said, "Dim 3", "layer 2", "layer 4", "75%")
    small = [table for section in READING.brief(found) for table in section.parts]
    assert any("mixer" in [c.name for c in table.columns] for table in small)
