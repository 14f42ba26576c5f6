"""edited(): what a live model gives under edits is what a hand-written change gives, and afterwards nothing is left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import massact as ma
from massact.corpora import Batch
from massact.interventions import cut_attention, drop_first, norm_dims, replace_first, zero_dims
from massact.interventions.massive_entries import starts
from massact.models import Model, with_attention
from massact.records.errors import UserError, WorkError
from massact.trace import AttentionEdit, Edit, InputEdit, WeightEdit, edited
from tests.families import build

# name -> where its blocks are; the first stack of T5. All layers of ALBERT are one module.
BLOCKS = {
    "gpt2": "transformer.h.{}", "llama": "model.layers.{}", "bert": "bert.encoder.layer.{}",
    "albert": "albert.encoder.albert_layer_groups.0", "t5": "encoder.block.{}", "gpt_oss": "model.layers.{}",
    "bloom": "transformer.h.{}", "falcon": "transformer.h.{}",
}  # fmt: skip
IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
DIMS = [3, 17]


def module_of(name: str) -> nn.Module:
    """Larger matrices than a family begins with: random attention is so even that cutting it would prove little."""
    module = build(name)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2 and name != "t5":
                parameter.mul_(3)
    return module


@cache
def model_of(name: str) -> Model:
    return with_attention(ma.load(module_of(name)))


def inputs(name: str) -> dict[str, Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :6]} if name == "t5" else {})


def logits(module: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return module(**given).logits


def close(a: Tensor, b: Tensor) -> None:
    """Equal to 1e-5 of the greatest value."""
    assert a.shape == b.shape and torch.isfinite(b).all()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


@contextmanager
def hooked(name: str, module: nn.Module, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A forward hook on one block, written by hand."""
    calls = [0]
    wanted = layer - 1 if name == "albert" else 0

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        calls[0] += 1
        if calls[0] - 1 != wanted:
            return None
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.get_submodule(BLOCKS[name].format(layer - 1)).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Parameters bit for bit as before; no hook, no function mode, no patched forward, no attention function left."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    functions = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    yield
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    for part in module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
    assert not _get_current_function_mode_stack() and ALL_ATTENTION_FUNCTIONS._local_mapping == functions
    assert all(parameter.requires_grad for parameter in module.parameters())


def site(name: str, layer: int) -> str:
    return f"encoder/{layer}.resid_post" if name == "t5" else f"{layer}.resid_post"


def zeroed(h: Tensor) -> Tensor:
    h = h.clone()
    h[..., DIMS] = 0
    return h


# ------------------------------------------------------------------------------------------ one edit, each family
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_zeroed_dims_are_those_of_a_hand_written_hook(name: str, layer: int) -> None:
    """Two forward passes in a row both fire: the counters of calls start again (shared layers included)."""
    model, given = model_of(name), inputs(name)
    with hooked(name, model.module, layer, zeroed):
        wanted = logits(model.module, given)
    plain = logits(model.module, given)
    with untouched(model.module):
        with edited(model, zero_dims(DIMS, site(name, layer))) as fired:
            once, twice = logits(model.module, given), logits(model.module, given)
        assert torch.equal(once, wanted) and torch.equal(twice, wanted) and not torch.equal(once, plain)
        assert (fired[0].n_calls, fired[0].n_elements) == (2, 2 * IDS.numel() * len(DIMS))
    assert torch.equal(logits(model.module, given), plain)


@pytest.mark.parametrize("name", BLOCKS)
def test_cut_attention_is_eager_attention_without_that_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column 0 of the logits at -inf before the softmax; a query that sees nothing else gives zero."""
    model, given = model_of(name), inputs(name)
    plain = logits(model.module, given)
    with untouched(model.module), edited(model, cut_attention([0], "*attention")) as fired:
        got = logits(model.module, given)
    assert fired[0].n_calls == len(model.anatomy.attentions)

    config, softmax, n_cut = copy.deepcopy(model.module.config), F.softmax, []
    config._attn_implementation = "eager"
    naive = type(model.module)(config).eval()
    naive.load_state_dict(model.module.state_dict())

    def without_first(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.ndim == 4:
            scores = scores.masked_fill(scores < -1e30, -torch.inf)  # what a mask hides by the least float
            scores[..., 0] = -torch.inf
            n_cut.append(1)
        return softmax(scores, *args, **kwargs).nan_to_num(0.0)

    monkeypatch.setattr(F, "softmax", without_first)
    wanted = logits(naive, given)
    assert len(n_cut) == len(model.anatomy.attentions)
    close(got, wanted)
    assert float((got - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bloom"])
def test_several_keys_may_be_cut_at_one_layer(name: str) -> None:
    """Every query that sees only the keys that were cut gives zero: what it adds is the projection's bias, or 0."""
    model, seen = model_of(name), []
    with edited(model, cut_attention([0, 1, 50], "2.attention"), Edit("look", "2.attn_out", lambda h, b: (
        seen.append(h.clone()), h + 1)[1])):  # fmt: skip
        logits(model.module, inputs(name))
    nothing = seen[0][:, :2]
    assert torch.allclose(nothing, nothing[0, 0].expand_as(nothing), atol=1e-6) and seen[0][:, 2:].std() > 1e-4
    assert name != "llama" or nothing.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama", "albert", "bloom"])
def test_weights_are_changed_and_come_back(name: str) -> None:
    model, given = model_of(name), inputs(name)
    parameter = next(n for n, p in model.module.named_parameters() if p.shape == (32,) and "weight" in n)
    other = module_of(name)
    with torch.no_grad():
        other.get_parameter(parameter)[DIMS] = 0
    with untouched(model.module):
        with edited(model, norm_dims(parameter, DIMS)) as fired:
            assert torch.equal(logits(model.module, given), logits(other, given))
            assert (model.module.get_parameter(parameter)[DIMS] == 0).all()
        assert (fired[0].n_calls, fired[0].n_elements) == (1, len(DIMS))


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bloom"])
def test_inputs_are_changed_before_the_model_sees_them(name: str, positional: bool) -> None:
    model = model_of(name)
    mask = torch.ones_like(IDS)

    def run() -> Tensor:
        with torch.no_grad():
            if not positional:
                return model.module(input_ids=IDS, attention_mask=mask).logits
            return (model.module(IDS, mask) if name in ("llama", "bert") else model.module(IDS)).logits

    replaced = IDS.clone()
    replaced[:, 0] = 4
    with untouched(model.module):
        with edited(model, drop_first()) as fired:
            dropped = run()
            again = logits(model.module, {"input_ids": IDS[:, 1:], "attention_mask": mask[:, 1:]})
        assert fired[0].n_calls == 2 and again.shape[1] == IDS.shape[1] - 2, "every pass loses its first token"
        close(dropped, logits(model.module, {"input_ids": IDS[:, 1:]}))
        with edited(model, replace_first(4)) as fired:
            got = run()
        close(got, logits(model.module, {"input_ids": replaced}))
        assert fired[0].n_elements == int((IDS[:, 0] != 4).sum())
    assert int(IDS[0, 0]) != 4, "the caller's tensor is not written into"


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "albert", "bloom"])
def test_the_base_alone_is_edited_too(name: str) -> None:
    model = model_of(name)
    base = model.module.base_model
    with torch.no_grad(), hooked(name, model.module, 2, zeroed):
        wanted = base(input_ids=IDS).last_hidden_state
    with torch.no_grad(), edited(model, zero_dims(DIMS, site(name, 2))) as fired:
        assert torch.equal(base(input_ids=IDS).last_hidden_state, wanted)
        assert torch.equal(base(input_ids=IDS).last_hidden_state, wanted)
    assert fired[0].n_calls == 2
    with torch.no_grad(), edited(model, drop_first()) as fired:
        assert base(input_ids=IDS).last_hidden_state.shape[1] == IDS.shape[1] - 1
        assert model.module(input_ids=IDS).logits.shape[1] == IDS.shape[1] - 1, "once, not once for each root"
    assert fired[0].n_calls == 2


# --------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
def test_generation_with_a_cache(name: str) -> None:
    """The first position is edited in the first step only; later steps know how much the cache holds."""
    model = model_of(name)
    pasts: list[tuple[int, int, int, int]] = []

    def apply(h: Tensor, batch: Batch) -> Tensor:
        at = starts(h, batch)
        pasts.append((batch.past, h.shape[1], int(at.sum()), len(batch.sequences)))
        return torch.where(at[..., None], -2.0 * h, h)

    def first(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, 0] *= -2.0
        return h

    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 98,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    plain = model.module.generate(IDS, **options)
    with untouched(model.module), edited(model, Edit("first", site(name, 1), apply)) as fired:
        got = model.module.generate(IDS, **options)
    assert pasts == [(0, 9, 2, 2), *((n, 1, 0, 2) for n in range(9, 9 + fired[0].n_calls - 1))]
    assert fired[0].n_calls == len(got.logits)
    # Without a cache every step reads all positions, and the hook changes the first of them each time.
    ids = IDS
    for step in got.logits:
        with hooked(name, model.module, 1, first):
            wanted = logits(model.module, {"input_ids": ids})[:, -1]
        close(step, wanted)
        ids = torch.cat([ids, wanted.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got.sequences, ids)
    assert not torch.allclose(got.logits[-1], plain.logits[-1], atol=1e-3)


# --------------------------------------------------------------------------------------------------- order
def test_hidden_edits_at_one_place_apply_in_order() -> None:
    model = model_of("llama")
    double, more = (Edit("double", "2.resid_post", lambda h, b: h * 2), Edit("more", "2.*post", lambda h, b: h + 1))
    for edits, change in (((double, more), lambda h: h * 2 + 1), ((more, double), lambda h: (h + 1) * 2)):
        with hooked("llama", model.module, 2, change):
            wanted = logits(model.module, inputs("llama"))
        with edited(model, *edits):
            assert torch.equal(logits(model.module, inputs("llama")), wanted)


def test_weight_edits_at_one_parameter_apply_in_order() -> None:
    model, name = model_of("llama"), "model.layers.1.mlp.down_proj.weight"
    kept = model.module.get_parameter(name).detach().clone()
    double, more = WeightEdit("double", name, lambda w: w * 2), WeightEdit("more", name, lambda w: w + 1)
    with untouched(model.module):
        with edited(model, double, more):
            assert torch.equal(model.module.get_parameter(name), kept * 2 + 1)
        with edited(model, more, double):
            assert torch.equal(model.module.get_parameter(name), (kept + 1) * 2)


def test_input_edits_apply_in_order() -> None:
    model, replaced = model_of("llama"), IDS.clone()
    replaced[:, 1] = 4
    with edited(model, drop_first(), replace_first(4)):
        got = logits(model.module, {"input_ids": IDS})
    assert torch.equal(got, logits(model.module, {"input_ids": replaced[:, 1:]}))
    with pytest.raises(WorkError, match="changed nothing"), edited(model, replace_first(4), replace_first(4)):
        logits(model.module, {"input_ids": IDS})


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bloom"])
def test_attention_edits_at_one_place_apply_in_order(name: str) -> None:
    model = model_of(name)

    def run(*edits: AttentionEdit) -> Tensor:
        with edited(model, *edits) as fired:
            out = logits(model.module, inputs(name))
        assert all(f.n_elements > 0 for f in fired)
        return out

    double = AttentionEdit("double", "2.attention", lambda a: a.out_HTF * 2)  # type: ignore[operator]
    more = AttentionEdit("more", "2.att*", lambda a: a.out_HTF + 1)  # type: ignore[operator]
    first = AttentionEdit("both", "2.attention", lambda a: a.out_HTF * 2 + 1)  # type: ignore[operator]
    second = AttentionEdit("both", "2.attention", lambda a: (a.out_HTF + 1) * 2)  # type: ignore[operator]
    assert torch.equal(run(double, more), run(first)) and torch.equal(run(more, double), run(second))
    assert not torch.equal(run(first), run(second))


def test_edits_of_all_kinds_together() -> None:
    model, given = model_of("gpt2"), inputs("gpt2")
    with untouched(model.module), edited(
        model, zero_dims(DIMS, "1.resid_post"), norm_dims("transformer.ln_f.weight", [0]), replace_first(4),
        cut_attention([0], "3.attention"),
    ) as fired:  # fmt: skip
        logits(model.module, given)
    assert [f.n_calls for f in fired] == [1, 1, 1, 1] and all(f.n_elements > 0 for f in fired)


# ------------------------------------------------------------------------------------------------------ refusals
KINDS = {
    "hidden": lambda: zero_dims(DIMS, "1.resid_post"), "weight": lambda: norm_dims("model.norm.weight", DIMS),
    "input": lambda: replace_first(4), "attention": lambda: cut_attention([0]),
}  # fmt: skip
NOTHING = {
    "hidden": Edit("x", "1.resid_post", lambda h, b: h.clone()), "input": InputEdit("x", lambda given: given),
    "weight": WeightEdit("x", "model.norm.weight", lambda w: w),
    "attention": AttentionEdit("x", "*.attention", lambda a: a.out_HTF),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_when_the_body_or_the_model_raises(kind: str) -> None:
    """The error of the body comes out as it is, not one about an edit that did not fire."""
    model = model_of("llama")
    plain = logits(model.module, inputs("llama"))
    with untouched(model.module), pytest.raises(ZeroDivisionError), edited(model, KINDS[kind]()):
        logits(model.module, inputs("llama"))
        raise ZeroDivisionError
    with untouched(model.module), pytest.raises(IndexError), edited(model, KINDS[kind]()):
        logits(model.module, {"input_ids": IDS + 1000})
    with edited(model, KINDS[kind]()) as fired:  # a failed pass does not spoil the next
        with pytest.raises(IndexError):
            logits(model.module, {"input_ids": IDS + 1000})
        got = logits(model.module, inputs("llama"))
    with edited(model, KINDS[kind]()):
        assert torch.equal(logits(model.module, inputs("llama")), got)
    assert fired[0].n_elements > 0 and torch.equal(logits(model.module, inputs("llama")), plain)


@pytest.mark.parametrize("kind", NOTHING)
def test_edits_that_change_nothing_are_errors(kind: str) -> None:
    model = model_of("llama")
    with untouched(model.module), pytest.raises(WorkError, match="'x' changed nothing"), edited(model, NOTHING[kind]):
        logits(model.module, inputs("llama"))


@pytest.mark.parametrize("kind", ["hidden", "input", "attention"])
def test_edits_that_do_not_fire_are_errors(kind: str) -> None:
    model = model_of("llama")
    with untouched(model.module), pytest.raises(WorkError, match="0 calls"), edited(model, KINDS[kind]()):
        pass


@pytest.mark.parametrize(("edit", "says"), [
    (zero_dims([0], "1.resid_pots"), "resid_post"), (zero_dims([0], "9.resid_post"), "9.resid_post"),
    (norm_dims("model.nrom.weight", [0]), "model.norm.weight"), (cut_attention([0], "9.attention"), "9.attention"),
])  # fmt: skip
def test_what_names_no_place_is_an_error(edit: Any, says: str) -> None:
    model = model_of("llama")
    with untouched(model.module), pytest.raises(UserError) as refused, edited(model, replace_first(4), edit):
        raise AssertionError("the body must not run")
    assert says in str(refused.value)


def test_attention_must_have_been_looked_for() -> None:
    with pytest.raises(UserError, match="with_attention"), edited(ma.load(build("gpt2")), cut_attention([0])):
        pass


def test_another_shape_is_an_error() -> None:
    model = model_of("llama")
    cut = Edit("cut", "1.resid_post", lambda h, b: h[:, 1:])
    with untouched(model.module), pytest.raises(WorkError, match="'cut' gave shape"), edited(model, cut):
        logits(model.module, inputs("llama"))
