"""Outlier metrics: naive NumPy on hand-written hooks, a planted tail, what is unavailable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.classics import classics
from massact.records.kinds.classics import Classics
from tests.facts import tells
from tests.families import build
from tests.planted import Plant, Planted

OFF = {"null": False, "bos_contrast": False}
# Whose output is what attention and the MLP add, and the block.
WRITES = {
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp", "transformer.h.{}"),
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp", "model.layers.{}"),
    "bert": ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense",
             "bert.encoder.layer.{}"),
    "vit": ("vit.layers.{}.attention", "vit.layers.{}.mlp", "vit.layers.{}"),
}  # fmt: skip
POINTS = ("attn_out", "mlp_out", "resid_post")


def tokens(n: int = 4, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def seen(module: nn.Module, name: str, inputs: dict[str, Tensor]) -> dict[tuple[str, int], np.ndarray]:
    """(point, layer) -> (N, T, D), by hand-written hooks."""
    found: dict[tuple[str, int], np.ndarray] = {}

    def hook(key: tuple[str, int]) -> Any:
        return lambda m, args, out: found.__setitem__(
            key, (out if isinstance(out, Tensor) else out[0]).double().numpy())  # fmt: skip

    handles = [module.get_submodule(path.format(i)).register_forward_hook(hook((point, i + 1)))
               for point, path in zip(POINTS, WRITES[name], strict=True) for i in range(3)]  # fmt: skip
    with torch.no_grad():
        states = module(**inputs, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return found | {("resid_post", 0): states[0].double().numpy()}


def naive(x_NTD: np.ndarray, lengths: list[int]) -> dict[str, float]:
    norms, kurtoses, beyond = [], [], []
    for x_TD, n in zip(x_NTD, lengths, strict=True):
        x = x_TD[:n].ravel()
        d = x - x.mean()
        norms.append(np.abs(x).max())
        kurtoses.append((d**4).mean() / (d**2).mean() ** 2)
        beyond.append((np.abs(d) > 6 * x.std()).sum())
    return {"inf_norm": np.mean(norms), "kurtosis": np.mean(kurtoses), "outliers": np.mean(beyond)}


def done(module: nn.Module, inputs: Any) -> Classics:
    model = ma.load(module, inputs=inputs if isinstance(module, Planted) else None)
    return classics(model, inputs, ma.scan(model, inputs, **OFF), which=("outlier-metrics",))


def check(result: Classics, oracle: dict[tuple[str, int], np.ndarray], lengths: list[int]) -> None:
    rows = result.classics.set_index(["site", "layer", "metric"]).value
    want = {key: naive(x, lengths) for key, x in oracle.items()}
    for (point, layer), numbers in want.items():
        for metric, value in numbers.items():
            assert rows[point, layer, metric] == pytest.approx(value, rel=1e-4), (point, layer, metric)
    summary = result.info.outcomes["outlier-metrics"][""]
    for point in POINTS:
        norms = {layer: numbers["inf_norm"] for (p, layer), numbers in want.items() if p == point and layer >= 1}
        assert summary[point]["inf_norm"] == pytest.approx(max(norms.values()), rel=1e-5)
        assert summary[point]["inf_norm_layer"] == max(norms, key=norms.get)  # type: ignore[arg-type]
        for metric in ("kurtosis", "outliers"):
            mean = np.mean([want[point, layer][metric] for layer in (1, 2, 3)])
            assert summary[point][metric] == pytest.approx(mean, rel=1e-4)
        total_D = np.zeros(32, int)
        for layer in (1, 2, 3):
            for x_TD, n in zip(oracle[point, layer], lengths, strict=True):
                x = x_TD[:n]
                total_D += (np.abs(x - x.mean()) > 6 * x.std()).sum(0)
        order = [d for d in np.argsort(-total_D, kind="stable")[:10].tolist() if total_D[d]]
        assert summary[point]["dims"] == order
        if order:
            assert summary[point]["dims_share"] == pytest.approx(total_D[order].sum() / total_D.sum())
            rows_D = result.classics[(result.classics.site == point) & (result.classics.metric == "outliers_of_dim")]
            assert rows_D.value.tolist() == total_D[order].tolist() and rows_D.dim.tolist() == order


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_the_metrics_are_those_of_the_definition(name: str) -> None:
    if name == "vit":
        inputs = {"pixel_values": torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))}
    else:
        inputs = {"input_ids": tokens()}
    module = build(name)
    with torch.no_grad():  # heavy tails, of some dims
        for path in WRITES[name][:2]:
            for i in range(3):
                part = module.get_submodule(path.format(i))
                last = [p for p in part.modules() if hasattr(p, "weight") and p.weight.ndim == 2][-1]
                weight = last.weight if name == "gpt2" else last.weight.T  # Conv1D is (in, out)
                weight[:, 4:8] *= torch.tensor([30.0, 60, 100, 200])
    oracle = seen(module, name, inputs)
    result = done(module, inputs)
    check(result, oracle, [len(x) for x in oracle["resid_post", 1]])
    if name in ("gpt2", "llama"):  # one dim of 32 at all tokens is at most sqrt(31) sigma out
        assert result.info.outcomes["outlier-metrics"][""]["attn_out"]["dims"]
    assert (result.classics.site == "resid_mid").any()


def test_padding_does_not_count() -> None:
    module, lengths = build("llama"), [24, 9, 17, 12]
    with torch.no_grad():
        module.get_input_embeddings().weight[5] *= 300  # a token that is also what the rows are padded with
    ids, mask = tokens(), (torch.arange(24) < torch.tensor(lengths)[:, None]).long()
    ids[mask == 0] = 5
    inputs = {"input_ids": ids, "attention_mask": mask}
    oracle = seen(module, "llama", inputs)
    check(done(module, inputs), oracle, lengths)
    one = oracle["resid_post", 1]
    assert naive(one, lengths)["inf_norm"] < 0.7 * naive(one, [24] * 4)["inf_norm"]


def test_a_planted_tail_is_counted_and_is_that_of_the_massive_dim() -> None:
    """Three values of 3,000 in noise: all of the outliers, in layers 2 and 3 of 4, at one massive dim."""
    plants = [Plant(2, 3, pos, 9, 3000.0) for pos in (0, 20, 30)]
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    result = done(Planted(4, 40, 16, plants), {"x": x})
    stream = result.info.outcomes["outlier-metrics"][""]["resid_post"]
    assert stream["dims"] == stream["massive"] == [9] and stream["dims_share"] == 1 and stream["n_massive"] == 1
    assert stream["inf_norm"] == pytest.approx(3000) and stream["inf_norm_layer"] in (2, 3)
    assert stream["outliers"] == 1.5
    rows = result.classics[(result.classics.site == "resid_post") & (result.classics.metric == "outliers")]
    assert dict(zip(rows.layer, rows.value, strict=True)) == {0: 0, 1: 0, 2: 3, 3: 3, 4: 0}
    assert (rows.n == 2).all()
    assert "attn_out" not in result.info.outcomes["outlier-metrics"][""]
    assert tells(result.info.notes, "attn_out", "unavailable", "layers 1, 2, 3, 4")


def test_no_outliers_have_no_share() -> None:
    """Gaussian noise of 1,280 values: kurtosis 3, nothing beyond six sigma, so no dims and no share of them."""
    x = torch.randn(8, 40, 32, generator=torch.Generator().manual_seed(0))
    stream = done(Planted(3, 40, 32, []), {"x": x}).info.outcomes["outlier-metrics"][""]["resid_post"]
    assert stream["outliers"] == 0 and stream["dims"] == [] and stream["massive"] == []
    assert np.isnan(float(stream["dims_share"]))
    assert stream["kurtosis"] == pytest.approx(3, abs=0.2)
