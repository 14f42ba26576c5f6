"""Edits by name: each against the same change written out by hand, on tiny models; and names that stand for nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import massact as ma
from massact.interventions import Massive, evaluate, intervene
from massact.interventions.edit_names import EDITS, Setting, check_name, edit_named
from massact.models import Model, with_attention
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.trace import edited
from tests.families import build
from tests.interventions.test_paired import planted

D, DIMS = 32, (3, 17)
MEANS = {"start": (0.7, -0.4), "delimiter": (-0.9, 0.3), "other": (-0.9, 0.3)}
POOLS = {
    "start": ((1.1,), (-1.2,)),
    "delimiter": ((-1.3,), (1.4,)),
    "other": ((-1.3,), (1.4,)),
}  # one value each: what a shuffle draws is known


def ids(n: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def blocks(module: Any) -> nn.ModuleList:
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


@contextmanager
def rewritten(module: nn.Module, layer: int, change: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    """By hand: what a block gives is changed by a function of a NumPy array."""

    def hook(m: nn.Module, args: tuple, out: Any) -> Any:
        first = out if isinstance(out, Tensor) else out[0]
        new = torch.from_numpy(change(first.numpy().copy()))
        return new if isinstance(out, Tensor) else (new, *out[1:])

    handle = blocks(module)[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits(module: nn.Module, tokens: Tensor, **more: Tensor) -> Tensor:
    return module(input_ids=tokens, **more).logits


@torch.no_grad()
def under(model: Model, name: str, targets: tuple[Massive, ...], tokens: Tensor, **more: Tensor) -> Tensor:
    """The logits under an edit by name; on leaving, every weight is what it was."""
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with edited(model, edit_named(name, Setting(model, targets))):
        found = logits(model.module, tokens, **more)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    return found


def target(module: nn.Module, tokens: Tensor, layer: int = 2) -> Massive:
    """Two dims; about a third of the tokens exceed the cut of each."""
    with torch.no_grad():
        h = module(input_ids=tokens, output_hidden_states=True).hidden_states[layer]
    cuts = tuple(float(h[..., d].abs().flatten().quantile(0.67)) for d in DIMS)
    return Massive(Site("", layer, "resid_post"), DIMS, cuts, MEANS, POOLS)


def entries(known: Massive, value: Callable[[float, int, bool], float]) -> Callable[[np.ndarray], np.ndarray]:
    """`value(old, index of the dim, whether the token is the first)` wherever the cut is reached."""

    def change(h: np.ndarray) -> np.ndarray:
        for b, t in np.ndindex(h.shape[:2]):
            for j, (dim, cut) in enumerate(zip(known.dims, known.cuts, strict=True)):
                if abs(h[b, t, dim]) >= cut:
                    h[b, t, dim] = value(float(h[b, t, dim]), j, t == 0)
        return h

    return change


def control(known: Massive) -> Callable[[np.ndarray], np.ndarray]:
    """As many entries of other dims, nearest to the median magnitude, to zero."""

    def change(h: np.ndarray) -> np.ndarray:
        for row in h:
            magnitude = np.abs(row)
            count = sum(int((magnitude[:, d] >= c).sum()) for d, c in zip(known.dims, known.cuts, strict=True))
            off = np.abs(magnitude - np.sort(magnitude.ravel())[(magnitude.size - 1) // 2])
            off[:, list(known.dims)] = np.inf
            row.ravel()[np.argsort(off.ravel(), kind="stable")[:count]] = 0
        return h

    return change


def whole(*dims: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(h: np.ndarray) -> np.ndarray:
        for d in dims:
            h[:, :, d] = 0
        return h

    return change


def pick(table: dict[str, Any]) -> Callable[[float, int, bool], float]:
    return lambda old, j, start: float(np.ravel(table["start" if start else "other"][j])[0])


# name in EDITS -> how it is written, and the same by hand
HIDDEN: dict[str, tuple[str, Callable[[Massive], Callable[[np.ndarray], np.ndarray]]]] = {
    "zero": ("zero", lambda t: entries(t, lambda old, j, start: 0.0)),
    "mean": ("mean", lambda t: entries(t, pick(MEANS))),
    "random": ("random", control),
    "shuffle": ("shuffle", lambda t: entries(t, pick(POOLS))),
    "scale=F": ("scale=-1.5", lambda t: entries(t, lambda old, j, start: -1.5 * old)),
    "clip=C": ("clip=0.01", lambda t: entries(t, lambda old, j, start: float(np.clip(old, -0.01, 0.01)))),
    "value=V": ("value=2.5", lambda t: entries(t, lambda old, j, start: 2.5)),
    "dims": ("dims", lambda t: whole(*t.dims)),
    "dims=3+17": ("dims=5+30", lambda t: whole(5, 30)),
}
OTHERS = {"drop-first=N", "replace-first=TOKEN", "cut-first", "cut=0+5", "norm-dims", "weight=NAME[R,C]",
          "keep-weight=NAME[R,C]", "registers=HOW"}  # fmt: skip  # the last: tests/interventions/test_registers.py


def test_every_name_is_tested_here() -> None:
    assert set(HIDDEN) | OTHERS == set(EDITS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", HIDDEN)
def test_edits_of_the_hidden_state(family: str, name: str) -> None:
    module = build(family)
    model, tokens = ma.load(module), ids()
    written, by_hand = HIDDEN[name]
    known = target(module, tokens)
    got = under(model, written, (known,), tokens)
    with rewritten(module, 2, by_hand(known)):
        wanted = logits(module, tokens)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert (got - logits(module, tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["zero", "random", "scale=F", "dims", "dims=3+17"])
def test_several_layers_are_one_edit(name: str) -> None:
    """What is massive at the later layer is looked for in the stream that the earlier edit has left."""
    module = build("llama")
    model, tokens = ma.load(module), ids()
    written, by_hand = HIDDEN[name]
    first, second = target(module, tokens, 1), target(module, tokens, 2)
    assert edit_named(written, Setting(model, (first, second))).name == f"{written}, 2 layers"
    got = under(model, written, (first, second), tokens)
    with rewritten(module, 1, by_hand(first)), rewritten(module, 2, by_hand(second)):
        wanted = logits(module, tokens)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert (got - under(model, written, (second,), tokens)).abs().max() > 1e-5


def test_intervene_takes_several_layers() -> None:
    """`layer=(2, 3)` in any order; a spike that stays is gone from both, but not from layer 1."""
    model, scan, tokens = planted(read=True)
    done = intervene(model, tokens, scan, layer=(3, 2, 3), sets=("dims", "zero"), repetition=False, sinks=False)
    assert list(dict.fromkeys(done.effects.edit)) == ["dims, 2 layers", "zero, 2 layers"]
    assert done.info.target["layers"] == [2, 3] and set(done.effects.layer) == {2}
    late = tokens[6:]
    with rewritten(model.module, 2, whole(7)), rewritten(model.module, 3, whole(7)):
        wanted = nn.functional.cross_entropy(logits(model.module, late)[:, :-1].transpose(1, 2), late[:, 1:])
    told = done.effects[done.effects.metric == "nll"].set_index("edit").edited
    assert told["dims, 2 layers"] == pytest.approx(float(wanted), rel=1e-5)
    calls = done.effects[done.effects.metric == "nll"].set_index("edit").n_calls
    assert calls.to_dict() == {"dims, 2 layers": 12, "zero, 2 layers": 12}


# ---------------------------------------------------------------------------------------------- the first token
@pytest.mark.parametrize(("name", "n"), [("drop-first", 1), ("drop-first=1", 1), ("drop-first=3", 3)])
def test_first_tokens_are_cut_off(name: str, n: int) -> None:
    module, tokens = build("gpt2"), ids()
    got = under(ma.load(module), name, (), tokens)
    assert torch.equal(got, logits(module, tokens[:, n:]))


def padded() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Ids, mask and lengths of three rows with padding at the left."""
    tokens, lengths = ids(), [12, 7, 9]
    mask = torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return tokens, mask, lengths


@pytest.mark.parametrize("n", [1, 2])
def test_behind_padding_every_row_loses_its_own_first_tokens(n: int) -> None:
    module, (tokens, mask, lengths) = build("llama"), padded()
    got = under(ma.load(module), f"drop-first={n}", (), tokens, attention_mask=mask)
    assert got.shape[1] == 12 - n
    for row, length in enumerate(lengths):
        alone = logits(module, tokens[row : row + 1, 12 - length + n :])[0]
        np.testing.assert_allclose(got[row, n - length :], alone, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["drop-first=2", "replace-first=55", "cut-first"])
def test_what_is_generated_behind_a_cache_is_what_is_without_one(family: str, left: bool, name: str) -> None:
    """The first tokens are changed once: later steps see one new token each, which is none of them."""
    module, (tokens, mask, _) = build(family), padded()
    model = with_attention(ma.load(module))
    given = {"attention_mask": mask if left else torch.ones_like(mask), "do_sample": False, "max_new_tokens": 6,
             "min_new_tokens": 6, "pad_token_id": 0}  # fmt: skip
    with edited(model, edit_named(name, Setting(model, ()))), torch.no_grad():
        cached = module.generate(tokens, use_cache=True, **given)
        whole = module.generate(tokens, use_cache=False, **given)
    assert torch.equal(cached, whole)
    if name == "cut-first":
        return
    changed, at = tokens.clone(), mask.argmax(1) if left else torch.zeros(3, dtype=torch.long)
    rows = torch.arange(3)
    if name == "replace-first=55":
        changed[rows, at] = 55
    else:
        keep = torch.arange(10)[None] + 2 * (torch.arange(10)[None] >= at[:, None])
        changed, given["attention_mask"] = changed.gather(1, keep), given["attention_mask"].gather(1, keep)
    with torch.no_grad():
        by_hand = module.generate(changed, use_cache=True, **given)
    assert torch.equal(cached[:, -6:], by_hand[:, -6:])


@pytest.mark.parametrize("name", ["drop-first=2", "cut-first", "cut=0+3", "replace-first=55"])
def test_padding_changes_no_effect(name: str) -> None:
    """Of a corpus with padding at the left every sequence has the numbers that it has alone."""
    model, (tokens, mask, lengths) = with_attention(ma.load(build("llama"))), padded()
    edit = edit_named(name, Setting(model, ()))
    together = evaluate(model, ma.corpus({"input_ids": tokens, "attention_mask": mask}), [edit], batch_size=3)
    for row, length in enumerate(lengths):
        alone = evaluate(model, ma.corpus(tokens[row : row + 1, 12 - length :]), [edit])
        for metric, value in alone.edited[edit.name].items():
            assert together.edited[edit.name][metric][row] == pytest.approx(value[0], abs=2e-5), metric
        assert alone.edited[edit.name]["kl"][0] > 1e-6


def test_padding_at_the_right_is_no_reason_to_hide() -> None:
    module, tokens = build("llama"), ids()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 8:] = 0
    got = under(ma.load(module), "drop-first=2", (), tokens, attention_mask=mask)
    assert torch.equal(got, logits(module, tokens[:, 2:], attention_mask=mask[:, 2:]))


def words() -> PreTrainedTokenizerFast:
    """Letters, digits and a newline, each a token; and one word."""
    pieces = ["\n", *"0123456789", *"abcdefghijklmnopqrstuvwxyz", "bo", "boa", "boat"]
    merges = [("b", "o"), ("bo", "a"), ("boa", "t")]
    known = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(known))


@pytest.mark.parametrize(("text", "id_"), [("boat", 39), ("\\n", 0), ("z", 36), ("55", 55), ("7", 8)])
def test_another_first_token(text: str, id_: int) -> None:
    """By its text, or by its id where the number is no token itself."""
    module, tokens = build("gpt2"), ids()
    changed = tokens.clone()
    changed[:, 0] = id_
    got = under(ma.load(module, tokenizer=words()), f"replace-first={text}", (), tokens)
    assert torch.equal(got, logits(module, changed))


def test_a_first_token_by_id_without_a_tokenizer_and_behind_padding() -> None:
    module, tokens = build("llama"), ids()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    changed = tokens.clone()
    changed[[0, 2], 0], changed[1, 5] = 55, 55
    got = under(ma.load(module), "replace-first=55", (), tokens, attention_mask=mask)
    assert torch.equal(got, logits(module, changed, attention_mask=mask))


@pytest.mark.parametrize("name", ["replace-first=99", "replace-first=boat", "replace-first=-1", "replace-first=1.5"])
def test_what_is_no_token(name: str) -> None:
    """One past the vocabulary; a text without a tokenizer; no whole number."""
    with pytest.raises(UserError, match="not one token"):
        edit_named(name, Setting(ma.load(build("gpt2")), ()))


# ------------------------------------------------------------------------------------------------------ attention
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("name", "hidden"), [("cut-first", [0]), ("cut=0", [0]), ("cut=2+5", [2, 5])])
def test_positions_that_nobody_sees(family: str, name: str, hidden: list[int]) -> None:
    """An eager copy with a mask that hides these keys. A query that sees nothing else (0) gets zero."""
    module, tokens = build(family), ids()
    got = under(with_attention(ma.load(module)), name, (), tokens)
    eager = type(module)._from_config(copy.deepcopy(module.config), attn_implementation="eager").eval()
    eager.load_state_dict(module.state_dict())
    mask = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)
    mask[:, hidden] = torch.finfo(torch.float32).min

    def nothing(m: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[:, 0] = 0
        return (x, *args[1:])

    if 0 in hidden:
        for block in blocks(eager):
            attention = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
            attention.register_forward_pre_hook(nothing)
    wanted = logits(eager, tokens, attention_mask=mask.expand(3, 1, 12, 12))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert (got - logits(module, tokens))[:, 6:].abs().max() > 1e-5


# -------------------------------------------------------------------------------------------------------- weights
NORMS = {
    "gpt2": [f"transformer.h.{i}.{n}.{p}" for i in range(3) for n in ("ln_1", "ln_2") for p in ("weight", "bias")],
    "llama": [f"model.layers.{i}.{n}.weight" for i in range(3)
              for n in ("input_layernorm", "post_attention_layernorm")],
    "bert": [f"bert.encoder.layer.{i}.{n}.LayerNorm.{p}" for i in range(3) for n in ("attention.output", "output")
             for p in ("weight", "bias")],
}  # fmt: skip


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_zero_at_the_massive_dims_and_nothing_else_is(family: str) -> None:
    """Of all layers that are edited the dims; of the norms those inside the blocks."""
    module = build(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # scales of one and biases of zero would hide a mistake
        for name in NORMS[family]:
            module.get_parameter(name).copy_(1 + torch.rand(D, generator=generator))
    model, before = ma.load(module), {k: v.clone() for k, v in module.state_dict().items()}
    two = tuple(Massive(Site("", n, "resid_post"), d, (1.0,), MEANS, POOLS) for n, d in ((1, (3,)), (2, (17,))))
    plain = logits(module, ids())
    with edited(model, edit_named("norm-dims", Setting(model, two))) as (fired,):
        now = {k: v.clone() for k, v in module.state_dict().items()}
        changed = logits(module, ids())
    assert {k for k in now if not torch.equal(now[k], before[k])} == set(NORMS[family])
    for name in NORMS[family]:
        wanted = before[name].clone()
        wanted[[3, 17]] = 0
        assert torch.equal(now[name], wanted)
    assert fired.n_elements == 2 * len(NORMS[family]) and (changed - plain).abs().max() > 1e-4
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_shared_norms_are_changed_once() -> None:
    model = ma.load(build("albert"))
    known = Massive(Site("", 1, "resid_post"), DIMS, (1.0, 1.0), MEANS, POOLS)
    edit = edit_named("norm-dims", Setting(model, (known,)))
    names = [e.parameter for e in edit.edits]  # type: ignore[union-attr]
    assert len(names) == len(set(names)) == 4


@pytest.mark.parametrize(("word", "keep"), [("weight", False), ("keep-weight", True)])
@pytest.mark.parametrize("comma", [",", ", "])
def test_one_weight_or_all_others(word: str, keep: bool, comma: str) -> None:
    module, tokens = build("llama"), ids()
    parameter = "model.layers.1.mlp.down_proj.weight"
    got = under(ma.load(module), f"{word}={parameter}[7{comma}41]", (), tokens)
    by_hand = copy.deepcopy(module)
    with torch.no_grad():
        weight = by_hand.get_parameter(parameter)
        value = float(weight[7, 41])
        weight[7, 41] = 0
        if keep:
            weight.zero_()
            weight[7, 41] = value
    assert torch.equal(got, logits(by_hand, tokens)) and not torch.equal(got, logits(module, tokens))


@pytest.mark.parametrize(("name", "says"), [
    ("weight=no.such.weight[1,2]", "no.such.weight"), ("weight=model.norm.weight[1,2]", "shape"),
    ("weight=model.layers.1.mlp.down_proj.weight[32,0]", "shape"),
    ("keep-weight=model.layers.1.mlp.down_proj.weight[0,56]", "shape"),
])  # fmt: skip
def test_weights_that_are_none(name: str, says: str) -> None:
    model = ma.load(build("llama"))
    with pytest.raises(UserError, match=says), edited(model, edit_named(name, Setting(model, ()))):
        pass


# ---------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(("name", "says"), [
    ("zeroo", "Unknown edit 'zeroo'"), ("zero=1", "Unknown edit 'zero=1'"), ("", "Unknown edit ''"),
    ("norm-dims=3", "Unknown edit"), ("cut-first=2", "Unknown edit"), ("Zero", "Unknown edit"),
    ("scale", "needs a number"), ("scale=", "needs a number"), ("clip=x", "needs a number"), ("value", "a number"),
    ("dims=", "whole numbers"), ("dims=3,17", "whole numbers"), ("dims=-1", "whole numbers"), ("cut", "whole numbers"),
    ("cut=", "whole numbers"), ("cut=1.5", "whole numbers"), ("drop-first=", "whole numbers"),
    ("drop-first=x", "whole numbers"), ("replace-first", "needs a value"), ("replace-first=", "needs a value"),
    ("weight", "needs a value"), ("keep-weight=", "needs a value"), ("weight=a.weight", "names no weight"),
    ("weight=a.weight[1]", "names no weight"), ("keep-weight=[1,2]", "names no weight"),
    ("weight=a.weight[-1,2]", "names no weight"),
])  # fmt: skip
def test_names_that_stand_for_nothing(name: str, says: str) -> None:
    """Refused before anything is loaded, by `check_name`, and again where the edit is made."""
    with pytest.raises(UserError, match=says):
        check_name(name)
    with pytest.raises(UserError, match=says):
        edit_named(name, Setting(ma.load(build("gpt2")), ()))


def test_a_near_name_is_offered() -> None:
    with pytest.raises(UserError, match="norm-dims"):
        check_name("norm-dim")


@pytest.mark.parametrize("name", [
    "cut=99",
])  # fmt: skip
def test_an_edit_of_nothing_is_an_error(name: str) -> None:
    with pytest.raises(WorkError, match="changed nothing"):
        under(with_attention(ma.load(build("gpt2"))), name, (), ids())
