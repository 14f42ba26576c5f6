"""Rows that are no sequences and positions that are no tokens are refused when a model is loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

import massact as ma
from massact.records.errors import ProofError
from tests.families import build

D = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """A list of blocks on a stream of another layout than (batch, tokens, width)."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout, self.inp, self.blocks = layout, nn.Linear(5, D), nn.ModuleList(Block() for _ in range(3))

    def forward(self, signal: Tensor) -> Tensor:
        x = self.inp(signal)
        if self.layout == "tokens first":
            x = x.transpose(0, 1).contiguous()
        elif self.layout == "two streams":
            x = torch.cat([x, x])
        elif self.layout == "one row":
            x = x.reshape(1, -1, D)
        elif self.layout == "three prompts":
            x = torch.cat([torch.zeros_like(x[:, :3]), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [("tokens first", ["(13, 2, 24)", "(13, 3, 24)"]), ("two streams", ["(4, 13, 24)", "(6, 13, 24)"]),
     ("one row", ["(1, 26, 24)", "(1, 39, 24)"])],
)  # fmt: skip
def test_rows_that_are_no_sequences(layout: str, shapes: list[str]) -> None:
    """Also where the batch has as many sequences as each has tokens, so that no pass of a scan would tell."""
    with pytest.raises(ProofError) as error:
        ma.load(Net(layout), inputs={"signal": torch.randn(2, 13, 5)})
    assert all(shape in error.value.why for shape in shapes)


@pytest.mark.parametrize("layout", ["as usual", "three prompts"])
def test_rows_that_are_sequences(layout: str) -> None:
    net = Net(layout)
    model = ma.load(net, inputs={"signal": torch.randn(2, 13, 5)})
    x = torch.randn(3, 20, 5)
    scan = ma.scan(model, ma.corpus({"signal": x}), null=False, bos_contrast=False)
    with torch.no_grad():
        h = net(x)
    got = scan.layers.set_index("layer")["max"][3]
    assert got == pytest.approx(float(h.abs().max()), rel=1e-6)


def prophetnet() -> nn.Module:
    torch.manual_seed(0)
    small = {f"num_{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2),
             ("attention_heads", 4))}  # fmt: skip
    config = ProphetNetConfig(vocab_size=99, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **small)
    return ProphetNetForConditionalGeneration(config).eval()


def test_several_positions_for_each_token_are_left_out_and_said() -> None:
    """ProphetNet's decoder runs three streams in one row: position 59 of 20 tokens. Its encoder is as any other."""
    net, ids = prophetnet(), torch.randint(5, 99, (3, 20))
    model = ma.load(net)
    assert [s.name for s in model.anatomy.stacks] == ["encoder"]
    scan = ma.scan(model, ma.corpus(ids), null=False, bos_contrast=False)
    (note,) = [n for n in scan.info.notes if "decoder.layers was left out" in n]
    assert "33 positions for 11 tokens" in note
    with torch.no_grad():
        h = net.prophetnet.encoder(input_ids=ids).last_hidden_state
    last = scan.layers[scan.layers["layer"] == 2]["max"].iloc[0]
    np.testing.assert_allclose(last, float(h.abs().max()), rtol=1e-5)


def test_padding_of_the_models_own_is_said() -> None:
    """Longformer pads 21 tokens to a multiple of its window of 4."""
    scan = ma.scan(ma.load(build("longformer")), torch.randint(5, 99, (2, 21)), null=False, bos_contrast=False)
    assert sum("24 positions for 21 tokens" in note for note in scan.info.notes) == 1
