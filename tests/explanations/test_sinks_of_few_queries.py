"""A key that few queries see: whether it is a sink is unknown, which is not 0."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import massact as ma
from massact.stats.heads import LEAST_QUERIES

T, EPS = 24, 0.3


def test_a_sink_is_said_of_keys_that_enough_queries_see() -> None:
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4, attn_implementation="eager")).eval()  # fmt: skip
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.k_proj.weight.mul_(30)
    ids = torch.randint(5, 120, (4, T))
    ids[:, -2] = 7
    with torch.no_grad():
        net.model.embed_tokens.weight[7] *= 100
        attentions = net(input_ids=ids, output_attentions=True).attentions
    model, corpus = ma.load(net), ma.corpus(ids)
    scan = ma.scan(model, corpus, null=False, bos_contrast=False, thresholds={"magnitude": 1, "ratio": 20})
    why = ma.explain(model, corpus, scan)
    seen_T = torch.arange(T, 0, -1)
    known = (seen_T >= LEAST_QUERIES).numpy()
    hidden = 0
    for layer, p_BHTS in enumerate(attentions, 1):
        alpha_BHS = p_BHTS.sum(2) / seen_T
        rate = (alpha_BHS > EPS).float().mean((0, 1)).numpy()
        got = why.positions[why.positions.layer == layer].sort_values("pos")
        np.testing.assert_allclose(got.sink_rate, np.where(known, rate, np.nan), atol=1e-6)
        np.testing.assert_allclose(got.alpha, alpha_BHS.mean((0, 1)), atol=1e-5)
        assert (got.n_sequences == 4).all()
        hidden += int((rate[~known] > 0).sum())
        mine = why.sinks[(why.sinks.layer == layer) & (why.sinks.pos == T - 2)]
        assert len(mine) == 4 and mine.finding.all() and mine["heads"].isna().all()
    assert hidden, "the last keys would be sinks of some heads"
