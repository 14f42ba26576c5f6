"""Window perplexity with first tokens kept: against its definition, a planted reader of position 0, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import massact as ma
from massact.classics.job import classics
from massact.records.kinds.classics import Classics
from tests.facts import tells
from tests.families import build
from tests.interventions.test_window import masked, sees, sharpened

D, VOCAB, FIRSTS = 24, 12, 4  # tokens 0 .. 3 begin a text; the rest of text i is token i + 4


def tokens(n: int = 3, length: int = 64) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(5))


def ran(module: nn.Module, data: object, **given: object) -> Classics:
    model = ma.load(module, **given)  # type: ignore[arg-type]
    scan = ma.scan(model, data, null=False, bos_contrast=False)
    return classics(model, data, scan, which=("streaming",))


# ---- a planted reader of position 0
class Attention(nn.Module):
    """Every query reads the keys of first tokens; what it reads there is which one it was."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        with torch.no_grad():
            for linear in (self.q, self.k, self.v):
                linear.weight.zero_()
            self.q.weight[0, 0] = 40.0  # dim 0 is 1 in all tokens, dim 1 in first ones
            self.k.weight[0, 1] = 4.0
            for i in range(FIRSTS):
                self.v.weight[i, 2 + i] = 1.0
            self.o.weight.copy_(0.01 * torch.randn(D, D))
            self.o.weight[:, :FIRSTS] = 0
            for i in range(FIRSTS):
                self.o.weight[8 + i, i] = 1.0

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (f(x_BTD)[:, None] for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(D, D, bias=False)
        nn.init.normal_(self.mlp.weight, std=0.001)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(x_BTD)
        return x_BTD + self.mlp(x_BTD)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(VOCAB, D), nn.ModuleList([Block() for _ in range(3)])
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        with torch.no_grad():
            self.embed.weight.zero_()
            self.embed.weight[:, 0] = 1
            self.embed.weight[:, 14:] = 0.05 * torch.randn(VOCAB, D - 14)
            self.lm_head.weight.zero_()
            for i in range(FIRSTS):
                self.embed.weight[i, 1], self.embed.weight[i, 2 + i] = 1, 1
                self.lm_head.weight[FIRSTS + i, 8 + i] = 5.0

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x_BTD = self.embed(input_ids)
        for block in self.layers:
            x_BTD = block(x_BTD)
        return CausalLMOutput(logits=self.lm_head(x_BTD))


def test_a_reader_of_position_0_needs_exactly_the_first_token() -> None:
    first = torch.arange(6) % FIRSTS
    ids = torch.cat([first[:, None], (first + FIRSTS)[:, None].expand(-1, 63)], 1)
    done = ran(Reader(), ids, inputs={"input_ids": ids[:2, :16]})
    found = done.info.outcomes["streaming"][""]
    assert found["dense"] < 1.01 and found["by_k"]["0"] > 8  # without it: no better than chance over 12 tokens
    for k in ("1", "2", "4", "8"):
        assert found["by_k"][k] == pytest.approx(found["dense"], rel=1e-3)
    assert found["smallest_k_near_dense"] == found["smallest_k_near_best"] == 1
    assert found["newline"] is None and any("tokenizer" in note for note in done.info.notes)
    assert found["attention_first"]["layers_from_3"] > 0.99
    rows = done.classics
    per_head = rows[(rows.metric == "attention_first") & (rows["head"] >= 0)]
    assert list(per_head.layer) == [1, 2, 3] and (per_head.value > 0.99).all()


# ---- against the definition
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_perplexities_are_those_of_an_explicit_mask(name: str) -> None:
    """Of the targets whose query has lost a key, the same for every k; widths from the length of the text."""
    module, ids = sharpened(name), tokens()
    done = ran(module, ids)
    found, width = done.info.outcomes["streaming"][""], 16
    assert (found["width"], found["seq_len"], found["n_targets"]) == (width, 64, 3 * (64 - width - 1))

    def perplexity(seen: np.ndarray) -> float:
        logits = masked(module, ids, seen)
        nll = F.cross_entropy(logits[:, width:-1].flatten(0, 1), ids[:, width + 1 :].flatten())
        return float(nll.exp())

    assert found["dense"] == pytest.approx(perplexity(sees(64, 0, 64)), rel=1e-4)
    assert set(found["by_k"]) == {"0", "1", "2", "4", "8"}
    for k, value in found["by_k"].items():
        assert value == pytest.approx(perplexity(sees(width, int(k), 64)), rel=1e-4)
    assert len(set(found["by_k"].values())) == 5
    table = done.classics.set_index("subject").value
    assert table["dense"] == found["dense"] and table["k=4"] == found["by_k"]["4"]
    effects = done.classic_effects
    assert set(effects.metric) == {"perplexity", "nll", "kl", "top1_agreement"} and (effects.n_elements > 0).all()
    assert tells(done.info.notes, "positions", "text")


def test_padded_texts_are_cut_to_themselves() -> None:
    """A text padded on the left has its own first token, not the padding's; a short one has no targets."""
    module, ids = sharpened("gpt2"), tokens()
    mask = torch.ones_like(ids)
    mask[1, :8], mask[2, 10:] = 0, 0
    padded = ran(module, {"input_ids": ids, "attention_mask": mask}).info.outcomes["streaming"][""]
    assert padded["width"] == 14  # a quarter of the median length, 56
    assert padded["n_targets"] == (64 - 15) + (56 - 15)

    def nll(row: Tensor, seen: np.ndarray) -> float:
        logits = masked(module, row[None], seen)[0]
        return float(F.cross_entropy(logits[14:-1], row[15:], reduction="sum"))

    wanted = [nll(ids[0], sees(14, 1, 64)), nll(ids[1, 8:], sees(14, 1, 56))]
    assert padded["by_k"]["1"] == pytest.approx(float(np.exp(sum(wanted) / padded["n_targets"])), rel=1e-4)
    assert "8" not in padded["by_k"]


def test_newlines_in_place_of_the_first_tokens() -> None:
    """The embedded model: the loss of the text with its first four tokens replaced, under the same window."""
    model = ma.load(None)
    scan = ma.scan(model, None, null=False, bos_contrast=False, n_sequences=2)
    done = classics(model, None, scan, which=("streaming",))
    found = done.info.outcomes["streaming"][""]
    width, newline = found["width"], model.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    ids = ma.corpus(None).encode(model.tokenizer, seq_len=128, n_sequences=2).inputs["input_ids"].clone()
    targets = ids[:, width + 1 :].flatten()
    ids[:, :4] = newline
    logits = masked(model.module, ids, sees(width, 4, 128))[:, width:-1].flatten(0, 1)
    assert found["newline"] == pytest.approx(float(F.cross_entropy(logits, targets).exp()), rel=1e-4)
    assert found["by_k"]["0"] > 2 * found["by_k"]["1"]  # a model trained to have sinks


# ---- refusals
@pytest.mark.parametrize(("name", "data", "says"), [
    ("bert", {"input_ids": tokens(2, 32)}, "causal decoder"), ("bart", {"input_ids": tokens(2, 32)}, "encoder"),
    ("vit", {"pixel_values": torch.rand(2, 3, 20, 20)}, "no tokens"),
    ("llama", {"input_ids": tokens(2, 12)}, "too short"),
])  # fmt: skip
def test_refusals_say_why(name: str, data: dict[str, Tensor], says: str) -> None:
    done = ran(build(name), data)
    assert says in done.info.outcomes["streaming"]["unavailable"] and not len(done.classics)


def test_a_model_whose_own_window_is_narrower_has_nothing_to_lose() -> None:
    import transformers

    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, sliding_window=4,
    )  # fmt: skip
    torch.manual_seed(0)
    done = ran(transformers.MistralForCausalLM(config).eval(), tokens())
    assert "changed nothing" in done.info.outcomes["streaming"]["unavailable"]
