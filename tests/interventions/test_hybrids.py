"""Interventions on models whose layers mix tokens in several ways: they fire, do what they say, or are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.prefixes import fold
from massact.quantisation import quantise
from massact.records.errors import UserError
from massact.records.sites import mixes
from massact.trace import Edit, edited
from tests.facts import each, tells
from tests.hybrids import HYBRIDS, hybrid

TOKEN, DIM, T = 2, 7, 24


def planted(name: str) -> nn.Module:
    """Weights three times as large as they are drawn, and one embedding that is massive at one dim."""
    module = hybrid(name)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                p.mul_(3)
        module.get_input_embeddings().weight[TOKEN, DIM] = 2e5
    return module


def text() -> Tensor:
    ids = torch.randint(3, 96, (4, T), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = TOKEN
    return ids


def loss(module: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        logits = module(input_ids=ids, use_cache=False).logits.float()
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    )


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_edit_of_each_mixer_is_what_a_hook_does(name: str) -> None:
    """What the last mixer adds is set to zero at the first token: the same logits as with a hook, bit by bit."""
    module, ids = planted(name), text()
    model = ma.load(module)
    site, place = [(s, p) for s, p in model.anatomy.sites().items() if mixes(s.point)][-1]

    def without(h: Tensor, *_: object) -> Tensor:
        return torch.cat([torch.zeros_like(h[:, :1]), h[:, 1:]], 1)

    def hook(m: nn.Module, args: tuple, out: object) -> object:
        return without(out) if isinstance(out, Tensor) else (without(out[0]), *out[1:])  # type: ignore[index]

    with torch.no_grad():
        plain = module(input_ids=ids, use_cache=False).logits
        with edited(model, Edit("without", str(site), without)):
            mine = module(input_ids=ids, use_cache=False).logits
        handle = module.get_submodule(place.module).register_forward_hook(hook)
        want = module(input_ids=ids, use_cache=False).logits
        handle.remove()
        assert torch.equal(module(input_ids=ids, use_cache=False).logits, plain)
    assert not torch.equal(mine, plain)
    torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "qwen3_next", "lfm2"])
def test_zero_is_the_loss_without_the_planted_value(name: str) -> None:
    module, ids = planted(name), text()
    model, corpus = ma.load(module), ma.corpus(ids)
    scan = ma.scan(model, corpus, null=False)
    done = ma.intervene(model, corpus, scan, sets=("zero",), layer=1, hold_out=False)
    block = module.get_submodule(model.anatomy.stacks[0].blocks[0].module)

    def zero(m: nn.Module, args: tuple, out: object) -> object:
        h = (out if isinstance(out, Tensor) else out[0]).clone()  # type: ignore[index]
        h[:, 0, DIM] = 0
        return h if isinstance(out, Tensor) else (h, *out[1:])  # type: ignore[index]

    before = loss(module, ids)
    handle = block.register_forward_hook(zero)
    after = loss(module, ids)
    handle.remove()
    row = done.effects.set_index("metric").loc["nll"]
    assert row["baseline"] == pytest.approx(before, rel=1e-4)
    assert row["edited"] == pytest.approx(after, rel=1e-4)


def test_an_edit_of_attention_says_what_it_leaves() -> None:
    model, corpus = ma.load(planted("qwen3_next")), ma.corpus(text())
    done = ma.intervene(model, corpus, ma.scan(model, corpus, null=False), sets=("cut-first",))
    assert tells(done.info.notes, "positions [0]", "linear_attn", "layers 1, 3")


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "qwen3_next", "lfm2", "zamba2"])
def test_what_a_state_holds_cannot_be_folded(name: str) -> None:
    """In Falcon-H1 every layer has attention that is seen, and a scan beside it, which keeps what a prefix leaves."""
    model, corpus = ma.load(planted(name)), ma.corpus(text())
    kind = next(k for k in ("ssm", "linear_attn", "conv") if any(k in b.mixer for b in model.anatomy.stacks[0].blocks))
    with pytest.raises(UserError, match=each(kind, "state")):
        fold(model, corpus, ma.scan(model, corpus, null=False))


def test_what_other_mixers_read_is_quantised_under_its_own_name() -> None:
    model, corpus = ma.load(planted("qwen3_next")), ma.corpus(text())
    done = quantise(model, corpus, ma.scan(model, corpus, null=False), schemes=("int8-tensor",))
    where = done.quantised_sites.groupby("site")["layer"].unique().map(sorted).to_dict()
    assert where["linear_attn_in"] == [1, 3] and where["attn_in"] == [2]
    assert tells(done.info.notes, "o_in", "linear attention")
