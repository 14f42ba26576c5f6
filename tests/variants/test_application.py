"""Attention variants on models of transformers: six architectures, saved and read, generated with, measured."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import massact as ma
from massact.anatomy import example_inputs
from massact.models import random_twin, with_attention
from massact.models.transformers_models import from_pretrained
from massact.records.errors import UserError
from massact.variants.application import apply_variant
from massact.variants.calls import Call
from massact.variants.registry import VARIANTS
from massact.variants.storage import load_variant
from tests.facts import each
from tests.families import build

FAMILIES = ("llama", "gpt2", "qwen3", "opt", "vit", "dinov2")
TEXT = ("llama", "gpt2", "qwen3", "opt")
LARGE = {"kv-bias": {"std": 1.0, "value_std": 1.0}, "window": {"size": 4, "kept": 1}}


def changed(family: str, name: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    chosen = LARGE.get(name, {}) | ({"std": 0.5} if "std" in VARIANTS[name].options else {})
    return apply_variant(build(family), name, **chosen | options).eval()


def outputs(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**example_inputs(model) | more)[0]


def tokens(n: int = 3, length: int = 20) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------------- a copy patched by hand
def by_hand(name: str) -> Callable[..., Any]:
    """Eager attention with T x S weights and a variant written into it."""

    def eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
              **_: Any) -> tuple[Tensor, None]:  # fmt: skip
        B, H, T, E = q.shape
        n = H // k.shape[1]
        k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
        z = q @ k.transpose(-1, -2) * (E**-0.5 if scaling is None else scaling)
        if mask is not None:
            z = z + mask
        if name == "kv-bias":
            own_k, own_v = (x.repeat_interleave(n, 0) for x in (module.massact_k, module.massact_v))
            slot = torch.einsum("bhte,he->bht", q, own_k) * (E**-0.5 if scaling is None else scaling)
            p = torch.cat([slot[..., None], z], -1).softmax(-1)
            out = p[..., 1:] @ v + p[..., :1] * own_v[:, None]
        elif name == "softmax-off-by-one":
            out = z.exp() / (1 + z.exp().sum(-1, keepdim=True)) @ v
        else:
            out = z.softmax(-1) @ v
            gate = torch.sigmoid(seen_inputs[module] @ module.massact_gate.T)
            out = out * gate.reshape(B, T, H, -1).transpose(1, 2)
        return out.transpose(1, 2).contiguous(), None

    seen_inputs: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen_inputs[module] = args[0] if args else kwargs["hidden_states"]

    eager.remember = remember  # type: ignore[attr-defined]
    return eager


@pytest.mark.parametrize("name", ["kv-bias", "softmax-off-by-one", "gated-headwise", "gated-elementwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_an_eager_copy_patched_by_hand(family: str, name: str) -> None:
    model = changed(family, name)
    found = outputs(model)
    twin = copy.deepcopy(model)
    function = by_hand(name)
    for module in twin.modules():
        if hasattr(module, "massact_variant"):
            module.register_forward_pre_hook(function.remember, with_kwargs=True)  # type: ignore[attr-defined]
    transformers.AttentionInterface.register("by_hand", function)
    transformers.AttentionMaskInterface.register("by_hand", transformers.masking_utils.eager_mask)
    twin.config._attn_implementation = "by_hand"
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "by_hand"
    wanted = outputs(twin)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, outputs(build(family)), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_is_the_model_itself(family: str) -> None:
    plain, model = build(family), changed(family, "softmax")
    assert torch.equal(outputs(plain), outputs(model))
    assert model.config.massact["changes"][0]["name"] == "softmax"
    assert not [n for n in model.state_dict() if "massact" in n]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_wider_than_the_text_is_the_model_itself(family: str) -> None:
    torch.testing.assert_close(outputs(changed(family, "window", size=500)), outputs(build(family)))


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient_and_copies_run(family: str, name: str) -> None:
    model = changed(family, name)
    first = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), first)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), first)
    model.train()
    model(**example_inputs(model))[0].square().sum().backward()
    added = {n: p for n, p in model.named_parameters() if "massact_" in n}
    assert bool(added) == (name not in ("softmax", "softmax-off-by-one", "clipped-softmax", "sigmoid", "relu",
                                        "sigmoid-normalised", "softpick", "window"))  # fmt: skip
    for n, p in added.items():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and float(p.grad.abs().max()) > 0, n


# -------------------------------------------------------------------------------------------- saved and read
@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_saved_and_read_gives_the_same_bits(family: str, name: str, tmp_path: Path) -> None:
    model = changed(family, name)
    wanted = outputs(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(from_pretrained(tmp_path)), wanted)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(load_variant(plain)), wanted)


def test_a_folder_is_opened_by_load(tmp_path: Path) -> None:
    model = changed("llama", "kv-bias")
    model.save_pretrained(tmp_path)
    opened = ma.load(str(tmp_path))
    assert torch.equal(outputs(opened.module), outputs(model))
    # In a process that has seen nothing of training/, by the library and by the command line.
    folder = str(tmp_path)
    code = (
        f"import massact as ma; assert [n for n in ma.load({folder!r}).module.state_dict() if 'massact_k' in n]",
        f"import massact.cli as c, sys; sys.argv = ['massact', 'scan', {folder!r}, '--corpus', '?']; c.main()",
    )
    done = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True) for c in code]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == 2 and "attention variant" not in done[1].stderr, done[1].stderr  # only the corpus


def test_missing_weights_and_nothing_to_load_are_refused(tmp_path: Path) -> None:
    model = changed("llama", "kv-bias")
    state = {n: t for n, t in model.state_dict().items() if "massact_v" not in n}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="3 missing"):
        from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no attention variant"):
        load_variant(build("llama"))
    with pytest.raises(UserError, match=each("already", "changes")):
        load_variant(model, tmp_path)


# -------------------------------------------------------------------------------------------- generation, padding
@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("family", TEXT)
def test_a_cache_changes_nothing(family: str, name: str) -> None:
    model, ids = changed(family, name), tokens(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
                               "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    fast, slow = (model.generate(ids, use_cache=flag, **options) for flag in (True, False))
    assert torch.equal(fast.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(slow.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("window", "qk-bias")])  # these count columns
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(family: str, name: str) -> None:
    model, ids = changed(family, name), tokens(2, 9)
    padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    with torch.no_grad():
        plain = model(ids).logits
        other = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(other[:, 3:], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kv-bias", "gated-elementwise", "sink-token"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    plain, other = changed("llama", name), changed("llama", name)
    getattr(other, "activation_checkpointing_enable", other.gradient_checkpointing_enable)()
    for model in (plain, other):
        model.train()
        ids = tokens()
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (n, a), (_, b) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=n)


@pytest.mark.parametrize("name", ["kv-bias", "gated-headwise"])
def test_a_captured_graph_gives_the_same(name: str) -> None:
    model = changed("llama", name)
    captured = torch.compile(model, backend="aot_eager")
    ids = tokens()
    one = model(ids, use_cache=False).logits
    torch.testing.assert_close(captured(ids, use_cache=False).logits, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mixed_precision_is_near_full_precision(family: str, name: str) -> None:
    """Under autocast queries may be float32 and values bfloat16: rotary embeddings are float32."""
    model, ids = changed(family, name), tokens()
    exact = model(ids, use_cache=False).logits.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert float((out.logits.detach() - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_dropout_in_training() -> None:
    """GPT-2 drops attention weights: the variant does too, and only while it trains."""
    model = changed("gpt2", "kv-bias").train()
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5 if name.endswith("attn_dropout") else 0.0
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)


# -------------------------------------------------------------------------------------------- measured
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("name", ["kv-bias", "k-bias", "softmax-off-by-one", "sink-logit"])
def test_the_slot_is_seen_with_its_probability(family: str, name: str) -> None:
    """mass_first and slot_mass of every head equal those of softmax over the keys and the slot, written out."""
    model = with_attention(ma.load(changed(family, name)))
    assert len(model.anatomy.attentions) == 3 and not model.anatomy.no_attention
    for place in model.anatomy.attentions.values():
        assert place.error < 1e-5 and place.row_sum < 1 and place.projection is not None
    if family == "vit":
        return
    ids, recorded = tokens(), []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
               **_: Any) -> tuple[Tensor, None]:  # fmt: skip
        call = Call(q, k, v, None, True, q.shape[-1] ** -0.5 if scaling is None else scaling)
        params = {n.removeprefix("massact_"): p for n, p in module._parameters.items() if n.startswith("massact_")}
        slot, value = VARIANTS[name].slot(call, params)  # type: ignore[misc]
        z, seen = call.written()
        p = torch.cat([slot[..., None], z.masked_fill(~seen, -torch.inf)], -1).softmax(-1)
        recorded.append(p)
        out = p[..., 1:] @ call.per_head(v, 1)
        out = out if value is None else out + p[..., :1] * value[:, None]
        return out.transpose(1, 2).contiguous(), None

    twin = copy.deepcopy(model.module)
    transformers.AttentionInterface.register("record", record)
    transformers.AttentionMaskInterface.register("record", transformers.masking_utils.sdpa_mask)
    twin.config._attn_implementation_internal = "record"
    with torch.no_grad():
        twin(ids)
    scan = ma.scan(model, ma.corpus(ids), null=False, bos_contrast=False)
    heads = ma.explain(model, ma.corpus(ids), scan).heads.set_index(["layer", "head"])
    for layer, p in enumerate(recorded, 1):
        for head in range(4):
            row = heads.loc[(layer, head)]
            assert row.slot_mass == pytest.approx(float(p[:, head, :, 0].mean()), abs=1e-5)
            assert row.mass_first == pytest.approx(float(p[:, head, 1:, 1].mean()), abs=1e-5)
            entropy = -torch.special.xlogy(p[:, head], p[:, head]).sum(-1).mean()
            assert row.entropy_nats == pytest.approx(float(entropy), abs=1e-4)


@pytest.mark.parametrize("name", ["qk-bias", "v-bias", "gated-headwise", "value-gate", "head-norm", "window"])
def test_attention_around_a_softmax_is_seen(name: str) -> None:
    model = with_attention(ma.load(changed("llama", name)))
    assert len(model.anatomy.attentions) == 3 and not model.anatomy.no_attention


@pytest.mark.parametrize("name", ["sigmoid", "relu", "softpick", "clipped-softmax"])
def test_attention_that_is_no_softmax_is_unavailable_with_the_reason(name: str) -> None:
    model = with_attention(ma.load(changed("llama", name)))
    assert not model.anatomy.attentions
    assert all("not softmax" in reason for reason in model.anatomy.no_attention.values())


@pytest.mark.parametrize("name", ["kv-bias", "softmax-off-by-one"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scan_explain_and_intervene_run(family: str, name: str) -> None:
    module = changed(family, name)
    embedding = module.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[7, 5] = 500.0  # token 7 carries a great value from the start
    ids = tokens(12)
    ids[:, 0] = 7
    model = ma.load(module)
    scan = ma.scan(model, ma.corpus(ids), bos_contrast=False)
    assert len(scan.findings) and set(scan.findings.dim) == {5}
    why = ma.explain(model, ma.corpus(ids), scan)
    assert bool(why.heads.slot_mass.between(0, 1, inclusive="neither").all())
    effects = ma.intervene(model, ma.corpus(ids), scan, layer=1, sets=("zero", "mean")).effects
    assert {"zero", "mean"} <= set(effects["edit"]) and bool(effects.edited.notna().all())


def test_the_random_twin_has_the_variant_too() -> None:
    twin = random_twin(ma.load(changed("llama", "kv-bias")))
    assert not isinstance(twin, str)
    assert [n for n in twin.module.state_dict() if "massact_k" in n]
    outputs(twin.module)


# -------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("bloom", "kv-bias", "does not go through"),
        ("gpt_oss", "kv-bias", "learned sinks"),
        ("gemma2", "kv-bias", "soft-capped"),
        ("t5", "kv-bias", "attention|position bias|through"),
        ("bart", "kv-bias", "cross-attention"),
        ("bart", "sink-token", "encoder and a decoder"),
        ("bert", "sink-token", "see those behind"),
        ("swin", "sink-token", "lists of"),
    ],
)
def test_what_an_architecture_cannot_take_is_refused_and_nothing_changes(family: str, name: str, why: str) -> None:
    model = build(family)
    before, names = outputs(model), set(model.state_dict())
    config = model.config.to_dict()
    implementation = model.config._attn_implementation
    with pytest.raises(UserError, match=why):
        apply_variant(model, name)
    assert set(model.state_dict()) == names and model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert torch.equal(outputs(model), before)


def test_other_wrong_uses_are_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'kv-bias'"):
        apply_variant(build("llama"), "kv-bais")
    with pytest.raises(UserError, match="already has"):
        apply_variant(changed("llama", "kv-bias"), "k-bias")
    with pytest.raises(UserError, match="not a transformers model"):
        apply_variant(nn.Linear(2, 2), "kv-bias")
    model = build("llama")
    model.config._attn_implementation_internal = "massact_kv-bias"
    with pytest.raises(UserError, match="no attention variant"):
        outputs(model)


def test_applying_keeps_mode_and_random_stream_of_the_model() -> None:
    model = build("gpt2").train()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    apply_variant(model, "softmax-off-by-one")
    assert torch.equal(torch.rand(3), wanted) and all(m.training for m in model.modules())


# -------------------------------------------------------------------------------------------- sink token
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sink_token_is_one_more_token_inside(family: str) -> None:
    model = changed(family, "sink-token")
    seen: list[int] = []
    name = next(n for n, m in model.named_modules() if "massact_token" in m._parameters)
    model.get_submodule(name).register_forward_hook(
        lambda m, a, o: seen.append((o if isinstance(o, Tensor) else o[0]).shape[1])
    )
    assert outputs(model).shape == outputs(build(family)).shape
    n_tokens = 13 if family in TEXT else 26  # 25 patches and a class token
    assert seen == [n_tokens + 1]


def test_the_sink_token_of_gpt2_is_that_of_the_paper() -> None:
    """Put in after the position embeddings, in front; dropped after the last norm."""
    model, ids = changed("gpt2", "sink-token"), tokens()
    inner = model.transformer
    token = inner.h[0].massact_token
    with torch.no_grad():
        found = model(ids).logits
        plain = copy.deepcopy(build("gpt2"))
        h = plain.transformer.wte(ids) + plain.transformer.wpe(torch.arange(ids.shape[1]))
        h = torch.cat([token.expand(len(ids), 1, -1), h], 1)
        for block in plain.transformer.h:
            h = block(h)
            h = h if isinstance(h, Tensor) else h[0]
        wanted = plain.lm_head(plain.transformer.ln_f(h)[:, 1:])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_scan_gives_no_token_to_positions_that_a_sink_token_moved() -> None:
    module = changed("llama", "sink-token")
    with torch.no_grad():
        module.model.layers[0].massact_token[5] = 500.0
    scan = ma.scan(ma.load(module), ma.corpus(tokens()), null=False, bos_contrast=False)
    assert set(scan.findings.pos) == {0} and set(scan.findings.token) == {"token 0"}  # a place, not a word
