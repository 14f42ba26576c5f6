"""What the table of effects says beyond a difference: nats, verdicts, shares of zero's damage, controls and groups."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import massact as ma
from massact.interventions import evaluate, zero_dims
from massact.interventions.effects import Effect, Paired, effect_rows, effects_of, worst_of
from massact.models import with_attention
from massact.records.kinds.intervention import InterveneInfo, Intervention
from massact.records.tables import columns_of, frame
from massact.records.verdicts import judged, starred, unit_of, verdict_of, with_change
from massact.reports import effects_in_words
from massact.reports.kinds.intervention import brief
from massact.trace import AttentionEdit, Edit, Fired, InputEdit, WeightEdit, edited
from massact.trace.edits import Together
from tests.facts import tells
from tests.families import build
from tests.interventions.test_paired import tokens

N = 12
_DRAW = np.random.default_rng(0)  # of these three alone: what tests draw is the same in any order
BASE, TARGETS = _DRAW.normal(3, 0.5, N), _DRAW.integers(20, 300, N).astype(float)
HURT = _DRAW.normal(0.4, 0.05, N)  # nats that zero costs each sequence


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def paired(**edits: dict[str, np.ndarray]) -> Paired:
    fired = {name: Fired(name, 8, 16, 1.0) for name in edits}
    return Paired(np.arange(N), TARGETS, {"nll": BASE}, edits, fired)


def effects(made: Paired, name: str, chosen: np.ndarray | None = None) -> dict[str, Effect]:
    everyone = np.ones(len(made.n_targets), bool)
    return {e.metric: e for e in effects_of(made, name, everyone if chosen is None else chosen)}


# ------------------------------------------------------------------------------------------------ nats and shares
def test_a_perplexity_has_the_interval_of_its_logarithm() -> None:
    made = effects(paired(zero={"nll": BASE + HURT}), "zero")
    pooled, windowed, nll = made["perplexity"], made["perplexity_windowed"], made["nll"]
    nats = np.average(HURT, weights=TARGETS)
    assert pooled.harm is not None and float(pooled.harm.estimate) == pytest.approx(nats)
    assert pooled.delta == pytest.approx(pooled.baseline * (math.exp(nats) - 1))
    ends = pooled.baseline * np.expm1([pooled.harm.low, pooled.harm.high])
    assert (pooled.ci_low, pooled.ci_high) == pytest.approx(tuple(ends))
    by_hand = scipy.stats.ttest_1samp(HURT, 0).confidence_interval()
    assert (nll.ci_low, nll.ci_high) == pytest.approx((by_hand.low, by_hand.high))
    ends = windowed.baseline * np.expm1([by_hand.low, by_hand.high])
    assert (windowed.ci_low, windowed.ci_high) == pytest.approx(tuple(ends))
    row = pooled.row()
    assert row["delta_nats"] == pytest.approx(nats) and row["verdict"] == "harmful" and np.isnan(row["n_needed"])


def test_a_share_of_the_damage_of_zero(rng: np.random.Generator) -> None:
    noise = rng.normal(0, 1e-4, N)
    made = paired(zero={"nll": BASE + HURT}, mean={"nll": BASE + 0.25 * HURT}, random={"nll": BASE + noise})
    share = effects(made, "mean")["perplexity"].share
    assert (share.estimate, share.low, share.high) == pytest.approx((0.25, 0.25, 0.25))
    share = effects(made, "random")["perplexity"].share
    assert share.low < share.estimate < share.high and abs(share.estimate) < 1e-3 and share.high - share.low < 2e-3
    assert np.isnan(effects(made, "zero")["perplexity"].share.estimate)
    for harmless in ({"zero": {"nll": BASE + 1e-3}, "mean": {"nll": BASE}}, {"mean": {"nll": BASE}}):
        assert np.isnan(effects(paired(**harmless), "mean")["perplexity"].share.estimate)
    few = effects(made, "mean", np.arange(N) < 3)["perplexity"]
    assert np.isnan(few.share.estimate) and few.verdict == "not settled"


def test_the_margin_is_an_option() -> None:
    made = paired(zero={"nll": BASE + HURT})
    for margin, says in ((0.01, "harmful"), (1.0, "harmless"), (0.41, "not settled")):
        row = next(r for r in effect_rows(made, margin=margin) if r["metric"] == "perplexity")
        assert row["verdict"] == says, margin
        assert math.isnan(float(str(row["n_needed"]))) == (says != "not settled")


# ------------------------------------------------------------------------------------------------ answers
def test_answers_that_stayed_are_few() -> None:
    """Four of them changed by nothing: today's interval had no width and said harmless."""
    right = np.array([1.0, 1, 0, 1])
    one = Paired(
        np.arange(4), np.ones(4), {"accuracy": right}, {"e": {"accuracy": right}}, {"e": Fired("e", 1, 1, 1.0)}
    )
    (row,) = effect_rows(one)
    assert (row["verdict"], row["n_needed"]) == ("not settled", 381)
    assert row["ci_high"] == pytest.approx(0.49, abs=0.01) and row["ci_low"] == -row["ci_high"]
    many = Paired(np.arange(400), np.ones(400), {"accuracy": np.ones(400)}, {"e": {"accuracy": np.ones(400)}})
    assert effects(many, "e")["accuracy"].verdict == "harmless"
    lost = Paired(np.arange(40), np.ones(40), {"accuracy": np.ones(40)},
                  {"e": {"accuracy": (np.arange(40) % 2).astype(float)}})  # fmt: skip
    assert effects(lost, "e")["accuracy"].verdict == "harmful"


def test_tasks_are_told_by_their_answers() -> None:
    acc = {"acc": np.array([1.0, 1, 0, 1, 1, 0]), "perplexity": np.full(6, 3.0)}
    made = Paired(np.arange(6), np.ones(6), acc, {"e": acc})
    told = {e.metric: e for e in effects_of(made, "e", np.ones(6, bool), task="piqa")}
    assert told["piqa/acc"].verdict == "not settled" and told["piqa/perplexity"].verdict == "not judged"
    assert unit_of("piqa/acc_norm") == "share" and unit_of("piqa/perplexity") == unit_of("acc") == ""


# ------------------------------------------------------------------------------------------------ not tested
@pytest.mark.parametrize(("factor", "says"), [(1.0, "not tested"), (1 + 1e-7, "not tested"), (0.999, "harmless")])
def test_an_edit_that_changes_nothing_tests_nothing(factor: float, says: str) -> None:
    """Decided from the edit: of the same effect of nothing."""
    done = Fired("e", 8, 16)
    old = torch.tensor([[3.0, -2.0, 0.0]])
    done.count(old, old * factor)
    assert done.change == pytest.approx(1 - min(factor, 1 / factor), rel=0.01, abs=1.2e-7)  # a rounding
    made = Paired(np.arange(N), TARGETS, {"nll": BASE}, {"e": {"nll": BASE, "kl": BASE * 0}}, {"e": done})
    assert {r["verdict"] for r in effect_rows(made)} == {says, "not judged"}


def test_how_much_every_kind_of_edit_changes() -> None:
    model, ids = with_attention(ma.load(build("llama"))), tokens(3)
    name = next(n for n, p in model.module.named_parameters() if p.shape == (32,) and n.endswith("weight"))
    half = Edit("half", "2.resid_post", lambda h, b: h * 0.5)
    edits = {
        0.5: half, 1.0: zero_dims([3], "1.resid_post"), 0.25: WeightEdit("less", name, lambda w: w * 0.75),
        2.0: AttentionEdit("turned", "*.attention", lambda a: -a.out_HTF), 0.75: Together("both", (
            half, Edit("quarter", "1.resid_post", lambda h, b: h / 4))),
        math.inf: Edit("nan", "2.resid_post", lambda h, b: h * math.nan),
    }  # fmt: skip
    for wanted, edit in edits.items():
        with edited(model, edit) as fired, torch.no_grad():
            model.module(ids)
        assert fired[0].change == pytest.approx(wanted, rel=1e-5), edit.name
    other = InputEdit("other", lambda inputs: inputs | {"input_ids": inputs["input_ids"] + 1})
    for edit in (other, Together("and", (other, half))):
        with edited(model, edit) as fired, torch.no_grad():
            model.module(ids)
        assert math.isnan(fired[0].change), "a token is no amount"
    found = evaluate(model, ma.corpus(ids), [half], batch_size=2).fired["half"]
    assert found.change == pytest.approx(0.5)


def test_rows_of_older_runs_are_judged_by_the_same_rule() -> None:
    """From the perplexity and its interval: log(1 + delta / baseline); what was not recorded is not made up."""
    old = {"metric": "perplexity", "baseline": 10.0, "edited": 10.0, "ci_low": 0.0, "ci_high": 0.0, "n_sequences": 4}
    assert verdict_of(old) == "harmless" and verdict_of(old | {"n_sequences": 3}) == "not settled"
    assert verdict_of(old | {"change": 0.0}) == "not tested" and verdict_of(old | {"verdict": "helpful"}) == "helpful"
    assert verdict_of(old | {"ci_low": -11.0, "ci_high": 0.0}) == "not settled"
    assert with_change("not judged", 0.0) == "not judged" and judged(math.nan, 1, 9) == "not settled"


# ------------------------------------------------------------------------------------------------ stars and groups
def test_stars_of_what_moves_one_way_only_are_beyond_the_control(rng: np.random.Generator) -> None:
    """KL is never below zero, so its interval never holds it: random control and mean are as far from it."""
    tiny = np.abs(rng.normal(1e-5, 1e-6, N))
    kl = {"zero": HURT, "mean": tiny + rng.normal(0, 1e-6, N), "random": tiny, "less": 0.5 * tiny}
    edits = {name: {"nll": BASE + 1e-3, "kl": x} for name, x in kl.items()}
    rows = {r["edit"]: r for r in effect_rows(paired(**edits)) if r["metric"] == "kl"}
    assert all(r["ci_low"] > 0 for r in rows.values())  # type: ignore[operator]
    stars = {name: starred(r) for name, r in rows.items()}
    assert stars == {"zero": True, "mean": False, "random": None, "less": False}, "less than the control is no star"
    alone = paired(zero=edits["zero"])
    (row,) = (r for r in effect_rows(alone) if r["metric"] == "kl")
    assert starred(row) is None
    for made, marked in ((paired(**edits), True), (alone, False)):
        table = brief(result(effect_rows(made)))[0].parts[0]
        line = next(i for i, x in enumerate(table.columns[0].shown) if x == "kl")
        assert table.columns[2].shown[line].endswith("*") == marked
        assert ("not compared" in table.title) == (not marked)


def result(rows: list[dict[str, object]]) -> Intervention:
    return Intervention(InterveneInfo(target={"site": "2.resid_post", "dims": [3]}), frame("effects", rows))


def grouped(shift: float) -> Intervention:
    labels = np.array(["a", "b"] * (N // 2))
    hurt = HURT + shift * (labels == "a")
    return result(effect_rows(paired(zero={"nll": BASE + hurt}), groups={"of": labels}))


def test_groups_differ_only_where_the_interval_of_their_difference_says_so() -> None:
    far, near = grouped(0.5), grouped(0.0)
    assert tells(effects_in_words(far), "of=a", "most")
    said = effects_in_words(near)
    assert not tells(said, "most") and tells(said, "zero", "of=a", "of=b", "settled")
    a = HURT[::2] + 0.5
    wanted = scipy.stats.ttest_ind(a, HURT[1::2], equal_var=False).confidence_interval()
    rows = far.effects[(far.effects.metric == "nll") & far.effects.gap_low.notna()]
    assert list(rows.group) == ["of=a"]
    assert (rows.gap_low.iloc[0], rows.gap_high.iloc[0]) == pytest.approx((wanted.low, wanted.high))
    few = {label: effects_of(paired(zero={"nll": BASE + HURT}), "zero", np.arange(N) < k) for label, k in
           (("x", 3), ("y", 8))}  # fmt: skip
    assert worst_of(few) == {}, "three sequences are no group to compare"


def test_words_tell_what_is_missing(rng: np.random.Generator) -> None:
    rows = effect_rows(paired(mean={"nll": BASE + rng.normal(0, 0.03, N)}))
    (sentence,) = [s for s in effects_in_words(result(rows)) if s.startswith("mean (")]
    n = next(r["n_needed"] for r in rows if r["metric"] == "perplexity")
    assert tells([sentence], "not settled", int(float(str(n))))
    assert tells(effects_in_words(result(rows)), "zero", "unavailable")
    old = pd.DataFrame(rows).drop(columns=["verdict", "change", "n_needed", "share_of_zero"])
    blank = old.assign(verdict="", change=np.nan, n_needed=np.nan, share_of_zero=np.nan)[list(columns_of("effects"))]
    assert tells(effects_in_words(result(blank.to_dict("records"))), "recorded", "bootstraps")
    assert not tells(effects_in_words(result(rows)), "recorded")


@pytest.mark.parametrize("name", ["{} 5@other", "{}, 3 layers"])
def test_an_edit_is_compared_with_zero_and_control_of_its_own(name: str, rng: np.random.Generator) -> None:
    """Not with those of another cluster, which change other entries, another number of them."""
    noise = rng.normal(0, 0.001, N)
    own = {name.format(w): {"nll": BASE + x} for w, x in (("zero", HURT), ("mean", 0.25 * HURT), ("random", noise))}
    main: dict[str, dict[str, np.ndarray]] = {w: {"nll": BASE + 100 * HURT} for w in ("zero", "random")}
    kl = {
        "zero": 9.0 + noise,
        "random": 5.0 + noise,
        name.format("mean"): 2.0 + noise,
        name.format("random"): 1.0 + 0 * noise,
    }
    edits = main | own
    made = paired(**{e: metrics | {"kl": kl.get(e, 0 * noise)} for e, metrics in edits.items()})
    found = effects(made, name.format("mean"))
    assert found["perplexity"].share.estimate == pytest.approx(0.25)
    assert found["kl"].beyond.estimate == pytest.approx(1.0, abs=0.01)
    assert np.isnan(effects(made, name.format("random"))["kl"].beyond.estimate)
    assert np.isnan(effects(made, name.format("zero"))["perplexity"].share.estimate)
    said = effects_in_words(result(effect_rows(paired(**{e: m for e, m in own.items() if "random" not in e}))))
    assert not tells(said, "unavailable")


def test_no_group_is_hurt_most_where_one_is_not_finite() -> None:
    """The one with an infinite loss may be hurt most of all, and has no interval."""
    labels = np.array(["a", "b", "c"]).repeat(N // 3 + 1)[:N]
    hurt = np.select([labels == "a", labels == "b"], [HURT + 1, HURT], np.inf)
    said = effects_in_words(result(effect_rows(paired(zero={"nll": BASE + hurt}), groups={"of": labels})))
    assert not tells(said, "most") and tells(said, "of=a", "of=c", "finite", "unavailable")
