"""Rows that are no sequences and positions that are no tokens are refused when a model is loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

import massact as ma
from massact.records.anatomy import ONE_ROW, PIECES, TURNED
from massact.records.errors import ProofError
from massact.stats import Keep
from massact.trace import Edit, Probe, measure
from tests.facts import each, tells
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
        elif self.layout == "two pieces":
            x = x.reshape(-1, x.shape[1] // 2, D)
        elif self.layout == "one row":
            x = x.reshape(1, -1, D)
        elif self.layout == "one row, sequences in turn":
            x = x.transpose(0, 1).reshape(1, -1, D)
        elif self.layout == "three prompts":
            x = torch.cat([torch.zeros_like(x[:, :3]), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [("tokens first", ["(13, 2, 24)", "(13, 3, 24)"]), ("two streams", ["(4, 13, 24)", "(6, 13, 24)"]),
     ("one row, sequences in turn", ["(1, 26, 24)", "(1, 39, 24)"])],
)  # fmt: skip
def test_rows_that_are_no_sequences(layout: str, shapes: list[str]) -> None:
    """Also where the batch has as many sequences as each has tokens, so that no pass of a scan would tell."""
    with pytest.raises(ProofError) as error:
        ma.load(Net(layout), inputs={"signal": torch.randn(2, 13, 5)})
    assert all(shape in error.value.why for shape in shapes)
    assert "batch_first=True" in error.value.do


class Images(Net):
    """Several images a sequence, each a row: two of them and no other number, or as many as there are."""

    def __init__(self, pairs: bool) -> None:
        super().__init__("")
        self.pairs = pairs

    def forward(self, signal: Tensor) -> Tensor:
        if self.pairs and signal.shape[1] != 2:
            raise ValueError("pairs of images")
        return super().forward(signal.flatten(0, 1))


def test_images_are_pieces_of_a_sequence_where_there_can_be_no_other_number_of_them() -> None:
    pairs = ma.load(Images(pairs=True).eval(), inputs={"signal": torch.randn(3, 2, 7, 5)})
    place = pairs.anatomy.stacks[0].blocks[0].places["resid_pre"]
    assert (place.layout, place.pieces) == (PIECES, 2)
    with pytest.raises(ProofError):
        ma.load(Images(pairs=False).eval(), inputs={"signal": torch.randn(3, 2, 7, 5)})


def entry_zeroed(h: Tensor, _: object) -> Tensor:
    """Dim 7 of position 3 of every sequence; of a site where all sequences are in one row as well."""
    new = h.clone().reshape(5, 14, D)
    new[:, 3, 7] = 0
    return new.reshape(h.shape)


@pytest.mark.parametrize("layout", ["two pieces", "one row"])
def test_rows_that_are_parts_of_sequences_or_hold_them_all(layout: str) -> None:
    """Positions, and where an edit acts, are those of the sequence, wherever its rows lie."""
    torch.manual_seed(0)
    net, x = Net(layout).eval(), torch.randn(5, 14, 5)
    model = ma.load(net, inputs={"signal": torch.randn(2, 14, 5)})
    assert {b.places["resid_post"].layout for b in model.anatomy.stacks[0].blocks} == {
        {"two pieces": PIECES, "one row": ONE_ROW}[layout]
    }
    corpus = ma.corpus({"signal": x})
    with torch.no_grad():
        h = net(x).reshape(5, 14, D)
        kept = measure(model, corpus, [Probe("h", "3.resid_post", Keep)], batch_size=2)
        assert np.array_equal(np.stack(list(kept.result("h", kept.sites("h")[0]).values)).reshape(h.shape), h)
        with ma.edited(model, Edit("zero", "3.resid_post", entry_zeroed)):
            edited = net(x).reshape(5, 14, D)
    h[:, 3, 7] = 0
    assert torch.equal(edited, h)


class Attending(nn.Module):
    """Attention of (tokens, batch, width), as torch builds it where nothing is said."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.turns, self.attention = turns, nn.MultiheadAttention(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turns else x
        y = self.attention(x, x, x, need_weights=False)[0]
        return y.transpose(0, 1) if self.turns else y


class Layer(nn.Module):
    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.attn, self.mlp, self.n, self.k = Attending(turns), nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n(x))
        return x + self.mlp(self.k(x))


class Encoder(nn.Module):
    """Three such layers: on (tokens, batch, width), or each turning it inside its attention."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.turns, self.inp, self.layers = turns, nn.Linear(5, D), nn.ModuleList(Layer(turns) for _ in range(3))

    def forward(self, signal: Tensor) -> Tensor:
        x = self.inp(signal) if self.turns else self.inp(signal).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x if self.turns else x.transpose(0, 1)


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, 48, 0.0, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def test_inputs_with_tokens_first_are_refused() -> None:
    with pytest.raises(ProofError, match=r"\(2, 13, 24\) for 13 sequences") as error:
        ma.load(torch_encoder(), inputs={"src": torch.randn(13, 2, D)})
    assert tells([error.value.do], "batch_first=True", "transpose")


@pytest.mark.parametrize("turns", [True, False])
def test_blocks_with_tokens_first_are_turned(turns: bool) -> None:
    """Turned inside its attention or round all of its blocks: all is read of (batch, tokens, width)."""
    old, new, x = Encoder(turns=False).eval(), Encoder(turns=turns).eval(), torch.randn(3, 20, 5)
    new.load_state_dict(old.state_dict())
    model = ma.load(new, inputs={"signal": torch.randn(2, 13, 5)})
    assert {b.places["resid_post"].layout == TURNED for b in model.anatomy.stacks[0].blocks} == {not turns}
    scan = ma.scan(model, ma.corpus({"signal": x}), null=False, bos_contrast=False)
    with torch.no_grad():
        h = old(x)
    assert scan.layers.set_index("layer")["max"][3] == pytest.approx(float(h.abs().max()), rel=1e-5)


class Beside(nn.Module):
    """What it takes, and a part of what the other sequences of its batch have there."""

    def __init__(self, way: str, part: float) -> None:
        super().__init__()
        self.way, self.part, self.norm = way, part, nn.BatchNorm1d(D, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "mean":
            return self.part * x.mean(0, keepdim=True).expand_as(x)
        return self.part * self.norm(x.transpose(1, 2)).transpose(1, 2)


class Mixing(nn.Module):
    """Blocks with a module between the second and the third that reads the whole batch."""

    def __init__(self, way: str, part: float, added: bool) -> None:
        super().__init__()
        self.inp, self.blocks = nn.Linear(5, D), nn.ModuleList(Block() for _ in range(4))
        self.beside, self.added = Beside(way, part), added

    def forward(self, signal: Tensor) -> Tensor:
        x = self.inp(signal)
        for i, block in enumerate(self.blocks):
            if i == 2:
                x = x + self.beside(x) if self.added else x * (1 + self.beside(x))
            x = block(x)
        return x


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("way", ["mean", "batch norm"])
@pytest.mark.parametrize(("part", "dtype"), [(1.0, torch.float32), (0.01, torch.float32), (0.5, torch.bfloat16)])
def test_sequences_that_change_one_another(way: str, added: bool, part: float, dtype: torch.dtype) -> None:
    """By how much, beside what the blocks give for a sequence alone among copies of itself."""
    torch.manual_seed(0)
    net, x = Mixing(way, part, added).to(dtype).eval(), torch.randn(2, 13, 5).to(dtype)
    with pytest.raises(ProofError, match=each("sequences", "batch")) as error:
        ma.load(net, inputs={"signal": x})
    with torch.no_grad():
        was, now = net(x)[-1].double().numpy(), net(x[-1:].repeat(2, 1, 1))[-1].double().numpy()
    off_T = np.median(np.abs(now - was), 1) / np.median(np.abs(was), 1)
    told = float(error.value.why.split(" by ")[1].split()[0])
    assert told == pytest.approx(off_T.max() if dtype == torch.float32 else np.median(off_T), rel=0.1)


def test_a_batch_norm_that_knows_its_statistics_mixes_nothing() -> None:
    net = Mixing("batch norm", 0.5, True)
    net.beside.norm = nn.BatchNorm1d(D).eval()
    assert ma.load(net.eval(), inputs={"signal": torch.randn(2, 13, 5)}).anatomy.stacks


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
