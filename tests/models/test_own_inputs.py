"""Inputs that users make themselves: embeddings, positions, padding, a cache; and windows shorter than the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor

import massact as ma
from massact.records.errors import UserError
from massact.stats.protocol import PerSequence, Where
from massact.trace import Probe, observing
from tests.facts import tells
from tests.wrapped import IDS, RULE, SIZES, tiny


class Kept(PerSequence):
    """All values of every row, pass after pass."""

    def update(self, h_TD: Tensor, where: Where) -> None:
        earlier = self.rows.get(where.sequence)
        self.rows[where.sequence] = h_TD.clone() if earlier is None else torch.cat([earlier, h_TD])


def tables(module: Any, corpus: Any) -> dict[str, pd.DataFrame]:
    model = ma.load(module)
    scan = ma.scan(model, ma.corpus(corpus), null=False, **RULE)
    return {**scan.tables(), **ma.explain(model, ma.corpus(corpus), scan).tables()}


def test_embeddings_in_the_place_of_tokens_give_the_same_numbers() -> None:
    module = tiny()
    wanted = tables(module, {"input_ids": IDS})
    found = tables(module, {"inputs_embeds": module.get_input_embeddings()(IDS).detach()})
    words = {"token", "token_id", "position_class", "tokens", "share", "group"}
    for name in ("layers", "heads", "decomposition"):
        numbers = [c for c in wanted[name] if pd.api.types.is_float_dtype(wanted[name][c]) and c not in words]
        assert len(found[name]) == len(wanted[name]) and numbers
        np.testing.assert_array_equal(found[name][numbers], wanted[name][numbers])
    assert found["findings"]["value"].tolist() == wanted["findings"]["value"].tolist()


def test_embeddings_as_the_example() -> None:
    module = tiny()
    model = ma.load(module, inputs={"inputs_embeds": torch.randn(2, 13, 64)})
    scan = ma.scan(model, ma.corpus({"inputs_embeds": module.get_input_embeddings()(IDS).detach()}), null=False, **RULE)
    assert scan.layers["top1"].tolist() == ma.scan(module, IDS, null=False, **RULE).layers["top1"].tolist()


@pytest.mark.parametrize("jumps", [False, True])
def test_positions_of_ones_own_are_those_that_the_model_sees(jumps: bool) -> None:
    """Where they jump transformers takes what follows for another text: a note says so."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    module = transformers.GPT2LMHeadModel(config).eval()
    at = torch.arange(11).repeat(2, 1) + 7
    at = at * 3 if jumps else at
    scan = ma.scan(module, ma.corpus({"input_ids": IDS, "position_ids": at}), null=False, **RULE)
    with torch.inference_mode():
        states = module.transformer(IDS, position_ids=at, use_cache=False, output_hidden_states=True).hidden_states
    rows = scan.layers[(scan.layers["site"] == "resid_post") & (scan.layers["layer"] < 3)].set_index("layer")["top1"]
    wanted = [float(h_BTD.abs().amax((1, 2)).mean()) for h_BTD in states[:3]]
    np.testing.assert_allclose(rows.loc[[0, 1, 2]], wanted, rtol=1e-6)
    assert bool(tells(scan.info.notes, "position_ids", 2)) == jumps
    plain = ma.scan(module, IDS, null=False, **RULE).layers
    assert not np.allclose(plain["top1"], scan.layers["top1"])


def test_text_behind_padding_with_its_positions_is_the_text_alone() -> None:
    module, pad = tiny(), 4
    ids = torch.cat([torch.zeros(2, pad, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, pad, dtype=torch.long), torch.ones_like(IDS)], 1)
    mask[1, :pad] = 1  # of two lengths, so that the padding cannot be cut off
    at = (mask.cumsum(1) - 1).clamp(min=0)
    model, kept = ma.load(module), {}
    for name, corpus in (("padded", {"input_ids": ids, "attention_mask": mask, "position_ids": at}),
                         ("alone", {"input_ids": IDS})):  # fmt: skip
        seen = ma.measure(model, ma.corpus(corpus), [Probe("h", "*.resid_post", Kept)])
        kept[name] = [seen.statistics["h", site].rows[0] for site in seen.sites("h")]  # type: ignore[attr-defined]
    for padded, alone in zip(kept["padded"], kept["alone"], strict=True):
        torch.testing.assert_close(padded[-11:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_cache_is_no_input(legacy: bool) -> None:
    module = tiny()
    with torch.inference_mode():
        cache: Any = module(IDS[:, :5], use_cache=True).past_key_values
    cache = tuple((layer.keys, layer.values) for layer in cache.layers) if legacy else cache
    given = {"input_ids": IDS[:, 5:], "past_key_values": cache}
    for refuse in (lambda: ma.corpus(given), lambda: ma.load(module, inputs=given)):
        with pytest.raises(UserError, match="past_key_values") as refused:
            refuse()
        assert "observing" in refused.value.do and "input_ids" in refused.value.do


def test_passes_that_go_on_from_a_cache_are_seen_as_the_whole_text_is() -> None:
    model = ma.load(tiny())
    with torch.inference_mode(), observing(model, [Probe("h", "*.resid_post", Kept)]) as whole:
        model.module(IDS)
    with torch.inference_mode(), observing(model, [Probe("h", "*.resid_post", Kept)]) as parts:
        first = model.module(IDS[:, :5], use_cache=True)
        model.module(IDS[:, 5:], past_key_values=first.past_key_values)
    for site in whole.sites("h"):
        one, other = (s.statistics["h", site].rows for s in (whole, parts))  # type: ignore[attr-defined]
        together = torch.cat([other[k] for k in sorted(other)]) if len(other) > len(one) else None
        for k in one:
            pieces = other[k] if together is None else torch.cat([other[k], other[k + len(one)]])
            torch.testing.assert_close(pieces, one[k], rtol=1e-4, atol=1e-4)


def test_a_window_shorter_than_the_text_is_read_from_the_mask() -> None:
    torch.manual_seed(0)
    module = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4)).eval()
    model, corpus = ma.load(module), ma.corpus(IDS)
    scan = ma.scan(model, corpus, null=False, thresholds={"magnitude": 0.01, "ratio": 2.0})
    heads = ma.explain(model, corpus, scan).heads
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = module(IDS, output_attentions=True).attentions
    for layer, p_BHTS in enumerate(attentions, 1):
        assert float(p_BHTS[..., 10, :7].abs().max()) == 0
        wanted = p_BHTS[:, :, 1:4, 0].mean((0, 2))  # of the queries that see it
        found = heads[heads["layer"] == layer].sort_values("head")["mass_first"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
