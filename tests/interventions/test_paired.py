"""Paired effects: the numbers against a naive computation, planted models whose answer is known, the shared prefix."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.interventions import evaluate, intervene, massive, zero
from massact.interventions.catalogue import super_weights, zero_dims
from massact.interventions.effects import Paired, effects_of, told_apart
from massact.interventions.watchers import Whole
from massact.models import Model
from massact.records.errors import UserError, WorkError
from massact.records.kinds.scan import ScanResult
from massact.reports import effects_in_words, verdict
from massact.trace import Edit, WeightEdit
from tests.facts import each
from tests.families import build

OFF = {"null": False, "bos_contrast": False}


def tokens(n: int = 12, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(1, 90, (n, length), generator=torch.Generator().manual_seed(seed))


def naive(module: torch.nn.Module, ids: Tensor) -> np.ndarray:
    """log p (T, V) of one sequence, float64."""
    with torch.no_grad():
        return module(ids[None]).logits[0].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gpt_oss", "falcon"])
def test_losses_and_divergences_are_those_of_the_logits(name: str) -> None:
    """nll, KL and agreement of an edit at layer 2 equal those of a model edited by a hand-written hook."""
    module, ids = build(name), tokens(3)
    model = ma.load(module)
    edit = Edit("plus", "2.resid_post", lambda h, batch: h + 0.5 * torch.arange(h.shape[-1]) / h.shape[-1])
    paired = evaluate(model, ma.corpus(ids), [edit], batch_size=2)
    place = model.anatomy.select("2.resid_post")
    (where,) = place.values()
    calls = {"n": 0}

    def hook(m: torch.nn.Module, args: tuple, out: object) -> object:
        calls["n"] += 1
        if calls["n"] - 1 != where.call:
            return None
        first = out if isinstance(out, Tensor) else out[0]  # type: ignore[index]
        new = first + 0.5 * torch.arange(first.shape[-1]) / first.shape[-1]
        return new if isinstance(out, Tensor) else (new, *out[1:])  # type: ignore[index]

    for s, row in enumerate(ids):
        before = naive(module, row)
        calls["n"] = 0
        handle = module.get_submodule(where.module).register_forward_hook(hook)
        after = naive(module, row)
        handle.remove()
        targets = row[1:].numpy()
        pick = np.arange(len(targets)), targets
        assert paired.baseline["nll"][s] == pytest.approx(-before[:-1][pick].mean(), rel=1e-5)
        assert paired.edited["plus"]["nll"][s] == pytest.approx(-after[:-1][pick].mean(), rel=1e-5)
        kl = (np.exp(before) * (before - after)).sum(-1)[:-1].mean()
        assert paired.edited["plus"]["kl"][s] == pytest.approx(kl, abs=2e-6)
        same = (before.argmax(-1) == after.argmax(-1))[:-1].mean()
        assert paired.edited["plus"]["top1_agreement"][s] == pytest.approx(same, abs=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral", "bloom", "falcon", "bert", "albert", "opt"])
@pytest.mark.parametrize("layer", [1, 3])
def test_sharing_the_prefix_changes_no_bit(name: str, layer: int) -> None:
    model, ids = ma.load(build(name)), tokens(3)
    edits = [Edit(f"e{i}", f"{layer}.resid_post", lambda h, b, i=i: h * (1 + 0.1 * i)) for i in (1, 2)]
    shared = evaluate(model, ma.corpus(ids), edits)
    whole = evaluate(model, ma.corpus(ids), edits, watcher=Whole())
    for edit in edits:
        for metric, values in whole.edited[edit.name].items():
            np.testing.assert_array_equal(shared.edited[edit.name][metric], values)
    assert "forward" not in vars(model.module.get_submodule(model.anatomy.stacks[0].blocks[0].module))


def test_the_shared_prefix_does_no_work() -> None:
    """Block 1 runs once for the baseline and never for the edits behind it."""
    module = build("llama")
    model, calls = ma.load(module), []
    handle = module.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    edits = [Edit(f"e{i}", "2.resid_post", lambda h, b, i=i: h + i) for i in (1, 2, 3)]
    evaluate(model, ma.corpus(tokens(2)), edits)
    handle.remove()
    assert len(calls) == 2


def test_padding_is_not_predicted() -> None:
    """Prompts of different lengths have the losses that each has alone."""
    model, ids = ma.load(build("llama")), tokens(3)
    lengths = [24, 10, 17]
    mask = torch.zeros(3, 24, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    edit = Edit("double", "2.resid_post", lambda h, b: h * 2)
    together = evaluate(model, ma.corpus({"input_ids": ids, "attention_mask": mask}), [edit], batch_size=3)
    for row, n in enumerate(lengths):
        alone = evaluate(model, ma.corpus(ids[row : row + 1, :n]), [edit])
        assert together.n_targets[row] == n - 1
        for name in ("nll", "kl"):
            assert together.edited["double"][name][row] == pytest.approx(alone.edited["double"][name][0], abs=1e-6)


# ------------------------------------------------------------------------------------------- planted truth
def planted(read: bool) -> tuple[Model, ScanResult, Tensor]:
    """A tiny GPT-2 whose first token has 900 in dim 7 after every block; `read`: the last norm's scale lets it count.

    Hand-built. Where it is read it is the divisor of the first token's norms, so its attention changes without it;
    where nothing reads it (one token that no other attends to and whose own prediction is constant), nothing does.
    """
    module = build("gpt2", seed=3)
    ids = tokens()
    ids[:, 0] = 0
    with torch.no_grad():
        module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.clone())  # untied
        module.transformer.wte.weight[0, 7] = 900.0
        for block in module.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight[:, 7] = 0
                projection.bias[7] = 0
            if read:
                block.attn.c_attn.weight *= 8
            else:  # values are zero: no token hears of any other
                block.attn.c_attn.weight[:, 64:] = 0
                block.attn.c_attn.bias[64:] = 0
        if read:
            module.lm_head.weight *= 20
        else:
            module.transformer.ln_f.weight[:] = 0  # every prediction is that of the last norm's bias
    model = ma.load(module.eval())
    return model, ma.scan(model, ids, **OFF), ids


def test_a_spike_that_is_read_is_harmful_and_its_mean_is_not() -> None:
    model, scan, ids = planted(read=True)
    assert set(scan.findings.dim) == {7} and set(scan.findings.pos) == {0}
    done = intervene(model, ids, scan, layer=1)
    rows = done.effects[(done.effects.metric == "perplexity") & (done.effects.group == "all")].set_index("edit")
    assert done.info.estimated_on == "sequences 0 to 5" and done.info.evaluated_on == "sequences 6 to 11"
    kl = done.effects[done.effects.metric == "kl"].set_index("edit").edited
    assert kl["zero"] > 100 * max(kl["mean"], kl["random"], kl["shuffle"], 1e-9)
    assert [verdict(rows.loc[n]) for n in ("mean", "shuffle")] == ["not tested", "not tested"]
    assert (done.effects.n_elements > 0).all() and (done.effects.n_calls > 0).all()
    words = " ".join(effects_in_words(done))
    assert "95% interval" in words and "because" not in words


def test_a_spike_that_nothing_reads_is_harmless() -> None:
    """Owen's counter-example: massive, and zeroing it changes nothing. It must not be called harmful."""
    model, scan, ids = planted(read=False)
    assert set(scan.findings.dim) == {7}
    done = intervene(model, ids, scan, layer=1, sets=("zero",))
    row = done.effects[(done.effects.metric == "perplexity") & (done.effects.group == "all")].iloc[0]
    assert row.n_elements == 6 and row.delta == 0 and verdict(row) == "harmless"


def test_a_constant_may_be_set_to_its_mean() -> None:
    """With BOS in front the mean is the value itself, bit for bit: the edit fired all the same, and tests nothing.

    Gemma 3 was told "+0, interval 0 to 0: harmless" of it.
    """
    model, scan, ids = planted(read=True)
    done = intervene(model, ids, scan, layer=1, sets=("mean",))
    effects = done.effects
    assert (effects.n_elements == 6).all() and (effects.delta.abs() < 1e-6).all() and (effects.change <= 1e-6).all()
    assert set(effects.verdict) == {"not tested", "not judged"}
    assert not any("harmless, " in s or s.endswith("harmless.") for s in effects_in_words(done)[1:2])


def test_groups_say_whom_an_edit_hurts() -> None:
    model, scan, ids = planted(read=True)
    labels = ["even" if i % 2 == 0 else "odd" for i in range(12)]
    done = intervene(model, ids, scan, layer=1, groups={"parity": labels}, sets=("zero",))
    rows = done.effects[done.effects.metric == "nll"].set_index("group")
    assert list(rows.index) == ["all", "parity=even", "parity=odd"]
    paired = evaluate(model, ma.corpus(ids[6:]), [zero(massive(scan.findings[scan.findings.sequence < 6], 1))])
    even = np.arange(6) % 2 == 0
    assert rows.delta["parity=even"] == pytest.approx(
        (paired.edited["zero"]["nll"] - paired.baseline["nll"])[even].mean(), rel=1e-6
    )


def test_the_means_are_of_the_first_half_only() -> None:
    model, scan, ids = planted(read=True)
    changed = copy.deepcopy(scan)
    late = changed.findings.sequence >= 6
    changed.findings.loc[late, "value"] *= 3
    one, other = (intervene(model, ids, s, layer=1, sets=("mean",)) for s in (scan, changed))
    assert one.info.target == other.info.target
    both = intervene(model, ids, changed, layer=1, sets=("mean",), hold_out=False)
    assert both.info.target != one.info.target and both.info.notes


def test_a_classifier_is_told_by_accuracy() -> None:
    """Labels are the model's own answers, so the baseline is 1; edited accuracy is the agreement."""
    module, x = build("vit"), torch.rand(9, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    model = ma.load(module)
    with torch.no_grad():
        labels = module(x).logits.argmax(-1)
    edit = Edit("noise", "2.resid_post", lambda h, b: h + 3 * torch.sin(torch.arange(h.shape[-1]).float()))
    paired = evaluate(model, ma.corpus({"pixel_values": x}), [edit], batch_size=4, labels=labels)
    assert paired.baseline["accuracy"].tolist() == [1.0] * 9
    np.testing.assert_array_equal(paired.edited["noise"]["accuracy"], paired.edited["noise"]["top1_agreement"])


# ------------------------------------------------------------------------------------------------ intervals
def made(base: np.ndarray, after: np.ndarray) -> Paired:
    n = len(base)
    return Paired(np.arange(n), np.full(n, 10.0), {"nll": base}, {"e": {"nll": after, "kl": after - base}})


def test_the_interval_of_a_constant_difference_is_that_difference() -> None:
    base = np.random.default_rng(0).normal(3, 1, 40)
    effects = {e.metric: e for e in effects_of(made(base, base + 0.25), "e", np.ones(40, bool))}
    assert (effects["nll"].ci_low, effects["nll"].ci_high) == pytest.approx((0.25, 0.25))
    assert effects["perplexity"].baseline == pytest.approx(np.exp(base.mean()))


def test_bad_requests_are_refused() -> None:
    model, scan, ids = planted(read=True)
    with pytest.raises(UserError, match="Unknown edit 'zeroo'"):
        intervene(model, ids, scan, sets=("zeroo",))
    with pytest.raises(UserError, match="needs a number"):
        intervene(model, ids, scan, sets=("scale=x",))
    with pytest.raises(UserError, match="has no findings"):
        intervene(model, ids, scan, layer=99)
    once = zero(scan.findings)
    with pytest.raises(UserError, match="given twice"):
        evaluate(model, ma.corpus(ids), [once, once])
    with pytest.raises(UserError, match=each("'zero'", "twice")):
        intervene(model, ids, scan, sets=("zero", "mean", "zero"))
    with pytest.raises(WorkError, match="changed nothing"):
        evaluate(model, ma.corpus(ids), [Edit("none", "1.resid_post", lambda h, b: h.clone())])
    with pytest.raises(UserError, match="no parameter"):
        evaluate(model, ma.corpus(ids), [WeightEdit("w", "nowhere.weight", lambda w: w)])
    with pytest.raises(UserError, match="no massive activations"):
        massive(scan.findings.iloc[:0])


def test_edits_of_one_name_are_numbered() -> None:
    """Two zeros that are not the same object, and two entries of one matrix: each is evaluated on its own."""
    edits = told_apart([zero_dims([1, 2, 3, 4, n], "1.resid_post") for n in (5, 6, 7)])
    assert [e.name for e in edits] == [f"dims 1, 2, 3, 4 ... to zero{n}" for n in ("", " (2)", " (3)")]
    both = [super_weights("blocks.0.down.weight", [entry]) for entry in ((7, 3), (7, 4))]
    assert len({e.name for e in both}) == 2 and [e.name for e in told_apart(both)] == [e.name for e in both]
    weight = torch.ones(8, 8)
    for edit, column in zip(both, (3, 4), strict=True):
        changed = edit.apply(weight.clone())
        assert (changed == 0).nonzero().tolist() == [[7, column]]
        assert f"[7, {column}]" in edit.name
