"""Windows and chunks shorter than the text: every mean over queries is over those that can see the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import massact as ma
from massact.explanations.targets import positions_of
from massact.models import load, with_attention
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.scan import ScanResult
from massact.trace.attention import _mask_of

T, W, EPS = 30, 8, 0.1
SMALL: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
IDS = torch.randint(5, 97, (2, T), generator=torch.Generator().manual_seed(4))
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As flash attention is called: no mask, the width of a window instead."""
    n = query.shape[2]
    behind = torch.arange(n)[:, None] - torch.arange(n)
    seen = behind >= 0 if sliding_window is None else (behind >= 0) & (behind < sliding_window)
    s = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling).masked_fill(~seen, -torch.inf)
    p = s.exp() / s.exp().sum(-1, keepdim=True)  # by no softmax, and by no kernel, that could be looked at
    out = p @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("window_stand_in", flash)
AttentionMaskInterface.register("window_stand_in", flash_attention_mask)


def mistral(how: str) -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=W, attn_implementation=how))


def gemma3(how: str) -> nn.Module:
    config = tf.Gemma3TextConfig(**SMALL, sliding_window=W, layer_types=MIXED, attn_implementation=how)
    return tf.Gemma3ForCausalLM(config)


def gpt_oss(how: str) -> nn.Module:
    config = tf.GptOssConfig(**SMALL, sliding_window=W, layer_types=MIXED, num_local_experts=2, num_experts_per_tok=1,
                             attn_implementation="eager")  # fmt: skip
    return tf.GptOssForCausalLM(config)


def llama4(how: str) -> nn.Module:
    types = ["chunked_attention", "full_attention", "chunked_attention"]
    config = tf.Llama4TextConfig(
        **SMALL, attention_chunk_size=W, layer_types=types, intermediate_size_mlp=48, num_local_experts=2,
        num_experts_per_tok=1, interleave_moe_layer_step=2, attn_implementation=how, pad_token_id=0,
    )  # fmt: skip
    return tf.Llama4ForCausalLM(config)


def modernbert(how: str) -> nn.Module:
    small = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    config = tf.ModernBertConfig(**small, local_attention=W, global_attn_every_n_layers=2, pad_token_id=0,
                                 bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
                                 attn_implementation=how)  # fmt: skip
    return tf.ModernBertForMaskedLM(config)


def sees(name: str, kind: str, t: int, k: int) -> bool:
    """Whether query t can see key k, in words of each family's paper."""
    if name == "modernbert":
        return kind == "full_attention" or abs(t - k) <= W // 2
    near = {"sliding_attention": t - k < W, "chunked_attention": t // W == k // W, "full_attention": True}[kind]
    return k <= t and near


MODELS: dict[str, tuple[Callable[[str], nn.Module], str]] = {
    "mistral": (mistral, "sdpa"), "gemma3": (gemma3, "sdpa"), "gpt_oss": (gpt_oss, "eager"), "llama4": (llama4, "sdpa"),
    "modernbert": (modernbert, "sdpa"), "eager": (mistral, "eager"), "flash": (mistral, "window_stand_in"),
}  # fmt: skip


def explained(name: str) -> tuple[Any, ScanResult, Explanation]:
    torch.manual_seed(3)
    make, how = MODELS[name]
    module: Any = make(how).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.mul_(3)
    model = with_attention(load(module))
    assert not model.anatomy.no_attention
    scan = ma.scan(model, IDS, thresholds={"magnitude": 0.02, "ratio": 3.0}, null=False, bos_contrast=False)
    # So low, every token has a finding: those of some tokens, so that queries are left that are none of them.
    scan.findings = scan.findings[scan.findings["pos"].isin([0, 3, 4, 11, 12, 22])].reset_index(drop=True)
    return module, scan, ma.explain(model, IDS, scan, eps=EPS)


def probabilities(name: str, module: Any) -> list[np.ndarray]:
    """Of the same weights in transformers' own eager attention: for each layer (B, H, T, T)."""
    other: Any = MODELS[name][0]("eager").eval()
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        return [p.double().numpy() for p in other(input_ids=IDS, output_attentions=True).attentions]


@pytest.mark.parametrize("causal", [True, False])
def test_how_an_implementation_is_told_of_its_mask(causal: bool) -> None:
    """A tensor, a function of positions (flex attention), the width of a window (flash attention): one mask."""

    def near(b: Any, h: Any, t: Any, k: Any) -> Any:
        return (t - k < W) & (k <= t) if causal else (t - k < W) & (k - t < W)

    q = torch.zeros(2, 4, T, 8)
    wanted = torch.tensor([[bool(near(0, 0, t, k)) for k in range(T)] for t in range(T)])
    block = create_block_mask(near, 2, None, T, T, device="cpu")
    for mask, width in ((wanted[None, None], None), (block, None), (None, W), (torch.ones(2, T), W)):
        got = _mask_of(mask, q, q, width, causal)
        # Two dimensions are of padding, which is left out of what is measured.
        assert got is not None and torch.equal(got.expand(2, 1, T, T), wanted.expand(2, 1, T, T))
    assert _mask_of(None, q, q, None, causal) is None and _mask_of(None, q, q, T, causal) is None


def mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


@pytest.mark.parametrize("name", MODELS)
def test_means_are_over_the_queries_that_can_see_the_key(name: str) -> None:
    """Masses, alpha_k, sinks and secondary sinks of every layer, entry by entry."""
    module, scan, e = explained(name)
    types = getattr(module.config, "layer_types", None) or ["sliding_attention"] * 3
    found, hidden = positions_of(scan.findings, 2), 0
    for layer, (kind, p_BHTS) in enumerate(zip(types, probabilities(name, module), strict=True), 1):
        seen = np.array([[sees(name, kind, t, k) for k in range(T)] for t in range(T)])
        assert (p_BHTS[..., ~seen] == 0).all() and (p_BHTS[..., seen] > 0).all()
        hidden += int((~seen[:, 0]).sum())
        heads, positions = e.heads[e.heads["layer"] == layer], e.positions[e.positions["layer"] == layer]
        alpha = np.array([[[p[seen[:, k], k].mean() for k in range(T)] for p in p_HTS] for p_HTS in p_BHTS])
        enough = seen.sum(0) >= min(16, seen.sum(0).max())
        sinks = (alpha > EPS) & enough
        for h in range(4):
            row = heads[heads["head"] == h].iloc[0]
            p_BTS = p_BHTS[:, h]
            first = np.mean([mean([p[t, 0] for t in range(1, T) if seen[t, 0]]) for p in p_BTS])
            mass = np.nanmean([
                mean([p[t, found[b]].sum() for t in range(T) if t not in found[b] and seen[t, found[b]].any()
                      and not (t == 0 and name != "modernbert")])
                for b, p in enumerate(p_BTS)
            ])  # fmt: skip
            even = seen / seen.sum(1, keepdims=True)
            assert row["mass_first"] == pytest.approx(first, abs=1e-6)
            assert row["mass_first_uniform"] == pytest.approx(
                mean([even[t, 0] for t in range(1, T) if seen[t, 0]]), abs=1e-6
            )
            assert row["mass_findings"] == pytest.approx(mass, abs=1e-6)
            assert row["alpha_first"] == pytest.approx(alpha[:, h, 0].mean(), abs=1e-6)
            assert row["sink_rate"] == (alpha[:, h, 0] > EPS).mean()
            assert row["secondary"] == pytest.approx(alpha[:, h, 1:][:, enough[1:]].max(1).mean(), abs=1e-6)
        np.testing.assert_allclose(positions["alpha"], alpha.mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(positions["alpha_max"], alpha.max(1).mean(0), atol=1e-6)
        known = np.where(enough, sinks.mean((0, 1)), np.nan)  # of too few queries it is not said
        np.testing.assert_allclose(positions["sink_rate"], known, atol=1e-6)
    assert hidden > 20  # windows that hide the first key from most


def test_another_path_at_the_length_of_the_corpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of which nothing is said shows at no short example: it is found where it hides a key."""

    def silent_flash(*args: Any, sliding_window: int | None = None, **named: Any) -> Any:
        return flash(*args, **named, sliding_window=16)

    monkeypatch.setitem(AttentionInterface._global_mapping, "window_stand_in", silent_flash)
    torch.manual_seed(3)
    net: Any = tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=None,
                                                      attn_implementation="window_stand_in")).eval()  # fmt: skip
    model = with_attention(load(net))
    assert not model.anatomy.no_attention
    with pytest.raises(ma.MassactError, match="1.attention"):
        ma.explain(model, IDS, ma.scan(model, IDS, null=False, bos_contrast=False))
