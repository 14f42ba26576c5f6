"""KeyValueEdit: what a model gives is what it gives with its key and value projections changed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import massact as ma
from massact.corpora import Batch
from massact.models import Model, with_attention
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.stats.attention_call import Attended
from massact.stats.protocol import PerSequence, Where
from massact.trace import AttentionEdit, Edit, KeyValueEdit, Probe, Together, edited, observing
from massact.variants.application import apply_variant
from tests.models.test_torch_attention import _Own
from tests.trace.test_edits import IDS, close, inputs, logits, module_of, untouched

# Rotary turns a key and does not scale it, so that a key scaled behind it is one that its projection gave so scaled.
PROJECTIONS = {
    "llama": "model.layers.1.self_attn.{}_proj", "mixtral": "model.layers.1.self_attn.{}_proj",
    "gemma2": "model.layers.1.self_attn.{}_proj", "gpt_oss": "model.layers.1.self_attn.{}_proj",
    "opt": "model.decoder.layers.1.self_attn.{}_proj", "stablelm": "model.layers.1.self_attn.{}_proj",
    "t5": "encoder.block.1.layer.0.SelfAttention.{}",
}  # fmt: skip


def model_of(name: str, **options: Any) -> Model:
    return with_attention(ma.load(module_of(name), **options))


def first_changed(k_BKSE: Tensor, v_BKSF: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The first key at 0.3 of itself, and its value at zero; new tensors."""
    return scaled(k_BKSE, 0.3), scaled(v_BKSF, 0.0)


def scaled(x: Tensor, factor: float, axis: int = 2) -> Tensor:
    x = x.clone()
    x.select(axis, 0).mul_(factor)
    return x


def by_hand(module: nn.Module, path: str, keys: float = 0.3, values: float = 0.0) -> Any:
    """The same at the output of the two projections (B, S, K E)."""

    @contextmanager
    def hooks() -> Iterator[None]:
        handles = [
            module.get_submodule(path.format(name)).register_forward_hook(
                lambda m, args, out, factor=factor: scaled(out, factor, axis=1)
            )
            for name, factor in (("k", keys), ("v", values))
        ]
        yield
        for handle in handles:
            handle.remove()

    return hooks()


def where(name: str) -> str:
    return "encoder/2.attention" if name == "t5" else "2.attention"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_keys_and_values_are_those_of_changed_projections(name: str, implementation: str) -> None:
    model, given = model_of(name), inputs(name)
    if name in ("gpt_oss", "gemma2") and implementation == "sdpa":
        implementation = "eager"  # the only one that these have here
    if name != "t5":
        model.module.set_attn_implementation(implementation)
        model = with_attention(ma.load(model.module))
    with by_hand(model.module, PROJECTIONS[name]):
        wanted = logits(model.module, given)
    plain = logits(model.module, given)
    place = model.anatomy.select_attention(where(name))
    with untouched(model.module):
        with edited(model, KeyValueEdit("first", where(name), first_changed)) as fired:
            once, twice = logits(model.module, given), logits(model.module, given)
        close(once, wanted)
        assert torch.equal(once, twice) and not torch.allclose(once, plain, atol=1e-4)
    (one,) = place.values()
    width = model.module.get_submodule(PROJECTIONS[name].format("k")).weight.shape[0]
    assert one.n_kv_heads == (2 if width == 16 or name in ("gpt_oss", "gemma2") else 4), "before they are repeated"
    assert (fired[0].n_calls, fired[0].n_elements) == (2, 2 * 2 * 2 * width), "passes, sequences, keys and values"
    assert fired[0].change == 1.0


@pytest.mark.parametrize("variant", ["kv-bias", "sink-logit", "softmax-off-by-one", "head-norm", "gated-headwise"])
def test_attention_variants_get_the_changed_keys(variant: str) -> None:
    module = apply_variant(module_of("llama"), variant)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "massact_" in name:
                parameter.add_(0.3 * torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter))
    model = with_attention(ma.load(module))
    with by_hand(module, PROJECTIONS["llama"]):
        wanted = logits(module, inputs("llama"))
    plain = logits(module, inputs("llama"))
    with edited(model, KeyValueEdit("first", "2.attention", first_changed)):
        got = logits(module, inputs("llama"))
    close(got, wanted)
    assert not torch.allclose(got, plain, atol=1e-4)


def test_torchs_own_layer_gets_the_changed_keys() -> None:
    """It gives the kernel a key for each query head; half of every key is half of the rows that project it."""
    torch.manual_seed(0)
    net = _Own(False).eval()
    x = torch.randn(2, 9, 16)
    model = with_attention(ma.load(net, inputs={"src": x}))
    edit = KeyValueEdit("half", "2.attention", lambda k, v, b: (k * 0.5, v * 2))
    with torch.no_grad():
        with edited(model, edit) as fired:
            got = net(x)
        attention = net.layers[1].self_attn
        for parameter in (attention.in_proj_weight, attention.in_proj_bias):
            parameter[16:32] *= 0.5
            parameter[32:] *= 2
        close(got, net(x))
    assert (fired[0].n_calls, fired[0].n_elements) == (1, 2 * 2 * 9 * 16)


class Kept(PerSequence):
    def update(self, a: Attended, where: Where) -> None:
        self.rows[where.sequence] = a


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma2", "gpt_oss"])
def test_statistics_at_the_same_place_see_the_changed_keys(name: str) -> None:
    """Output, log-sum-exp and probabilities are of the new keys; an edit of the output comes behind them."""
    model, ran = model_of(name), []
    edits = (
        KeyValueEdit("keys", "2.attention", first_changed),
        AttentionEdit("out", "2.attention", lambda a: (ran.append(a), a.out_HTF * 2)[1]),  # type: ignore[operator]
    )
    with torch.no_grad(), observing(model, [Probe("kept", "2.attention", Kept)], edits) as seen:
        model.module(input_ids=IDS)
    (statistic,) = seen.statistics.values()
    for b, a in statistic.rows.items():  # type: ignore[attr-defined]
        _, p_HTS = a.dense()
        written = torch.matmul(p_HTS, a.values(torch.arange(a.v_KSF.shape[1])))
        close(written, a.out_HTF)
        assert not a.v_KSF[:, 0].any() and torch.equal(ran[b].out_HTF, a.out_HTF)
        if a.lse_HT is not None:
            heads = a.q_HTE.shape[0] // a.k_KSE.shape[0]
            s = torch.einsum("hte,hse->hts", a.q_HTE, a.k_KSE.repeat_interleave(heads, 0)) * a.scale
            close(a.lse_HT, s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf).logsumexp(-1))


def test_edits_apply_in_order_and_together() -> None:
    model = model_of("llama")

    def run(*edits: Any) -> Tensor:
        with untouched(model.module), edited(model, *edits) as fired:
            out = logits(model.module, inputs("llama"))
        assert all(one.n_elements > 0 for one in fired) and fired[0].n_calls == len(getattr(edits[0], "edits", [1]))
        return out

    double = KeyValueEdit("double", "2.attention", lambda k, v, b: (k * 2, v * 2))
    more = KeyValueEdit("more", "2.att*", lambda k, v, b: (k + 1, v - 1))
    both = KeyValueEdit("both", "2.attention", lambda k, v, b: (k * 2 + 1, v * 2 - 1))
    assert torch.equal(run(double, more), run(both)) and torch.equal(run(Together("t", (double, more))), run(both))
    assert not torch.equal(run(more, double), run(both))


def test_with_a_cache_every_step_is_that_of_a_pass_without_one() -> None:
    """The kernel gets the first key again at each step, as the model made it."""
    model, ids = model_of("llama"), IDS
    pasts: list[tuple[int, int]] = []

    def apply(k: Tensor, v: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        pasts.append((batch.past, k.shape[2]))
        return first_changed(k, v, batch)

    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 98,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    with edited(model, KeyValueEdit("first", "2.attention", apply)) as fired:
        got = model.module.generate(IDS, **options)
    assert pasts == [(0, 9), (9, 10), (10, 11), (11, 12)][: fired[0].n_calls]
    for step in got.logits:
        with by_hand(model.module, PROJECTIONS["llama"]):
            wanted = logits(model.module, {"input_ids": ids})[:, -1]
        close(step, wanted)
        ids = torch.cat([ids, wanted.argmax(-1, keepdim=True)], 1)


def test_keys_of_another_sequence_are_those_of_cross_attention() -> None:
    model, shapes = model_of("t5"), []

    def apply(k: Tensor, v: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(k.shape))
        return k * 0.5, v

    with edited(model, KeyValueEdit("half", "decoder/1.cross_attention", apply)) as fired:
        logits(model.module, inputs("t5"))
    assert shapes == [(2, 4, 9, 8)] and fired[0].n_elements == 2 * 4 * 9 * 8


@pytest.mark.parametrize("name", ["bloom", "mpt", "gptj"])
def test_keys_of_attention_that_is_written_out_are_refused(name: str) -> None:
    model = model_of(name)
    with untouched(model.module), pytest.raises(UserError) as refused, edited(
        model, KeyValueEdit("first", "*.attention", first_changed)
    ):  # fmt: skip
        raise AssertionError("the body must not run")
    assert str(Site("", 1, "attention")) in refused.value.what and "softmax" in str(refused.value)


def test_what_changes_nothing_is_no_place_or_has_another_shape_is_an_error() -> None:
    model = model_of("llama")
    with pytest.raises(UserError, match="9.attention"), edited(model, KeyValueEdit("x", "9.attention", first_changed)):
        raise AssertionError("the body must not run")
    with pytest.raises(UserError, match="with_attention"), edited(
        ma.load(module_of("llama")), KeyValueEdit("x", "*.attention", first_changed)
    ):  # fmt: skip
        raise AssertionError("the body must not run")
    for apply, match in (
        (lambda k, v, b: (k, v), "changed nothing"), (lambda k, v, b: (k[:, :, 1:], v), "gave shape"),
    ):  # fmt: skip
        with untouched(model.module), pytest.raises(WorkError, match=match), edited(
            model, KeyValueEdit("x", "1.attention", apply), Edit("y", "1.resid_post", lambda h, b: h * 2)
        ):  # fmt: skip
            logits(model.module, inputs("llama"))
