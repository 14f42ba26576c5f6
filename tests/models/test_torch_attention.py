"""torch's own attention layer, in the mode in which it has a fused path: the model's numbers, seen and unseen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import massact as ma
from tests.anatomy.test_own_modules import D

T, HEADS = 20, 4


class _Block(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.norm, self.norm_2, self.fc = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, D)
        self.self_attn = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.self_attn(z, z, z, need_weights=self.weights, attn_mask=mask)[0]
        return x + self.fc(self.norm_2(x))


class _Own(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(weights) for _ in range(3))

    def forward(self, src: Tensor) -> Tensor:
        for layer in self.layers:
            src = layer(src)
        return src


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, HEADS, 48, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first)


MODELS = {
    "pre-LN encoder": (lambda: _encoder(True), "norm1"),
    "post-LN encoder": (lambda: _encoder(False), ""),
    "causal, asks for the probabilities": (lambda: _Own(True), "norm"),
    "causal, asks for none": (lambda: _Own(False), "norm"),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODELS)
def test_attention_of_torchs_own_layer_is_what_it_says_itself(name: str) -> None:
    torch.manual_seed(0)
    build, norm = MODELS[name]
    net = build().eval()
    x = torch.randn(3, T, D)
    x[:, 0, 5] = 4000 if norm else 400  # unnormed it makes scores of its square, which round an entropy
    model, corpus = ma.load(net, inputs={"src": torch.randn(2, 13, D)}), ma.corpus({"src": x})
    scan = ma.scan(model, corpus, null=False, bos_contrast=False, thresholds={"ratio": 100})
    heads = ma.explain(model, corpus, scan).heads
    assert len(heads) == 3 * HEADS and torch.backends.mha.get_fastpath_enabled()

    mask = nn.Transformer.generate_square_subsequent_mask(T) if "causal" in name else None
    h = x
    with torch.no_grad():
        for layer, block in enumerate(net.layers, 1):
            z = getattr(block, norm)(h) if norm else h
            _, p_BHTS = block.self_attn(z, z, z, attn_mask=mask, average_attn_weights=False)
            told = heads[heads.layer == layer].sort_values("head")
            assert told.alpha_first.tolist() == pytest.approx(p_BHTS[..., 0].mean((0, 2)).tolist(), abs=1e-5)
            entropy = torch.special.entr(p_BHTS).sum(-1).mean((0, 2))
            assert told.entropy_nats.tolist() == pytest.approx(entropy.tolist(), abs=1e-4)
            h = block(h)
