"""Blocks that carry several streams: each one is a stack, and what they read of them together is one more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.interventions import zero
from massact.models import load, with_attention
from massact.records.errors import ProofError, UserError
from massact.stats import Keep
from massact.trace import Probe, measure
from tests.anatomy.test_scaled_streams import planted
from tests.facts import each
from tests.families import G, build_as

LATENT = dict(q_lora_rank=16, qk_rope_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
              index_head_dim=16, index_n_heads=2, index_topk=4, pad_token_id=0, bos_token_id=1,
              eos_token_id=2)  # fmt: skip

# name -> (configuration class, its arguments, model class, streams, what is done to a stream before a sum)
SEVERAL: dict[str, tuple[str, dict[str, Any], str, int, set[str]]] = {
    "deepseek_v4": ("DeepseekV4Config", G | LATENT | dict(
        num_key_value_heads=1, head_dim=16, o_lora_rank=8, o_groups=2, num_local_experts=4, sliding_window=8),
        "DeepseekV4ForCausalLM", 4, {"mix"}),
    "hy_v4": ("HYV4Config", G | LATENT | dict(
        kv_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16, num_experts=4, num_key_value_heads=4),
        "HYV4ForCausalLM", 4, set()),
    "gemma3n": ("Gemma3nTextConfig", G | dict(
        head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=99, sliding_window=8,
        num_kv_shared_layers=0, laurel_rank=4, activation_sparsity_pattern=[0.0] * 3,
        layer_types=["sliding_attention", "full_attention", "full_attention"]), "Gemma3nForCausalLM", 4, {"mix"}),
}  # fmt: skip


def streams(name: str) -> nn.Module:
    config, args, model, _, _ = SEVERAL[name]
    return build_as(config, args, model, moved=True)


def with_planted(module: nn.Module) -> nn.Module:
    """Something large in what the second block's attention gives for the first token."""

    name = "post_attention_layernorm" if type(module).__name__.startswith("Gemma") else "self_attn"
    getattr(module.model.layers[1], name).register_forward_hook(planted)
    return module


@pytest.mark.parametrize("name", SEVERAL)
def test_streams_are_stacks(name: str) -> None:
    *_, n, how = SEVERAL[name]
    model = load(streams(name))
    names = [stack.name for stack in model.anatomy.stacks]
    assert names == [*(f"stream_{k}" for k in range(n)), "collapsed"]
    read = model.anatomy.stack("collapsed")
    assert read.streams == tuple(names[:-1]) and not any(block.sums for block in read.blocks)
    for stack in model.anatomy.stacks[:-1]:
        assert {change.how for block in stack.blocks for change in block.changes} == how
        assert all(block.sums[-1].end == "resid_post" for block in stack.blocks)
    assert {"attn_in", "attn_out", "mlp_out"} <= {p.rstrip("_23") for p in read.blocks[0].places}


@pytest.mark.parametrize("name", SEVERAL)
def test_a_planted_activation_is_found_in_every_stream_that_it_is_written_to(name: str) -> None:
    model = load(with_planted(streams(name)))
    corpus = ma.corpus(torch.randint(3, 99, (4, 24), generator=torch.Generator().manual_seed(0)))
    scan = ma.scan(model, corpus, null=False)
    massive = scan.findings[scan.findings["layer"] == 2]
    assert set(massive["dim"]) == {5} and set(massive["pos"]) == {0}
    assert {"stream_0", "stream_1", "stream_2", "stream_3"} <= set(massive["stack"])


def test_writers_and_edits_of_several_streams() -> None:
    """Who writes is told for each stream; an edit is of all of them, also where it is made in Python."""
    module = with_planted(streams("deepseek_v4"))
    model = load(module)
    corpus = ma.corpus(torch.randint(3, 99, (4, 24), generator=torch.Generator().manual_seed(0)))
    scan = ma.scan(model, corpus, null=False)
    why = ma.explain(model, corpus, scan)
    ups = why.writers[(why.writers["role"] == "up") & ~why.writers["submodule"].isin(["mix", "scale"])]
    assert set(ups["layer"]) == {2} and all(ups["submodule"].str.startswith("attn_out"))
    assert set(ups["stack"]) == {f"stream_{k}" for k in range(4)} and set(why.heads["stack"]) == {"collapsed"}
    table = ma.intervene(model, corpus, scan, sets=["zero"]).effects
    assert set(table["edit"]) == {"zero"} and table["n_elements"].min() >= 2 * 4  # 2 of the sequences, 4 streams
    ids = corpus.inputs["input_ids"][:2]
    sites = [f"stream_{k}/2.resid_post" for k in range(4)]
    seen = measure(model, ma.corpus(ids), [Probe(s, s, Keep) for s in sites], [zero(scan)], batch_size=2)
    for site in sites:
        kept = np.stack(seen.result(site, seen.sites(site)[0]).values)
        assert np.abs(kept).max() < 1e3 and (kept[:, 0, 5] == 0).all()


@pytest.mark.parametrize("name", SEVERAL)
def test_attention_is_that_of_what_is_read_of_the_streams(name: str) -> None:
    """A stream has none; where a call is seen and another one of its block is not, no site is said to be both."""
    anatomy = with_attention(load(streams(name))).anatomy
    assert {site.stack for site in anatomy.attentions} == {"collapsed"}
    assert sorted(site.layer for site in anatomy.attentions if site.point == "attention") == [1, 2, 3]
    assert not set(anatomy.attentions) & set(anatomy.no_attention)
    assert not anatomy.unseen_attention([f"stream_{k}" for k in range(4)])
    assert len(anatomy.unseen_attention(["collapsed"])) == (name == "deepseek_v4")


def test_a_stack_without_findings_is_no_stack_to_edit() -> None:
    model = load(with_planted(streams("hy_v4")))
    corpus = ma.corpus(torch.randint(3, 99, (4, 24), generator=torch.Generator().manual_seed(0)))
    scan = ma.scan(model, corpus, null=False, bos_contrast=False)
    with pytest.raises(UserError, match=each("stream_9", "stream_2", "collapsed")):
        ma.intervene(model, corpus, scan, sets=["zero"], stack="stream_9")


def test_inputs_on_which_a_model_does_not_run_are_told_in_its_words() -> None:
    """Experts of DeepSeek V4 are chosen by token id: there is none beside embeddings."""
    module = streams("deepseek_v4")
    with pytest.raises(UserError, match=each("DeepseekV4Model", "inputs_embeds (2, 11, 32)", "AttributeError")):
        ma.scan(load(module), ma.corpus({"inputs_embeds": torch.randn(2, 11, 32)}), null=False)
    longer = {"input_ids": torch.full((2, 11), 98), "inputs_embeds": torch.randn(2, 11, 32)}
    with pytest.raises(UserError, match=each("exactly one of")):
        ma.scan(load(streams("hy_v4")), ma.corpus(longer), null=False)


def test_streams_against_a_sum_by_hand() -> None:
    """Hyper-connections written out with what the pass computes of them, on another length."""
    module = streams("deepseek_v4")
    model = load(module)
    ids = torch.randint(3, 99, (2, 19), generator=torch.Generator().manual_seed(1))
    layer, kept = module.model.layers[1], {}

    def keep(name: str) -> Any:
        return lambda m, args, out: kept.__setitem__(name, (args, out))

    handles = [getattr(layer, n).register_forward_hook(keep(n)) for n in ("attn_hc", "self_attn", "ffn_hc", "mlp")]
    with torch.no_grad():
        module(ids)
    for handle in handles:
        handle.remove()
    (h,), (post, comb, _) = kept["attn_hc"]
    attn = kept["self_attn"][1][0]
    mixed = torch.einsum("btjk,btjd->btkd", comb, h)
    added = post[..., None] * attn[:, :, None]
    sites = [f"stream_{k}/2.{p}" for k in range(4) for p in ("resid_pre", "resid_scaled", "attn_out", "resid_mid")]
    measured = measure(model, ma.corpus(ids), [Probe(s, s, Keep) for s in sites], batch_size=2)
    for k in range(4):
        wanted = (h[:, :, k], mixed[:, :, k], added[:, :, k], (mixed + added)[:, :, k])
        for site, b in zip(sites[4 * k : 4 * k + 4], wanted, strict=True):
            a = torch.from_numpy(np.stack(measured.result(site, measured.sites(site)[0]).values))
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), site


def test_blocks_that_are_given_are_read_as_those_that_are_found() -> None:
    module = streams("hy_v4")
    assert load(module, blocks="model.layers").anatomy == load(module).anatomy


class Static(nn.Module):
    """Hyper-connections of parameters alone: streams mixed by a matrix, a sublayer with its norm inside."""

    class Block(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.sub = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
            self.mix, self.add, self.read = (nn.Parameter(torch.rand(*s)) for s in ((n, n), (n,), (n,)))

        def forward(self, h: Tensor) -> Tensor:
            out = self.sub(torch.einsum("n,btnd->btd", self.read, h))
            return torch.einsum("mn,btnd->btmd", self.mix, h) + self.add[:, None] * out[:, :, None]

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.enter, self.blocks = n, nn.Linear(5, 16), nn.ModuleList(self.Block(n) for _ in range(2))

    def forward(self, signal: Tensor) -> Tensor:
        h = self.enter(signal)[:, :, None].repeat(1, 1, self.n, 1)
        for block in self.blocks:
            h = block(h)
        return h.sum(2)


@pytest.mark.parametrize("n", [2, 3, 16])
def test_streams_mixed_by_parameters(n: int) -> None:
    """As many streams as rows of the example, or as dims; what is read of them is the output of the model itself."""
    torch.manual_seed(0)
    module = Static(n)
    model = load(module, inputs={"signal": torch.randn(2, 13, 5)}, blocks="blocks")
    assert [s.name for s in model.anatomy.stacks] == [*(f"stream_{k}" for k in range(n)), "collapsed"]
    signal, block, k = torch.randn(3, 7, 5), module.blocks[1], n - 1
    with torch.no_grad():
        h = module.blocks[0](module.enter(signal)[:, :, None].repeat(1, 1, n, 1))
        read = (block.read[:, None] * h).sum(2)
        wanted = {
            f"stream_{k}/2.resid_scaled": (block.mix[k][:, None] * h).sum(2),
            f"stream_{k}/2.mlp_out": block.add[k] * block.sub(read),
            f"stream_{k}/2.resid_post": block(h)[:, :, k],
            "collapsed/1.resid_post": read,
            "collapsed/2.resid_post": module(signal),
        }
    measured = measure(model, ma.corpus({"signal": signal}), [Probe(s, s, Keep) for s in wanted], batch_size=3)
    for site, b in wanted.items():
        a = torch.from_numpy(np.stack(measured.result(site, measured.sites(site)[0]).values))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), site
    scan = ma.scan(model, ma.corpus({"signal": signal}), null=False, thresholds={"magnitude": 0.1, "ratio": 1.5})
    assert max(ma.explain(model, ma.corpus({"signal": signal}), scan).info.closure.values()) < 1e-5


class Images(nn.Module):
    """Blocks of four axes that are no streams: rows and columns of an image."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(5, 16), nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, signal: Tensor) -> Tensor:
        x = self.enter(signal)
        for block in self.blocks:
            x = block(x)
        return x


def test_rows_and_columns_are_no_streams() -> None:
    """They are positions, row by row, on images of another size as well."""
    model = load(Images(), inputs={"signal": torch.randn(2, 7, 9, 5)}, blocks="blocks")
    signal = torch.randn(3, 4, 6, 5)
    seen = measure(model, ma.corpus({"signal": signal}), [Probe("h", "0.resid_post", Keep)], batch_size=3)
    kept = np.stack(seen.result("h", seen.sites("h")[0]).values)
    assert np.array_equal(kept, model.module.enter(signal).flatten(1, 2).detach().numpy())


class Mixed(nn.Module):
    """A block that gives another number of streams than it takes."""

    def __init__(self, taken: int, given: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
        self.read, self.mix = nn.Parameter(torch.randn(taken)), nn.Parameter(torch.randn(taken, given))
        self.post = nn.Parameter(torch.randn(given))

    def forward(self, x_BTND: Tensor) -> Tensor:
        write_BTD = self.linear(self.norm((x_BTND * self.read[:, None]).sum(2)))
        return torch.einsum("btnd,nm->btmd", x_BTND, self.mix) + write_BTD[:, :, None] * self.post[:, None]


class Narrowing(nn.Module):
    def __init__(self, *numbers: tuple[int, int]) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, 16), nn.ModuleList(Mixed(*pair) for pair in numbers)
        self.n, self.head = numbers[0][0], nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BTND = self.embed(input_ids)[:, :, None].repeat(1, 1, self.n, 1)
        for block in self.blocks:
            x_BTND = block(x_BTND)
        return self.head(x_BTND.mean(2))


def test_another_number_of_streams_is_refused_with_both_shapes() -> None:
    torch.manual_seed(0)
    example = {"input_ids": torch.arange(12).reshape(1, 12)}
    assert load(Narrowing((4, 4), (4, 4)), blocks="blocks", inputs=example).anatomy.stacks[-1].name == "collapsed"
    with pytest.raises(ProofError) as refused:
        load(Narrowing((4, 4), (4, 2), (2, 2)), blocks="blocks", inputs=example)
    error = refused.value
    assert "12, 4, 16)" in error.what and "12, 2, 16)" in error.what and "blocks.2" in error.what
    assert "Identity" not in error.do and "two lists" in error.do
