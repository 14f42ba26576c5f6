"""Attention in windows: where each row stands is found and proved; statistics are those of the windows written out."""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import massact as ma
from massact.models import Model, with_attention
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.trace import AttentionEdit, KeyValueEdit, edited
from massact.trace.attention import AttentionCall, attending
from massact.trace.windows import apart, whole
from tests.families import build

S: dict[str, Any] = dict(embed_dim=24, depths=[3, 2], num_heads=[2, 4], window_size=4, image_size=32, patch_size=2)
NAMES = ["swin", "swinv2", "donut"]
PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


CLASSES = {"swin": ("SwinConfig", "SwinModel", "SwinForImageClassification"),
           "swinv2": ("Swinv2Config", "Swinv2Model", "Swinv2ForImageClassification"),
           "donut": ("DonutSwinConfig", "DonutSwinModel", "DonutSwinForImageClassification")}  # fmt: skip


def made(name: str, head: bool = False, **changes: Any) -> nn.Module:
    config, bare, classifier = (getattr(transformers, n) for n in CLASSES[name])
    torch.manual_seed(0)
    module: nn.Module = (classifier if head else bare)(config(**S | changes)).eval()
    return module


@cache
def read(name: str) -> Model:
    module = made(name)
    for key, p in module.named_parameters():
        if "bias_table" in key or "query" in key or "key" in key or "q_proj" in key:  # else all keys get the same
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))
    return with_attention(ma.load(module))


def naive_windows(side: int, window: int, shift: int) -> list[list[int]]:
    """Positions of each window of a grid that is first rolled up and left by `shift`, written out."""
    return [
        [(i * window + a + shift) % side * side + (j * window + b + shift) % side
         for a in range(window) for b in range(window)]
        for i in range(side // window) for j in range(side // window)
    ]  # fmt: skip


def keep(seen: dict[Site, Tensor], site: Site, _: nn.Module, __: Any, out: Any) -> None:
    seen[site] = out[1].detach()


def shift_of(layer: int) -> int:
    """Every second block shifts by half a window."""
    return 2 if layer % 2 == 0 else 0


def probabilities(model: Model) -> dict[Site, np.ndarray]:
    """Naive: those that the model itself returns for its windows, put where they belong: (N, H, T, T)."""
    module, seen = deepcopy(model.module), {}
    if model.anatomy.attentions[Site("0", 1, "attention")].via != "softmax":
        module.set_attn_implementation("eager")
    for site, place in model.anatomy.attentions.items():
        module.get_submodule(place.module).register_forward_hook(partial(keep, seen, site))
    with torch.no_grad():
        module(PIXELS, output_attentions=True)
    found = {}
    for site, p in seen.items():
        side = 16 if site.stack == "0" else 8
        T, windows = side * side, naive_windows(side, 4, shift_of(site.layer))
        full = np.zeros((3, p.shape[1], T, T))
        for n in range(3):
            for w, at in enumerate(windows):
                full[n][:, np.array(at)[:, None], np.array(at)[None]] = p[n * len(windows) + w].numpy()
        found[site] = full
    return found


@pytest.mark.parametrize("name", NAMES)
def test_windows_are_where_the_model_cuts_them(name: str) -> None:
    places = read(name).anatomy.attentions
    assert len(places) == 5 and not read(name).anatomy.no_attention
    for site, place in places.items():
        side = 16 if site.stack == "0" else 8
        assert [list(w) for w in place.windows] == naive_windows(side, 4, shift_of(site.layer))
        assert place.error < 1e-5 and place.row_sum == pytest.approx(1, abs=1e-5) and place.projection is not None


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_of_the_whole_image(name: str) -> None:
    """Masses by head: of the first token, over the queries of its own window, which alone can see it."""
    model, want = read(name), probabilities(read(name))
    corpus = ma.corpus({"pixel_values": PIXELS})
    scan = ma.scan(model, corpus, thresholds={"magnitude": 0.0, "ratio": 5.0}, null=False, bos_contrast=False)
    heads = ma.explain(model, corpus, scan).heads.set_index(["stack", "layer", "head"])
    for site, p in want.items():
        own = next(w for w in naive_windows(16 if site.stack == "0" else 8, 4, shift_of(site.layer)) if 0 in w)
        queries = [t for t in own if t]
        for head in range(p.shape[1]):
            got = heads.mass_first[site.stack, site.layer, head]
            assert got == pytest.approx(p[:, head][:, queries, 0].mean(), rel=2e-3), (site, head)


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_row_by_row(name: str) -> None:
    model, want = read(name), probabilities(read(name))
    got: dict[Site, Tensor] = {}

    def see(site: Site, place: Any) -> Any:
        def tap(call: AttentionCall) -> None:
            joined = whole(call, place.windows)
            got[site] = torch.stack([joined.of(b, place).dense()[1] for b in range(3)])
            if call.out_BHTF is not None and joined.out_BHTF is not None:
                assert torch.equal(apart(joined.out_BHTF, place.windows), call.out_BHTF), "there and back"

        return tap

    with torch.no_grad(), attending(model.module, {p: see(s, p) for s, p in model.anatomy.attentions.items()}):
        bare = model.module(PIXELS).last_hidden_state
    with torch.no_grad():
        assert torch.equal(model.module(PIXELS).last_hidden_state, bare)
    for site, p in want.items():
        np.testing.assert_allclose(got[site].numpy(), p, atol=2e-5)


def test_edits_in_windows() -> None:
    """An edit of what attention gives at a position of the image is one of the row of its window; keys are refused."""
    model, site = read("swin"), Site("0", 2, "attention")
    with torch.no_grad():
        block = model.module.encoder.layers[0].blocks[1]
        seen: list[Tensor] = []
        handle = block.attention.register_forward_hook(lambda _, __, out: seen.append(out[0].clone()))
        model.module(PIXELS)

        def apply(a: Any) -> Tensor:
            out: Tensor = a.out_HTF.clone()
            out[:, 37] += 1
            return out

        with edited(model, AttentionEdit("one", str(site), apply)) as fired:
            model.module(PIXELS)
        handle.remove()
    changed = (seen[0] != seen[1]).any(-1).flatten().nonzero().flatten().tolist()
    flat = [t for w in naive_windows(16, 4, 2) for t in w]
    assert changed == [n * 256 + flat.index(37) for n in range(3)] and fired[0].n_calls == 1
    with pytest.raises(UserError, match="window"), edited(model, KeyValueEdit("k", str(site), lambda k, v, b: (k, v))):
        pass


def test_windows_that_are_padded_are_not_seen() -> None:
    """A grid of 14 x 14 in windows of 4 has rows that are no tokens: unavailable, with the size of a window."""
    anatomy = with_attention(ma.load(made("swin", image_size=28, depths=[2], num_heads=[2]))).anatomy
    assert not anatomy.attentions and all("16 x 32" in why for why in anatomy.no_attention.values())


def test_windows_that_go_back_elsewhere_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of queries that are not those of the tokens they are added to: no statistic by position would be true."""
    from transformers.models.swin import modeling_swin

    back = modeling_swin.window_reverse
    monkeypatch.setattr(modeling_swin, "window_reverse", lambda windows, *size: back(windows.flip(1), *size))
    anatomy = with_attention(ma.load(made("swin"))).anatomy
    assert not anatomy.attentions and len(anatomy.no_attention) == 5


SPARSE = {"longformer": "5 entries", "bigbird": "4 x 2"}


class Planted(nn.Module):
    def __init__(self, inner: nn.Module, pos: int, dim: int) -> None:
        super().__init__()
        self.inner, self.pos, self.dim = inner, pos, dim

    def forward(self, *args: Any) -> Tensor:
        out: Tensor = self.inner(*args).clone()
        if out.shape[1] > self.pos:
            out[:, self.pos, self.dim] = 4000.0
        return out


def sparse(name: str) -> nn.Module:
    if name == "bigbird":
        torch.manual_seed(0)
        config = transformers.BigBirdConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56,
            max_position_embeddings=256, block_size=4, num_random_blocks=1, attention_type="block_sparse",
        )  # fmt: skip
        return transformers.BigBirdForMaskedLM(config).eval()
    return build(name)


@pytest.mark.parametrize(("name", "sublayer", "layer"), [
    ("longformer", "longformer.encoder.layer.1.output.LayerNorm", 2),
    ("bigbird", "bert.encoder.layer.1.output.LayerNorm", 2),
    ("longt5", "encoder.block.1.layer.1.DenseReluDense", 2),
])  # fmt: skip
def test_residual_questions_where_attention_is_sparse(name: str, sublayer: str, layer: int) -> None:
    """Planted at a token: found and zeroed there; attention is unavailable, with the entries of its softmax."""
    module = sparse(name)
    parent, _, child = sublayer.rpartition(".")
    setattr(module.get_submodule(parent), child, Planted(module.get_submodule(sublayer), 21, 5))
    model = with_attention(ma.load(module))
    unseen = {s: why for s, why in model.anatomy.no_attention.items() if s.stack in ("", "encoder")}
    assert len(unseen) == 3 and all(SPARSE.get(name, "15 entries") in why for why in unseen.values())
    ids = torch.randint(5, 99, (2, 48), generator=torch.Generator().manual_seed(0))
    scan = ma.scan(model, ids, null=False, bos_contrast=False)
    first = scan.findings[scan.findings.layer == layer]
    assert [(r.sequence, r.pos, r.dim) for r in first.itertuples()] == [(0, 21, 5), (1, 21, 5)]
    assert scan.findings.layer.min() == layer
    if name == "bigbird":
        assert module.bert.attention_type == "block_sparse", "as it was"
    if name != "longt5":
        done = ma.intervene(model, ids, scan, sets=("zero",), repetition=False, hold_out=False)
        assert (done.effects.n_elements == 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_residual_questions_where_attention_is_in_windows(name: str) -> None:
    module = made(name, head=True)
    block = module.base_model.encoder.layers[0].blocks[1]
    what = "layernorm_after" if name == "swinv2" else "mlp" if name == "swin" else "output"
    setattr(block, what, Planted(getattr(block, what), 37, 5))
    model = ma.load(module)
    corpus = ma.corpus({"pixel_values": PIXELS})
    scan = ma.scan(model, corpus, null=False, bos_contrast=False)
    mine = scan.findings[(scan.findings["stack"] == "0") & (scan.findings.layer == 2)]
    assert [(r.sequence, r.pos, r.dim, r.token) for r in mine.itertuples()] == [
        (s, 37, 5, "patch (2, 5)") for s in range(3)
    ]
    why = ma.explain(model, corpus, scan)
    assert set(why.heads[why.heads["stack"] == "0"].layer) == {1, 2, 3}
    top = why.writers.sort_values("share", ascending=False).iloc[0]
    assert (top.layer, top.submodule) == (2, "mlp_out")
    done = ma.intervene(model, corpus, scan, sets=("zero",), repetition=False, hold_out=False)
    assert (done.effects.n_elements == 3).all()
