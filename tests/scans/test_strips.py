"""A strip has for every token of its texts the greatest value of each hidden state, as plain hooks see it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import massact as ma
from massact.corpora import corpus
from massact.records.errors import UserError
from massact.scans.strip import TOKENS, strip
from tests.families import build

OFF = {"null": False, "bos_contrast": False, "rank_sequences": 0}


def test_a_strip_is_what_hooks_see() -> None:
    module = build("llama").eval()
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    seen: dict[tuple[str, int], torch.Tensor] = {}
    hooks = []
    for i, block in enumerate(module.model.layers, 1):
        hooks.append(block.register_forward_hook(lambda m, a, out, i=i: seen.update({("resid_post", i): out})))
        hooks.append(block.mlp.register_forward_hook(lambda m, a, out, i=i: seen.update({("mlp_out", i): out})))
        hooks.append(
            block.self_attn.register_forward_hook(lambda m, a, out, i=i: seen.update({("attn_out", i): out[0]}))
        )
    with torch.inference_mode():
        module(ids[:1])
    for hook in hooks:
        hook.remove()
    found = strip(ma.load(module), [corpus({"input_ids": ids})], "")
    points, layers = found["points"].tolist(), found["layers"].tolist()
    assert set(points) == {"resid_post", "mlp_out", "attn_out"} and layers == list(range(len(module.model.layers) + 1))
    for (point, layer), h in seen.items():
        h_TD = (h[0] if isinstance(h, tuple) else h).reshape(12, -1).double().numpy()
        at = points.index(point), layers.index(layer)
        dim_T = np.abs(h_TD).argmax(1)
        np.testing.assert_array_equal(found["dim"][at], dim_T)
        np.testing.assert_allclose(found["value"][at], h_TD[np.arange(12), dim_T], rtol=1e-6)
        np.testing.assert_allclose(
            found["median"][at][0], np.sort(np.abs(h_TD).ravel())[(h_TD.size - 1) // 2], rtol=1e-6
        )
    at = points.index("mlp_out"), layers.index(0)
    assert np.isnan(found["value"][at]).all() and (found["dim"][at] == -1).all()  # there is no such site


def test_texts_are_cut_and_read_once() -> None:
    model = ma.load(build("llama").eval())
    long = corpus({"input_ids": torch.arange(2 * (TOKENS + 9)).view(2, -1) % 50})
    short = corpus({"input_ids": torch.tensor([[7, 8, 9]])})
    found = strip(model, [short, long, long], "")
    assert found["text"].tolist() == [0] * 3 + [1] * TOKENS
    assert found["position"].tolist() == [*range(3), *range(TOKENS)]
    assert found["median"].shape[2] == 2


def test_positions_that_are_no_tokens_have_no_strip() -> None:
    model = ma.load(build("vit").eval(), inputs={"pixel_values": torch.randn(1, 3, 20, 20)})
    result = ma.scan(model, {"pixel_values": torch.randn(2, 3, 20, 20)}, **OFF)
    assert result.strip == {}


def test_a_scan_keeps_it(tmp_path) -> None:
    result = ma.scan(n_sequences=1, seq_len=16, **OFF)
    result.save(tmp_path / "run")
    again = ma.open_run(tmp_path / "run").strip
    assert set(again) == set(result.strip)
    for name, kept in result.strip.items():
        np.testing.assert_array_equal(again[name], kept)
    top = result.layers.set_index("layer").top1
    assert len(again["tokens"]) and top.notna().all()
    damaged = dict(again) | {"value": again["value"][:, :, :-1]}
    np.savez(tmp_path / "run" / "strip.npz", **damaged)
    with pytest.raises(UserError):
        ma.open_run(tmp_path / "run")
