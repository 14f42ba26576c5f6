"""What a token leaves in a state: against a recurrence written out, and for hybrids."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.explanations.states import chosen_tokens, distances, states_table
from massact.records.kinds.explanation import Explanation
from massact.records.tables import frame
from massact.reports.kinds.explanation import READING
from massact.reports.kinds.explanation.states import half_after
from tests.anatomy.test_own_modules import D, Own
from tests.facts import tells
from tests.hybrids import hybrid

T, EPS = 24, 1e-7


class Leaky(nn.Module):
    """s_t = keep s_(t-1) + x_t, token by token; out = s."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep, self.out = keep, nn.Linear(D, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        state, out = torch.zeros_like(x_BTD[:, 0]), torch.zeros_like(x_BTD)
        for t in range(x_BTD.shape[1]):
            state = self.keep * state + x_BTD[:, t]
            out[:, t] = state
        return self.out(out)


class Layer(nn.Module):
    def __init__(self, keep: float) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(D), Leaky(keep)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


KEEPS = (0.4, 0.9, 1.0)


def test_influence_is_that_of_a_recurrence_written_out() -> None:
    torch.manual_seed(0)
    module = Own([Layer(keep) for keep in KEEPS]).eval()
    signal = torch.randn(3, T, 5)
    model = ma.load(module, inputs={"signal": torch.randn(2, 13, 5)})
    assert [b.mixer for b in model.anatomy.stacks[0].blocks] == ["ssm"] * 3
    corpus, kept = ma.corpus({"signal": signal}), [range(T)] * 3
    tokens = {0: [(0, "start"), (5, "random"), (9, "random")], 2: [(0, "start"), (3, "random")]}
    rows, notes = states_table(model, corpus, model.anatomy.stacks[0], tokens, kept)
    assert not notes and (rows["noise"] < 1e-6).all()
    with torch.no_grad():
        x = module.embed(signal)
        for layer, block in enumerate(module.blocks, 1):
            u, y = block.norm(x), block.mixer(block.norm(x))
            size_B = y.norm(dim=-1).square().mean(1).sqrt()
            w = block.mixer.out(u).norm(dim=-1)  # what each token adds, after the projection
            for row in rows[rows["layer"] == layer].itertuples():
                left = KEEPS[layer - 1] ** row.distance
                want = np.mean([float(w[s, 0] / size_B[s]) * left for s in (0, 2)])
                null = [float(w[s, p] / size_B[s]) * left for s, p in ((0, 5), (0, 9), (2, 3)) if p + row.distance < T]
                assert row.influence == pytest.approx(want, rel=1e-3, abs=3 * EPS)
                assert row.influence_random == pytest.approx(np.mean(null), rel=1e-3, abs=3 * EPS)
                assert row.left == pytest.approx(KEEPS[layer - 1] ** (row.distance - 1), rel=1e-3, abs=3 * EPS)
                assert (row.n_tokens, row.n_random, row.submodule) == (2, len(null), "ssm_out")
            x = x + y
    assert set(rows["distance"]) == set(distances(T)) == {1, 2, 4, 8, 16}
    # keep^(d - 1) is left at distance d; 0.9^7 is the first measured one that is no more than a half.
    assert [half_after(mine, "left") for _, mine in rows.groupby("layer")] == [2, 8, np.inf]


def test_tokens_are_of_the_classes_that_they_are_called() -> None:
    corpus = ma.corpus(torch.randint(3, 96, (2, 12)))
    findings = frame("findings")
    assert {kind for mine in chosen_tokens(findings, corpus, [range(12)] * 2, 0).values() for _, kind in mine} == {
        "start", "random"
    }  # fmt: skip
    kept = [range(3, 12), range(12)]
    found = pd.DataFrame({"sequence": [0, 0], "pos": [3, 7]})
    mine = chosen_tokens(found, corpus, kept, 0)[0]
    assert (3, "start") in mine and (7, "other") in mine and all(p >= 3 for p, _ in mine)
    assert len({p for p, _ in mine}) == len(mine)


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "qwen3_next", "lfm2", "zamba2", "recurrent_gemma"])
def test_hybrids_are_explained_with_states_and_the_attention_that_there_is(name: str, tmp_path) -> None:
    module = hybrid(name)
    with torch.no_grad():
        module.get_input_embeddings().weight[2, 7] = 2e5
    ids = torch.randint(3, 96, (3, T), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 2
    model, corpus = ma.load(module), ma.corpus(ids)
    found = ma.scan(model, corpus, null=False, out=tmp_path)
    why = ma.explain(model, corpus, found)
    why.save(tmp_path)
    opened = Explanation.open(tmp_path)
    assert opened is not None and len(opened.states) == len(why.states)
    mixers = found.layers.set_index("layer")["mixer"]
    others = {int(n) for n, mixer in mixers.items() if set(mixer.split("+")) - {"attention", "none", ""}}
    assert set(why.states["layer"]) == others and (why.states["influence"] >= 0).all()
    first = why.states[(why.states["distance"] == 1) & (why.states["position_class"] == "start")]
    assert (first["left"] == 1).all() and (first["influence"] > 10 * first["noise"]).all()
    if name == "lfm2":  # a kernel of three tokens: nothing is felt three tokens later
        assert (why.states.loc[why.states["distance"] >= 4, "influence"] <= why.states["noise"].max()).all()
    attends = {int(n) for n, mixer in mixers.items() if "attention" in mixer.split("+")}
    assert set(why.heads["layer"]) == attends
    unseen = [n for n in range(1, 4) if n not in attends]
    assert not unseen or (tells(why.info.notes, "mixed") and why.info.unseen_layers("") in (unseen, []))
    writes = set(why.writers["submodule"]) - {"embedding", "mlp_out", "mlp_out_2"}
    assert writes and all("_out" in point for point in writes)
    top = first.loc[first["ratio"].idxmax()]
    assert tells(READING.words(why), "States", f"layer {top.layer}", float(top.ratio))
    assert any(made is not None and made.id == "states" for made in (make(why) for make in READING.sections))
