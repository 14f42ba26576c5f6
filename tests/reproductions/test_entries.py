"""Each experiment's numbers against NumPy, written out from hidden states and attention of the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from massact.corpora import Corpus
from massact.models import Model
from massact.records.kinds.reproduction import Reproduction
from massact.reproductions import ENTRIES, reproduce
from tests.golden.make import golden_text_scan

NAIVE = ("E2", "E3", "E4", "E5", "E6", "E8", "E9", "E10", "E11", "E13", "E14", "E15", "E16", "E17")
DIM, T, N = 7, 40, 3  # what `golden_text_scan` plants: a large value of token 0, at position 0 of every sequence


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reproduction, Model, Corpus]:
    model, corpus, _ = golden_text_scan()
    options: Any = {"null": False}
    out = tmp_path_factory.mktemp("reproduced") / "run"
    return reproduce(model, out=out, corpus=corpus, only=NAIVE, scan_options=options), model, corpus


@pytest.fixture(scope="module")
def states(done: tuple[Reproduction, Model, Corpus]) -> np.ndarray:
    """(L + 1, N, T, D): the embeddings, and what every block gives."""
    _, model, corpus = done
    module, seen = model.module, []
    handles = [b.register_forward_hook(lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y))
               for b in module.model.layers]  # fmt: skip
    with torch.no_grad():
        ids = corpus.inputs["input_ids"]
        module(input_ids=ids)
        first = module.get_input_embeddings()(ids)
    for handle in handles:
        handle.remove()
    return torch.stack([first, *seen]).double().numpy()


def ours(done: tuple[Reproduction, Model, Corpus], experiment: str, quantity: str, **where: Any) -> float:
    rows = done[0].reproduced
    rows = rows[(rows["experiment"] == experiment) & (rows["quantity"] == quantity)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, rows
    return float(rows["ours"].iloc[0])


def massive(h_TD: np.ndarray) -> np.ndarray:
    return (np.abs(h_TD) > 100) & (np.abs(h_TD) >= 1000 * np.median(np.abs(h_TD)))


def shown(states: np.ndarray) -> int:
    """The layer of the largest finding."""
    largest = [max(np.abs(h)[massive(h)].max(initial=0) for h in of_layer) for of_layer in states]
    return int(np.argmax(largest))


def test_ranks_of_one_hidden_state(done: Any, states: np.ndarray) -> None:
    layer = shown(states)
    a = np.sort(np.abs(states[layer, 0]).ravel())[::-1]
    wanted = {"top 1": a[0], "top 2": a[1], "top 3": a[2], "top 5": a[4], "top 10": a[9], "top 100": a[99],
              "top 1%": a[int(np.ceil(0.01 * a.size)) - 1], "top 10%": a[int(np.ceil(0.1 * a.size)) - 1]}  # fmt: skip
    for rank, value in wanted.items():
        assert ours(done, "E2", rank, layer=layer) == pytest.approx(value, rel=1e-5)
    assert ours(done, "E2", "median", layer=layer) == pytest.approx(np.median(a), rel=1e-2)


def test_curves_over_layers(done: Any, states: np.ndarray) -> None:
    for layer in range(len(states)):
        tops = [np.sort(np.abs(h).ravel())[::-1][:3] for h in states[layer]]
        for i, value in enumerate(np.mean(tops, 0)):
            assert ours(done, "E4", f"top {i + 1}", layer=layer) == pytest.approx(value, rel=1e-5)
        lower = np.mean([np.sort(np.abs(h).ravel())[h.size // 2 - 1] for h in states[layer]])  # of the middle two
        assert ours(done, "E4", "median", layer=layer) == pytest.approx(lower, rel=1e-5)


def test_what_passes_where(done: Any, states: np.ndarray) -> None:
    found = np.array([[massive(h) for h in of_layer] for of_layer in states])  # (L + 1, N, T, D)
    layers = np.flatnonzero(found.any((1, 2, 3)))
    assert set(np.argwhere(found)[:, 3]) == {DIM} and set(np.argwhere(found)[:, 2]) == {0}
    assert ours(done, "E3", "massive activations") == found.sum()
    assert ours(done, "E5", "first layer") == layers[0] and ours(done, "E5", "last layer") == layers[-1]
    assert ours(done, "E6", "findings at", place="start") == found[shown(states)].sum()
    rows = done[0].reproduced
    assert set(rows[(rows["experiment"] == "E6") & (rows["quantity"] == "dims")]["ours_text"]) == {str(DIM)}
    assert set(rows[rows["quantity"] == "positions"]["ours_text"]) == {"start"}


def test_signed_values_at_ranks_over_sequences(done: Any, states: np.ndarray) -> None:
    layer = shown(states)
    for rank in (1, 2, 3):
        values = [h.ravel()[np.argsort(-np.abs(h).ravel())[rank - 1]] for h in states[layer]]
        assert ours(done, "E8", f"top {rank}, mean", layer=layer) == pytest.approx(np.mean(values), rel=1e-5)
        assert ours(done, "E8", f"top {rank}, std", layer=layer) == pytest.approx(np.std(values), rel=1e-3, abs=1e-4)


def test_constants_of_set_to_mean(done: Any, states: np.ndarray) -> None:
    onset = int(ours(done, "E5", "first layer"))
    values = [h[0, DIM] for h in states[onset] if massive(h)[0, DIM]]
    assert ours(done, "E9", "mean", place=f"start, dim {DIM}") == pytest.approx(np.mean(values), rel=1e-5)


def test_perplexity_without_and_at_zero(done: Any, states: np.ndarray) -> None:
    _, model, corpus = done
    onset, module, ids = int(ours(done, "E5", "first layer")), model.module, corpus.inputs["input_ids"]

    def ppl() -> float:
        with torch.no_grad():
            logits = module(input_ids=ids).logits[:, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        return float(nll.exp())

    def zeroed(_: Any, args: Any, kwargs: Any = None) -> Any:
        h = args[0].clone()
        h[:, 0, DIM] = 0
        return (h, *args[1:])

    assert onset == 0  # planted in the embeddings, which the first block takes
    assert ours(done, "E11", "original") == pytest.approx(ppl(), rel=1e-4)
    handle = module.model.layers[0].register_forward_pre_hook(zeroed)
    assert ours(done, "E11", "set to zero") == pytest.approx(ppl(), rel=1e-4)
    handle.remove()
    assert ours(done, "E10", "values set in a sequence", place="zero") == 1


def attended(done: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of every layer: probabilities (N, H, T, T) and values (N, H, T, E)."""
    _, model, corpus = done
    module, values = model.module, []
    config = module.config
    groups, width = config.num_attention_heads // config.num_key_value_heads, config.hidden_size // 4

    def split(y: torch.Tensor) -> torch.Tensor:
        return y.view(N, T, -1, width).transpose(1, 2).repeat_interleave(groups, 1)

    handles = [b.self_attn.v_proj.register_forward_hook(lambda _, __, y: values.append(split(y).double().numpy()))
               for b in module.model.layers]  # fmt: skip
    before = config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.no_grad():
        probs = module(input_ids=corpus.inputs["input_ids"], output_attentions=True).attentions
    module.set_attn_implementation(before)
    for handle in handles:
        handle.remove()
    return [p.double().numpy() for p in probs], values


def test_attention_on_massive_tokens(done: Any) -> None:
    probs, _ = attended(done)
    for layer, p_NHTT in enumerate(probs, 1):
        assert ours(done, "E14", "attention on massive tokens", layer=layer) == pytest.approx(
            p_NHTT[:, :, 1:, 0].mean(), rel=1e-4
        )


def test_attention_maps_of_the_first_sequence(done: Any) -> None:
    """Without a tokenizer the first sequence stands for the paper's prompts."""
    probs, _ = attended(done)
    rows = done[0].reproduced
    maps = rows[(rows["experiment"] == "E13") & (rows["quantity"] == "attention on massive tokens")]
    assert len(maps) >= 2 and set(maps["place"]) == {"the first sequence"}
    for _, r in maps.iterrows():
        assert r["ours"] == pytest.approx(probs[r["layer"] - 1][0, :, 1:, 0].mean(), rel=1e-4)


def test_from_the_hidden_state_to_the_normed_one(done: Any, states: np.ndarray) -> None:
    """The massive dim's share of |x|^2, before and after the norm of the block that reads it first."""
    module, layer = done[1].module, int(ours(done, "E5", "first layer")) + 1
    h_ND = states[layer - 1][:, 0]
    gamma = module.model.layers[layer - 1].input_layernorm.weight.detach().double().numpy()
    normed_ND = gamma * h_ND / np.sqrt((h_ND**2).mean(-1, keepdims=True) + module.config.rms_norm_eps)
    for stage, x_ND in (("hidden state", h_ND), ("after the norm", normed_ND)):
        place = f"the first sequence: {stage}, massive tokens"
        share = (x_ND[:, DIM] ** 2).sum() / (x_ND**2).sum()
        found = ours(done, "E15", "share of |x|^2 in the massive dims", layer=layer, place=place)
        assert found == pytest.approx(share, rel=1e-4)
        largest = np.abs(x_ND).max(-1).mean()
        assert ours(done, "E15", "largest", layer=layer, place=place) == pytest.approx(largest, rel=1e-4)


def test_the_bias_that_they_add(done: Any) -> None:
    probs, values = attended(done)
    for layer, (p_NHTT, v_NHTE) in enumerate(zip(probs, values, strict=True), 1):
        u = p_NHTT[:, :, 1:, :1] * v_NHTE[:, :, :1]  # what position 0 adds to every later query
        out = p_NHTT[:, :, 1:] @ v_NHTE
        u, out = (x.transpose(0, 2, 1, 3).reshape(N, T - 1, -1) for x in (u, out))
        mean = u.mean(1, keepdims=True)
        constancy = (np.linalg.norm(u - mean, axis=-1) / np.linalg.norm(mean, axis=-1)).mean()
        assert ours(done, "E17", "constancy", layer=layer) == pytest.approx(constancy, rel=1e-3)
        share = ((u**2).sum((1, 2)) / (out**2).sum((1, 2))).mean()
        assert ours(done, "E17", "energy share", layer=layer) == pytest.approx(share, rel=0.02)
        assert ours(done, "E17", "error of the sum", layer=layer) < 1e-4


def test_every_entry_is_declared_whole() -> None:
    beyond = [f"X{i}" for i in range(1, len(ENTRIES) - 24)]
    assert list(ENTRIES) == [f"E{i}" for i in range(1, 26)] + beyond and len(beyond) >= 3
    for e in ENTRIES.values():
        assert e.domain in ("language", "image", "any") and e.needs and e.section
        assert e.says.endswith(".") and e.computation.endswith(".")


def test_numbers_are_in_the_record_with_a_verdict(done: Any) -> None:
    table = done[0].reproduced
    assert set(table["verdict"]) == {"no published value"}
    assert not table["ours"].isna()[table["ours_text"] == ""].any()
    assert isinstance(table, pd.DataFrame) and set(table["experiment"]) == set(NAIVE)
    place = Path("figures/layers.png")
    assert str(place) in done[0].info.experiments["E4"]["figures"]
