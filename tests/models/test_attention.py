"""Attention of every family: each call is placed or refused with a reason, read as eager attention computes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import massact as ma
from massact.anatomy import example_inputs
from massact.models import Model, load, projection_of, with_attention
from massact.records.anatomy import AttentionPlace
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.stats import Where
from massact.stats.attention_call import Attended
from massact.trace import Probe, measure
from massact.trace.attention import AttentionCall, attending
from massact.trace.windows import whole
from tests.anatomy.test_own_modules import Block, D, Own
from tests.facts import tells
from tests.families import FAMILIES, N_LAYERS, STACKS, build

INTERFACE = {"gemma2", "gpt_oss", "longt5"}  # soft cap, learned sinks, a position bias without SDPA
WRITTEN_OUT = {"bloom", "mpt", "gptj"}
UNSEEN = {"longformer": "windows"}  # whole families
CONVOLUTIONS = {"lfm2", "qwen3_next"}  # layers 1 and 3
BOTH_WAYS = {"bert", "roberta", "distilbert", "electra", "albert", "modernbert", "vit", "wav2vec2", "deit", "dinov2",
             "dinov2_with_registers", "dinov3_vit", "vit_mae", "siglip", "swin"}  # fmt: skip
CROSS = {"t5", "longt5", "bart", "whisper"}
# Key-value heads: as the kernel is given them, which is after Falcon has written its two groups out.
SHARED = {"llama": 2, "mistral": 2, "mixtral": 2, "qwen2": 2, "qwen3": 2, "qwen3_moe": 2, "gemma2": 2, "gemma3": 2,
          "olmo2": 2, "phi3": 2, "gpt_oss": 2, "falcon": 1, "stablelm": 2, "starcoder2": 2, "cohere": 2, "lfm2": 2,
          "qwen3_next": 2, "granite": 2}  # fmt: skip


@cache
def read(name: str) -> Model:
    """A family with larger matrices than it begins with: random attention is so even that it would prove little."""
    module = build(name)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2 and name not in ("t5", "longt5"):
                parameter.mul_(3)
    return with_attention(load(module))


def all_sites(name: str) -> dict[Site, bool]:
    """Every site that there must be, and whether attention can be seen there."""
    stacks = STACKS.get(name, [""])
    found = {}
    for stack, n_layers in zip(stacks, N_LAYERS.get(name, [3]), strict=True):
        for layer in range(1, n_layers + 1):
            hidden = name in UNSEEN or (name in CONVOLUTIONS and layer != 2) or (name, stack) == ("longt5", "encoder")
            found[Site(stack, layer, "attention")] = not hidden
            if name in CROSS and stack == "decoder":
                found[Site(stack, layer, "cross_attention")] = True
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_call_is_placed_or_refused(name: str) -> None:
    """What is seen, how, with how many heads, and which way it looks; what is not seen has a reason."""
    anatomy, wanted = read(name).anatomy, all_sites(name)
    assert set(anatomy.attentions) == {site for site, seen in wanted.items() if seen}
    assert set(anatomy.no_attention) == {site for site, seen in wanted.items() if not seen}
    for reason in anatomy.no_attention.values():
        assert ("mixed by" if name in CONVOLUTIONS else UNSEEN.get(name, "15 entries")) in reason
    via = "interface" if name in INTERFACE else "softmax" if name in WRITTEN_OUT else "sdpa"
    for site, place in anatomy.attentions.items():
        assert place.via == via
        heads = 2 if (name, site.stack) == ("swin", "0") else 4
        assert (place.n_heads, place.n_kv_heads) == (heads, SHARED.get(name, heads))
        cross, encoder = site.point == "cross_attention", site.stack in ("encoder", "vision_model")
        assert place.cross == cross
        assert place.forward == (name not in BOTH_WAYS and not cross and not encoder)
        shifted = name == "swin" and site.layer == 2  # by windows, with -100 between their parts
        biased = name in ("t5", "longt5") and not cross or shifted
        assert place.binary == (not biased)
        assert 0 <= place.error < 2e-6
        assert place.row_sum == pytest.approx(1, abs=1e-5) if name != "gpt_oss" else 0 < place.row_sum < 0.95
        assert (place.projection is None) == (name == "qwen3_next")  # a gate lies before its projection


def test_a_shared_block_and_a_second_look() -> None:
    """ALBERT calls one block three times; looking again changes nothing."""
    places = list(read("albert").anatomy.attentions.values())
    assert len({p.module for p in places}) == 1 and [p.number for p in places] == [0, 1, 2]
    assert all(with_attention(read(name)) is read(name) for name in ("llama", "swin"))


# ----------------------------------------------------------------------------------------- what the taps leave alone
def outputs(module: nn.Module) -> list[Tensor]:
    with torch.inference_mode():
        out = module(**example_inputs(module, seed=5))
    flat: list[Tensor] = []

    def walk(x: Any) -> None:
        if isinstance(x, Tensor):
            flat.append(x.clone())
        elif isinstance(x, dict | list | tuple):
            for y in x.values() if isinstance(x, dict) else x:
                walk(y)

    walk(out)
    assert flat
    return flat


def assert_nothing_left(module: nn.Module, before: dict[str, Any]) -> None:
    for m in module.modules():
        assert not m._forward_hooks and not m._forward_pre_hooks
        assert not m._forward_hooks_always_called
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_bit_identical_and_nothing_is_left(name: str) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    model = read(name)
    assert_nothing_left(model.module, before)
    seen: list[tuple[int, ...]] = []
    taps = {place: (lambda call: seen.append(call.shape)) for place in model.anatomy.attentions.values()}
    bare = outputs(model.module)
    with attending(model.module, taps) as state:
        for _ in range(2):
            state.begin()
            watched = outputs(model.module)
            assert state.complete and state.fired == [1] * len(taps)
    assert len(seen) == 2 * len(taps)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    assert_nothing_left(model.module, before)
    assert all(torch.equal(a, b) for a, b in zip(bare, outputs(model.module), strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "t5"])
@pytest.mark.parametrize("where", ["tap", "model"])
def test_nothing_is_left_after_an_exception(name: str, where: str) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    model, bare = read(name), outputs(read(name).module)
    places = list(model.anatomy.attentions.values())

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = None
    if where == "model":
        handle = model.module.get_submodule(places[1].module).register_forward_hook(stop)
    try:
        with (
            pytest.raises(RuntimeError, match="stop"),
            attending(model.module, {p: stop if where == "tap" else (lambda call: None) for p in places}),
        ):
            outputs(model.module)
    finally:
        if handle is not None:
            handle.remove()
    assert_nothing_left(model.module, before)
    assert all(torch.equal(a, b) for a, b in zip(bare, outputs(model.module), strict=True))


def test_other_functions_of_a_user_stay_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that somebody else has registered is called, looked at, and there afterwards."""
    ran: list[int] = []

    def own(*args: Any, **kw: Any) -> Any:
        ran.append(1)
        return eager_attention_forward(*args, **kw)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "eager", own)
    module = build("llama")
    module.set_attn_implementation("eager")
    model = with_attention(load(module))
    assert ran and [p.via for p in model.anatomy.attentions.values()] == ["interface"] * 3
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == {"eager": own}


# -------------------------------------------------------------------------------------------------------- eager
def calls_of(model: Model, inputs: dict[str, Any]) -> dict[Site, list[Attended]]:
    """The calls of one forward pass, one `Attended` for each sequence."""
    found: dict[Site, list[Attended]] = {}

    def see(site: Site, place: AttentionPlace) -> Callable[[AttentionCall], None]:
        def tap(call: AttentionCall) -> None:
            call = whole(call, place.windows) if place.windows else call.split(2)
            found[site] = [call.of(b, place) for b in range(2)]

        return tap

    with torch.inference_mode(), attending(model.module, {p: see(s, p) for s, p in model.anatomy.attentions.items()}):
        model.module(**inputs)
    return found


def eager_probabilities(name: str, inputs: dict[str, Any]) -> Iterator[tuple[Site, Tensor]]:
    """What transformers' own eager attention says of the same weights."""
    module: Any = read(name).module
    weights = module.state_dict()
    module = type(module)._from_config(copy.deepcopy(module.config), attn_implementation="eager").eval()
    module.load_state_dict(weights)
    with torch.no_grad():
        out = module(**inputs, output_attentions=True)
    parts: list[tuple[str, Any]] = [("", out)]
    if name in ("clip", "siglip"):  # a tower gives its attentions where it is asked
        parts = []
        for tower, keys in (("text_model", ("input_ids",)), ("vision_model", ("pixel_values",))):
            with torch.no_grad():
                part = getattr(module, tower)(**{k: inputs[k] for k in keys}, output_attentions=True)
            parts.append((tower, part))
    for stack, part in parts:
        keys = {"attentions": (stack or ("vit" if name == "vit_mae" else ""), "attention"),
                "encoder_attentions": ("encoder", "attention"), "decoder_attentions": ("decoder", "attention"),
                "cross_attentions": ("decoder", "cross_attention")}  # fmt: skip
        for key, (where, point) in keys.items():
            for i, p in enumerate(part.get(key) or ()):
                layer = 2 if name in CONVOLUTIONS else i + 1
                if (name, key) != ("longt5", "encoder_attentions"):
                    yield Site(where, layer, point), p


EAGER = [n for n in FAMILIES if n not in UNSEEN and n != "swin"]  # which gives windows: test_attention_windows.py


@pytest.mark.parametrize("name", EAGER)
@torch.no_grad()
def test_probabilities_are_those_of_eager_attention(name: str) -> None:
    """P from what was seen, against transformers; a learned sink has what its rows lack. And P V is the output."""
    inputs = example_inputs(read(name).module, seed=5)
    seen, n = calls_of(read(name), inputs), 0
    for site, p_BHTS in eager_probabilities(name, inputs):
        for a, want in zip(seen[site], p_BHTS, strict=True):
            got = a.dense()[1]
            np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-5)
            assert want.std() > 2e-4  # random attention may be even; then it would prove nothing
            mass = a.columns()[0]
            np.testing.assert_allclose(mass.numpy(), want.sum(1).numpy(), atol=1e-4)
            assert a.v_KSF is not None and a.out_HTF is not None
            out = want @ a.values(torch.arange(want.shape[-1]))
            np.testing.assert_allclose(a.out_HTF.numpy(), out.numpy(), atol=1e-5 * max(1, float(out.abs().max())))
            n += 1
        if name == "gpt_oss":
            for a, want in zip(seen[site], p_BHTS, strict=True):
                assert a.slot_HT is not None and (a.slot_HT > 0.01).any()
                np.testing.assert_allclose(a.slot_HT.numpy(), 1 - want.sum(-1).numpy(), atol=1e-5)
    layers = len(seen) - (2 if name == "vit_mae" else 0)  # its decoder gives no attentions
    assert n == 2 * layers > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert", "falcon", "phi", "gemma2", "gpt_oss", "t5"])
def test_queries_keys_and_log_sum_exp(name: str) -> None:
    """The kernel's own log-sum-exp is that of scale q.k + mask; queries and keys are those after rotary."""
    for calls in calls_of(read(name), example_inputs(read(name).module, seed=5)).values():
        for a in calls:
            q, k = a.q_HTE.double(), a.k_KSE.double()
            s = a.scale * q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)
            s = s if a.cap is None else a.cap * torch.tanh(s / a.cap)
            s = s if a.mask_HTS is None else s + a.mask_HTS
            if a.causal:
                s = s.masked_fill(torch.ones(s.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
            np.testing.assert_allclose(a.lse_HT.numpy(), s.logsumexp(-1).numpy(), atol=1e-5)
            assert (a.lse_given_HT is not None) == (name not in INTERFACE)


def test_llamas_queries_by_hand() -> None:
    """Projection and rotation written out, and two key-value heads for four heads."""
    model, inputs = read("llama"), example_inputs(read("llama").module, seed=5)
    seen = calls_of(model, inputs)[Site("", 1, "attention")][1]
    inner = model.module.model
    with torch.no_grad():
        h = inner.layers[0].input_layernorm(inner.embed_tokens(inputs["input_ids"][1]))
        attn = inner.layers[0].self_attn
        angle = torch.outer(torch.arange(13.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8)).repeat(1, 2)
        for x, got in ((attn.q_proj(h), seen.q_HTE), (attn.k_proj(h), seen.k_KSE)):
            x = x.unflatten(-1, (-1, 8)).transpose(0, 1)
            turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
            np.testing.assert_allclose(got.numpy(), (x * angle.cos() + turned * angle.sin()).numpy(), atol=1e-5)
        v = attn.v_proj(h).unflatten(-1, (2, 8)).transpose(0, 1)
        np.testing.assert_allclose(seen.v_KSF.numpy(), v.numpy(), atol=1e-6)
    assert seen.scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize("name", [name for name in EAGER if name != "qwen3_next"])
def test_the_projection_writes_what_the_block_adds(name: str) -> None:
    """W_O of the heads' output, with its bias back, is what the projection gave; it is linear."""
    model = read(name)
    inputs = example_inputs(model.module, seed=5)
    for site, (a, _) in calls_of(model, inputs).items():
        place = model.anatomy.attentions[site]
        assert place.projection is not None
        project = projection_of(model, place)
        assert project is not None
        with torch.inference_mode():
            x = a.out_HTF.transpose(0, 1).flatten(1)
            module = model.module.get_submodule(place.projection.module)
            bias = getattr(module, "bias", None)
            want = module(x) - (0 if bias is None else bias)
            np.testing.assert_allclose(project(x).numpy(), want.numpy(), atol=1e-5)
            np.testing.assert_allclose(project(-3 * x).numpy(), -3 * want.numpy(), atol=3e-5)
            assert project(x).dtype == torch.float32 and not project(0 * x).any()


def test_no_projection_where_none_was_found() -> None:
    assert projection_of(read("qwen3_next"), read("qwen3_next").anatomy.attentions[Site("", 2, "attention")]) is None


# ------------------------------------------------------------------------------------------------------ measuring
class Kept:
    """A statistic of attention that keeps everything: sequence -> (probabilities, mass per key, positions)."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[np.ndarray, np.ndarray, list[int]]] = {}

    def update(self, a: Attended, where: Where) -> None:
        assert where.sequence not in self.seen
        p = a.dense()[1].numpy()
        self.seen[where.sequence] = (p, a.columns()[0].numpy(), where.rows(a.shape[1]).tolist())

    def merge(self, other: Kept) -> None:
        assert not self.seen.keys() & other.seen.keys()
        self.seen |= other.seen

    def result(self) -> dict[int, tuple[np.ndarray, np.ndarray, list[int]]]:
        return self.seen


KEEP = Probe("keep", "*.attention", Kept)  # type: ignore[arg-type]
SOME = ["llama", "mistral", "gpt2", "gemma2", "gpt_oss", "bloom", "mpt", "opt", "bert", "modernbert", "falcon"]
# Those whose positions are absolute count them from the left, padding included.
PADDED = [(name, left) for name in SOME for left in (False, True) if not left or name not in ("gpt2", "bert")]


def ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (1, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, left", PADDED)
def test_padding_counts_for_nothing(name: str, left: bool) -> None:
    """A padded sequence attends as it does alone, and stands where it stood in the padded row."""
    model, lengths = read(name), [12, 7, 9]
    tokens, mask = torch.zeros(3, 12, dtype=torch.long) + 3, torch.zeros(3, 12, dtype=torch.long)
    spans = [slice(12 - n, 12) if left else slice(0, n) for n in lengths]
    for i, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        tokens[i, span], mask[i, span] = ids(n, i)[0], 1
    padded = measure(model, ma.corpus({"input_ids": tokens, "attention_mask": mask}), [KEEP], batch_size=3)
    assert [site.layer for site in padded.sites("keep")] == [1, 2, 3]
    for i, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        alone = measure(model, ma.corpus({"input_ids": ids(n, i)}), [KEEP])
        for site in padded.sites("keep"):
            p, mass, positions = padded.result("keep", site)[i]
            want_p, want_mass, _ = alone.result("keep", site)[0]
            assert positions == list(range(12))[span] and p.shape == (4, n, n)
            np.testing.assert_allclose(p, want_p, atol=1e-5)
            np.testing.assert_allclose(mass, want_mass, atol=1e-4)


def test_holes_in_the_mask() -> None:
    """Positions that do not count are left out of queries and keys."""
    tokens, mask = ids(10).repeat(2, 1), torch.ones(2, 10, dtype=torch.long)
    mask[0, [2, 5]] = 0
    got = measure(read("llama"), ma.corpus({"input_ids": tokens, "attention_mask": mask}), [KEEP])
    p, _, positions = got.result("keep", Site("", 1, "attention"))[0]
    assert positions == [0, 1, 3, 4, 6, 7, 8, 9]
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    whole, _, _ = got.result("keep", Site("", 1, "attention"))[1]
    kept = whole[:, positions][:, :, positions]
    np.testing.assert_allclose(p, kept / kept.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_oss"])
def test_batch_size_changes_nothing(name: str) -> None:
    corpus = ma.corpus({"input_ids": torch.cat([ids(11, i) for i in range(5)])})
    runs = [measure(read(name), corpus, [KEEP], batch_size=n) for n in (5, 2, 1)]
    for site in runs[0].sites("keep"):
        for run in runs[1:]:
            for i in range(5):
                got, want = (r.result("keep", site)[i][0] for r in (run, runs[0]))
                np.testing.assert_allclose(got, want, atol=1e-6)


def test_attention_beside_hidden_states() -> None:
    """Both kinds of probes in one pass, only where asked; what is unavailable is said to be."""
    model = read("lfm2")
    got = measure(model, ma.corpus({"input_ids": ids(9)}), [KEEP, Probe("rest", "*.resid_post", ma.stats.Keep)])
    assert got.sites("keep") == [Site("", 2, "attention")] and len(got.sites("rest")) == 4
    for pattern in ("1.attention", "*.cross_attention"):
        with pytest.raises(UserError, match="attention"):
            measure(model, ma.corpus({"input_ids": ids(9)}), [Probe("x", pattern, Kept)])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- own modules
class Attention(nn.Module):
    """`how` makes the output of the heads from q, k, v (B, 4, T, 4)."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj, self.how = nn.Linear(D, 3 * D), nn.Linear(D, D), how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(self.how(q, k, v).transpose(1, 2).flatten(2))


class Heads(Block):
    """A block of one's own, with such an attention in it."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attn = Attention(how)


def own(how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Model:
    torch.manual_seed(0)
    return with_attention(load(Own([Heads(how) for _ in range(3)]).eval(), inputs={"signal": torch.randn(2, 13, 5)}))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(13, 13, dtype=torch.bool).tril(), scale=0.5)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 2
    return F.softmax(scores.masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf), -1) @ v


def written_out_both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul((q @ k.mT / 2).softmax(dim=-1), v)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)) / 13


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    context = k.softmax(-2).transpose(-2, -1) @ v
    return q.softmax(-1) @ context  # rows sum to one, over features


def sharpened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT / 2).softmax(-1)
    return p.mul_(2) @ v  # no longer what the softmax gave, though it lies at the same place


def halved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT / 2).softmax(-1) * 0.5).contiguous() @ v


def of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).softmax(-2) @ v  # normalised over the wrong axis


@pytest.mark.parametrize("how, via, forward", [(fused, "sdpa", True), (masked, "sdpa", True),
                                               (written_out, "softmax", True),
                                               (written_out_both_ways, "softmax", False)])  # fmt: skip
def test_own_attention_is_read(how: Callable, via: str, forward: bool) -> None:
    """Called directly or written out: the same probabilities as by hand, projection found."""
    model = own(how)
    assert not model.anatomy.no_attention and len(model.anatomy.attentions) == 3
    got = measure(model, ma.corpus({"signal": torch.randn(4, 13, 5)}), [KEEP])
    for site, place in model.anatomy.attentions.items():
        assert (place.via, place.n_heads, place.n_kv_heads, place.forward, place.binary) == (via, 4, 4, forward, True)
        assert place.projection is not None and place.projection.module == f"blocks.{site.layer - 1}.attn.proj"
        assert len(got.result("keep", site)) == 4
    signal = torch.randn(2, 13, 5)
    seen = calls_of(model, {"signal": signal})[Site("", 1, "attention")][0]
    with torch.no_grad():
        first = model.module.blocks[0]
        q, k, _ = (t.unflatten(-1, (4, -1)).transpose(0, 1) for t in
                   first.attn.qkv(first.n1(model.module.embed(signal[0]))).chunk(3, -1))  # fmt: skip
        s = q @ k.mT / 2
        s = s.masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf) if forward else s
    np.testing.assert_allclose(seen.dense()[1].numpy(), s.softmax(-1).numpy(), atol=1e-5)


@pytest.mark.parametrize("how", [linear, efficient, sharpened, halved, of_queries])
def test_what_is_no_attention_is_refused_with_a_reason(how: Callable) -> None:
    """Linear attention has no row of probabilities; a softmax whose product is not the output is not believed."""
    model = own(how)
    assert not model.anatomy.attentions and len(model.anatomy.no_attention) == 3
    for reason in model.anatomy.no_attention.values():  # where the softmax is of something else, or what comes out is
        assert tells([reason], "softmax", "over" if how in (linear, efficient) else "output")
    with pytest.raises(UserError):
        measure(model, ma.corpus({"signal": torch.randn(4, 13, 5)}), [KEEP])
