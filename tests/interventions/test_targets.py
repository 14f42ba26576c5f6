"""Both sides of an effect are of the same targets, whatever an edit drops, adds, masks or reorders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import massact as ma
from massact.interventions import drop_first, evaluate
from massact.interventions.effects import effects_of
from massact.interventions.predictions import Predicted, Targets
from massact.records.errors import UserError, WorkError
from massact.trace import InputEdit, Together
from massact.trace.text_rows import TEXT_POSITIONS
from tests.families import build

T = 20
POSITIONS = (TEXT_POSITIONS, "input_ids", "attention_mask", "position_ids")


def ids(n: int = 3) -> Tensor:
    return torch.randint(4, 90, (n, T), generator=torch.Generator().manual_seed(3))


def logp(module: Any, tokens: Tensor) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=tokens[None]).logits[0].double().log_softmax(-1).numpy()


def naive(module: Any, text: Tensor, left: Tensor, at: list[int]) -> dict[str, tuple[float, float]]:
    """metric -> (baseline, edited) over the positions of the text that the run on `left` predicts, each written out.

    `at`: for each token of `left` its position in the text, -1 for one that is not of it.
    """
    whole, rest = logp(module, text), logp(module, left)
    pairs = [(p - 1, r - 1, int(text[p])) for r, p in enumerate(at) if r > 0 and p > 0]
    old, new = whole[[a for a, _, _ in pairs]], rest[[b for _, b, _ in pairs]]
    true = np.array([t for _, _, t in pairs])
    pick = np.arange(len(pairs)), true
    return {
        "n": (len(pairs), len(pairs)),
        "nll": (-old[pick].mean(), -new[pick].mean()),
        "top1_probability": (np.exp(old.max(-1)).mean(), np.exp(new.max(-1)).mean()),
        "kl": (0.0, (np.exp(old) * (old - new)).sum(-1).mean()),
        "top1_agreement": (1.0, (old.argmax(-1) == new.argmax(-1)).mean()),
    }


def check(paired: Any, name: str, wanted: list[dict[str, tuple[float, float]]]) -> None:
    told = {e.metric: e for e in effects_of(paired, name, np.ones(len(paired.n_targets), bool))}
    n = np.array([w["n"][0] for w in wanted])
    for metric in ("nll", "top1_probability", "kl", "top1_agreement"):
        assert told[metric].baseline == pytest.approx(np.mean([w[metric][0] for w in wanted]), rel=1e-5, abs=2e-6)
        assert told[metric].edited == pytest.approx(np.mean([w[metric][1] for w in wanted]), rel=1e-5, abs=2e-6)
        assert told[metric].n_targets == n.sum(), metric
    for side, got in enumerate((told["perplexity"].baseline, told["perplexity"].edited)):
        nll = np.array([w["nll"][side] for w in wanted])
        assert got == pytest.approx(np.exp((nll * n).sum() / n.sum()), rel=1e-5)


def cut(start: int, stop: int | None) -> InputEdit:
    return InputEdit("cut", lambda x: {k: v[:, start:stop] if k in POSITIONS else v for k, v in x.items()})


def unaware(change: Any, name: str = "unaware") -> InputEdit:
    """An edit that knows of the ids only."""
    return InputEdit(name, lambda x: {"input_ids": change(x["input_ids"])})


def reordered(order: list[int]) -> InputEdit:
    return InputEdit("order", lambda x: {k: v[:, order] if k in POSITIONS else v for k, v in x.items()})


SINKS = torch.tensor([5, 6])
ORDER = [0, 2, 1, *range(5, T), 3, 4]
MIDDLE = [*range(4), *range(9, T)]
CASES: dict[str, tuple[Any, list[int]]] = {
    "drop-first": (drop_first(1), list(range(1, T))),
    "drop-first 3": (drop_first(3), list(range(3, T))),
    "cut at the end": (cut(0, T - 4), list(range(T - 4))),
    "cut at both ends": (cut(2, T - 2), list(range(2, T - 2))),
    "a hole": (reordered(MIDDLE), MIDDLE),
    "another order": (reordered(ORDER), ORDER),
    "unaware, at the start": (unaware(lambda x: x[:, 2:]), list(range(2, T))),
    "unaware, at the end": (unaware(lambda x: x[:, :-3]), list(range(T - 3))),
    "sink tokens": (unaware(lambda x: torch.cat([SINKS.expand(len(x), -1), x], 1)), [-1, -1, *range(T)]),
    "tokens behind": (unaware(lambda x: torch.cat([x, SINKS.expand(len(x), -1)], 1)), [*range(T), -1, -1]),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", CASES)
def test_both_sides_are_of_the_same_targets(name: str, family: str) -> None:
    module, text, (edit, at) = build(family), ids(), CASES[name]
    paired = evaluate(ma.load(module), ma.corpus(text), [edit], batch_size=2)
    given = [{"input_ids": row[None], TEXT_POSITIONS: torch.arange(T)[None]} for row in text]
    changed = [edit.apply(one)["input_ids"][0] for one in given]
    check(paired, edit.name, [naive(module, row, new, at) for row, new in zip(text, changed, strict=True)])
    if name != "another order":
        assert [int(p) for p in naive(module, text[0], changed[0], at)["n"]] == [sum(p > 0 for p in at[1:])] * 2


def test_targets_of_several_edits_are_each_their_own() -> None:
    """The baseline of an edit that takes nothing away is over all targets, beside one that does."""
    module, text = build("llama"), ids()
    same = InputEdit("one is 7", lambda x: x | {"input_ids": x["input_ids"].index_fill(1, torch.tensor([5]), 7)})
    paired = evaluate(ma.load(module), ma.corpus(text), [drop_first(2), same])
    all_of = {e.metric: e for e in effects_of(paired, "one is 7", np.ones(3, bool))}
    some_of = {e.metric: e for e in effects_of(paired, drop_first(2).name, np.ones(3, bool))}
    assert all_of["nll"].n_targets == 3 * (T - 1) and some_of["nll"].n_targets == 3 * (T - 3)
    whole = [-logp(module, row)[np.arange(T - 1), row[1:]] for row in text]
    assert all_of["nll"].baseline == pytest.approx(np.mean(whole), rel=1e-5)
    assert some_of["nll"].baseline == pytest.approx(np.mean([x[2:] for x in whole]), rel=1e-5)
    assert list(paired.n_targets_of) == [drop_first(2).name]


@pytest.mark.parametrize("left", [False, True])
def test_prompts_of_different_lengths(left: bool) -> None:
    """A prompt of two tokens has no target left, and is in neither side."""
    module, text, lengths = build("llama"), ids(4), [T, 9, 2, 14]
    mask = torch.zeros(4, T, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(-n, None) if left else slice(0, n)] = 1
    edit = drop_first(2)
    paired = evaluate(ma.load(module), ma.corpus({"input_ids": text, "attention_mask": mask}), [edit], batch_size=4)
    alone = [text[i][mask[i].bool()] for i in range(4)]
    wanted = [naive(module, t, t[2:], list(range(2, len(t)))) for t in alone if len(t) > 3]
    check(paired, edit.name, wanted)
    assert paired.n_targets_of[edit.name].tolist() == [T - 3, 6, 0, 11]


def test_tokens_that_an_edit_masks_are_no_targets() -> None:
    """As if they were not there: rotary positions are relative, and the masked ones are at the start."""
    module, text = build("llama"), ids()
    mask = torch.ones(3, T, dtype=torch.long)
    mask[:, :3] = 0
    edit = InputEdit(
        "mask",
        lambda x: (
            x
            | {
                "attention_mask": mask[:1].expand(len(x["input_ids"]), -1),
                "input_ids": x["input_ids"].index_fill(1, torch.arange(3), 9),
            }
        ),
    )
    paired = evaluate(ma.load(module), ma.corpus(text), [edit], batch_size=3)
    check(paired, "mask", [naive(module, row, row[3:], list(range(3, T))) for row in text])


def test_positions_go_through_several_edits() -> None:
    module, text = build("llama"), ids()
    edit = Together("both", (drop_first(1), cut(0, -2)))
    paired = evaluate(ma.load(module), ma.corpus(text), [edit], batch_size=2)
    check(paired, "both", [naive(module, row, row[1:-2], list(range(1, T - 2))) for row in text])


@pytest.mark.parametrize(
    "edit",
    [
        unaware(lambda x: x.flip(1), "turned round"),
        unaware(lambda x: x[:, [*range(4), *range(7, T)]], "a hole"),
        InputEdit("flip", lambda x: x | {"input_ids": x["input_ids"].flip(1)}),
    ],
    ids=lambda e: e.name,
)
def test_an_edit_that_does_not_say_where_tokens_are_is_refused(edit: InputEdit) -> None:
    with pytest.raises(UserError, match="where"):
        evaluate(ma.load(build("llama")), ma.corpus(ids()), [edit])


def test_hidden_tokens_of_a_masked_model() -> None:
    """Loss over the hidden tokens that are left; KL and top-1 probability over all positions that are left."""
    from tests.interventions.test_masked_loss import bert, hidden_by, texts

    model, text, edit = bert(), texts(), drop_first(4)
    at = [[int(t) for t in a] for a in hidden_by(text, model)]
    paired = evaluate(model, ma.corpus(text), [edit], batch_size=3)
    told = {e.metric: e for e in effects_of(paired, edit.name, np.ones(len(text), bool))}
    sides: dict[str, list[tuple[float, float]]] = {"nll": [], "top1_probability": [], "kl": []}
    for row, hidden in zip(text, at, strict=True):
        masked = row.clone()
        masked[hidden] = model.tokenizer.mask_token_id
        whole, rest = logp(model.module, masked)[4:], logp(model.module, masked[4:])
        kept = [t - 4 for t in hidden if t >= 4]
        true = row[4:][kept].numpy()
        if kept:
            sides["nll"].append((-whole[kept, true].mean(), -rest[kept, true].mean()))
            sides["top1_probability"].append((np.exp(whole.max(-1)).mean(), np.exp(rest.max(-1)).mean()))
            sides["kl"].append((0.0, (np.exp(whole) * (whole - rest)).sum(-1).mean()))
    assert any(t < 4 for hidden in at for t in hidden)
    for metric, pairs in sides.items():
        wanted = np.mean(pairs, 0)
        assert (told[metric].baseline, told[metric].edited) == pytest.approx(tuple(wanted), rel=1e-5, abs=2e-6), metric
    assert told["nll"].n_targets == sum(t >= 4 for hidden in at for t in hidden)


def test_a_decoder_of_its_own_text() -> None:
    """T5 with given decoder ids: the next of these, not the encoder's; an edit of the encoder's takes none away."""
    module, text = build("t5"), ids()
    other = torch.randint(4, 90, (3, 11), generator=torch.Generator().manual_seed(5))
    edit = drop_first(1)
    paired = evaluate(ma.load(module), ma.corpus({"input_ids": text, "decoder_input_ids": other}), [edit], batch_size=2)
    for side, (got, given) in enumerate(((paired.baseline, text), (paired.edited[edit.name], text[:, 1:]))):
        with torch.no_grad():
            p = module(input_ids=given, decoder_input_ids=other).logits.double().log_softmax(-1)
        nll = -p[:, :-1].gather(2, other[:, 1:, None])[..., 0].mean(1)
        np.testing.assert_allclose(got["nll"], nll, rtol=1e-5, err_msg=str(side))
    assert paired.n_targets.tolist() == [10] * 3 and not paired.n_targets_of


def test_other_targets_are_never_compared() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    one = Predicted(logits, Targets(torch.tensor([1, 2, 4]), torch.tensor([0, 1, 3]), None), None, kept=True)
    for at in ([1, 3], [0], [5], [2, 4, 9]):
        other = Predicted(logits, Targets(torch.tensor(at), torch.arange(len(at)), None), None)
        with pytest.raises(WorkError, match="different tokens"):
            one.compared(other)


def test_of_a_class_that_the_head_lacks_neither_loss_nor_accuracy_is_known() -> None:
    one = torch.zeros(1, dtype=torch.long)
    targets = Targets(one, one, torch.ones(1, dtype=torch.bool))
    told = Predicted(torch.randn(1, 7), targets, torch.tensor([7]), label=True).numbers()
    assert np.isnan([told["nll"], told["accuracy"]]).all()
