"""Sequences that are no language, as docs/own-models.md has them: its code is run here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import massact as ma

PAGE = Path(__file__).parents[2] / "docs" / "own-models.md"
OFF = {"null": False, "bos_contrast": False}
MANY = {"thresholds": {"magnitude": 0.0, "ratio": 4.0}, **OFF}


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the example of a decision transformer leaves behind."""
    code = next(
        c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S) if "DecisionTransformer" in c
    )
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_example_of_a_decision_transformer(shown: dict[str, Any]) -> None:
    """Sixty positions, three for each step; the states are those that the model itself gives."""
    model, corpus, module = shown["model"], shown["corpus"], shown["module"]
    assert [(s.path, s.n_layers) for s in model.anatomy.stacks] == [("encoder.h", 3)]
    assert len(shown["why"].heads) == 12 and shown["why"].positions.pos.max() == 59
    result = ma.scan(model, corpus, **MANY)
    with torch.no_grad():
        module.eval()  # as it runs inside massact, which leaves it as it was
        states = module(**corpus.inputs, output_hidden_states=True).hidden_states[:3]  # the last one is normed
    wanted = set()
    for layer, every in enumerate(states):
        assert every.shape == (8, 60, 32)
        for s, h in enumerate(every.double().numpy()):
            at = np.argwhere(np.abs(h) >= 4.0 * np.sort(np.abs(h).reshape(-1))[(h.size - 1) // 2])
            wanted |= {(layer, s, *place) for place in at.tolist()}
    found = result.findings[result.findings.layer < 3]
    assert wanted and set(zip(found.layer, found["sequence"], found.pos, found.dim, strict=True)) == wanted
    assert set(found.modality) == {""} and set(found.token) == {f"token {p}" for p in found.pos}


def test_positions_mod_3_are_return_state_action(shown: dict[str, Any]) -> None:
    """What is changed in the inputs changes its own third of the positions of layer 0."""
    from massact.stats import Keep
    from massact.trace import Probe, measure

    model, corpus = shown["model"], shown["corpus"].head(1)

    def layer_0(inputs: dict[str, Tensor]) -> np.ndarray:
        seen = measure(model, ma.corpus(inputs), [Probe("k", "0.resid_post", Keep)])
        return np.asarray(seen.result("k", seen.sites("k")[0]).values[0])

    still = layer_0(corpus.inputs)
    for third, name in enumerate(("returns_to_go", "states", "actions")):
        moved = layer_0({**corpus.inputs, name: corpus.inputs[name] + 1})
        assert set(np.flatnonzero((moved != still).any(-1)) % 3) == {third}


def test_a_mask_of_steps_is_noted(shown: dict[str, Any]) -> None:
    inputs = dict(shown["corpus"].inputs)
    inputs["attention_mask"] = torch.ones(8, 20, dtype=torch.long)
    inputs["attention_mask"][:, :4] = 0
    result = ma.scan(shown["model"], inputs, **OFF)
    assert any("attention_mask has 20 positions" in note for note in result.info.notes)


class Attention(nn.Module):
    """One head, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Block(nn.Module):
    """Attention and an MLP, without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Masked(nn.Module):
    """Takes features and a mask, which it does not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_positions_of_own_modules_that_do_not_count_are_left_out() -> None:
    x = torch.randn(3, 13, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[1, 9:], mask[2, 11:] = 0, 0
    model = ma.load(Masked(), inputs={"x": x})
    x[1, 11], x[2, 12] = 1e4, 1e4  # padding that is huge
    result = ma.scan(model, {"x": x, "attention_mask": mask}, **MANY)
    counts = {(s, p) for s, p in np.argwhere(mask.numpy() == 1).tolist()}
    assert len(result.findings) and set(zip(result.findings["sequence"], result.findings.pos, strict=True)) <= counts
    assert not any("another number" in note for note in result.info.notes)
    why = ma.explain(model, {"x": x, "attention_mask": mask}, result)
    assert {(r["sequence"], r["pos"]) for r in why.sinks.to_dict("records")} <= counts
