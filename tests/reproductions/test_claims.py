"""Every claim of the paper on planted tables: for each verdict one that gives it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from massact.records.kinds.classics import Classics, ClassicsInfo
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.reproduction import CLAIM_VERDICTS, FAILS, HOLDS, NOT_RECORDED, UNTOLD, Reproduction
from massact.records.kinds.scan import ScanResult
from massact.reports import claim_in_words, reproduction_in_words
from massact.reports.spelling import number
from massact.reproductions import ENTRIES
from massact.reproductions.attention_entries import concentration
from massact.reproductions.claims import averaged, bounded, concluded, part, shared
from massact.reproductions.entries import Finished, Nothing
from massact.reproductions.job import told
from massact.reproductions.place_entries import outlier_features
from massact.stats.intervals import Interval
from massact.verbs.reproduce import ReproduceConfig
from tests.facts import tells
from tests.golden.make import EXPLAINED
from tests.reproductions import theory_cases
from tests.reproductions.tables import DIM, GOLDEN, L, effects, explanation, planted


def judged(experiment: str, f: Finished) -> tuple[str, list[dict[str, Any]]]:
    try:
        parts = ENTRIES[experiment].claim.judge(f)
    except Nothing as nothing:
        return UNTOLD, [part("", reason=nothing.reason)]
    return concluded(parts)[0], parts


# ---- inputs
def prompts(n: int, tenth: float, **more: Any) -> Finished:
    """n prompts whose greatest |h| is 500, the tenth as given."""
    h_TD = np.full((6, 5), 0.1)
    h_TD.flat[1:10] = tenth
    h_TD[0, 0] = 500.0
    seen = {
        "magnitude": h_TD[None],
        "layers": np.array([10]),
        "tokens": np.array(list("abcdef")),
        "stack": np.array(""),
    }
    scan = planted(portrait=seen, grow=1.0001, **more)
    return Finished(scan, prompts={str(i): (scan, None) for i in range(n)})


def ranked(n: int, spread: float, mean: float = 0.01) -> ScanResult:
    ranks = [{"site": "resid_post", "layer": 2, "source": "corpus", "rank": r, "value_mean": mean, "value_std": 1.0,
              "n_sequences": n} for r in ("top 1%", "top 10%", "median")]  # fmt: skip
    return planted(n=32, spread=spread, ranks=ranks)


def outliers(n: int, massive: list[int]) -> Finished:
    at = {"inputs": {"n": n, "dims": list(range(n)), "massive": massive}}
    return Finished(planted(), classics=Classics(ClassicsInfo(outcomes={"outlier-features": {"": {"at": at}}})))


def nats(edit: str, low: float, high: float, n: int = 8, **more: Any) -> dict[str, Any]:
    return {"edit": edit, "metric": "perplexity", "delta_nats": (low + high) / 2, "nats_low": low, "nats_high": high,
            "n_sequences": n} | more  # fmt: skip


def right(
    edit: str, low: float, high: float, metric: str = "accuracy", n: int = 400, base: float = 0.8
) -> dict[str, Any]:
    """A share of right answers that falls by `low` to `high`."""
    delta = -(low + high) / 2
    return {"edit": edit, "metric": metric, "baseline": base, "edited": base + delta, "delta": delta, "ci_low": -high,
            "ci_high": -low, "n_sequences": n}  # fmt: skip


def edited(*rows: dict[str, Any]) -> Finished:
    return Finished(planted(), intervention=effects(rows))


def overwritten(*rows: dict[str, Any]) -> Finished:
    named = [r | {"edit": f"registers {r['edit']}", "metric": "top1_agreement", "baseline": 1.0} for r in rows]
    return Finished(planted(), registers=effects(named))


def mapped(n: int, mass: float, logit: float) -> Finished:
    """n prompts of six tokens, the first massive."""
    p_TT, z_TT = np.full((6, 6), (1 - mass) / 5), np.full((6, 6), logit)
    p_TT[:, 0] = mass
    maps = {"logits": np.stack([z_TT] * 2), "probs": np.stack([p_TT] * 2), "layers": np.array([2, 3]), "stack": ""}
    scan = planted()
    return Finished(scan, prompts={str(i): (scan, explanation(maps=maps)) for i in range(n)})


def attending(n: int, before: float, after: float, constancy: float = 0.05, null: float = 1.0) -> Finished:
    """n sequences whose attention on massive tokens is so up to the onset (2) and behind the end, and in between."""
    rows = [{"layer": layer, "sequence": s, "concentration": (after if 2 < layer <= 11 else before) + 0.001 * s,
             "constancy": constancy + 0.001 * s, "null_constancy": null}
            for layer in range(1, L + 1) for s in range(n)]  # fmt: skip
    axes = [{"layer": 1, "concentration": 0.1}]
    return Finished(planted(n=n), explanation(per_sequence=rows, axes=axes))


def normed(n: int, share: float, sparsity: float) -> Finished:
    rows = [{"layer": 3, "stage": "normed", "group": "findings", "massive_share": share, "sparsity": sparsity},
            {"layer": 3, "stage": "normed", "group": "others", "massive_share": 0.01, "sparsity": 0.3}]  # fmt: skip
    scan = planted()
    return Finished(scan, prompts={str(i): (scan, explanation(trajectory=rows)) for i in range(n)})


def alike(low: float, high: float, folds: float = 8, scan: ScanResult | None = None) -> Finished:
    rows = [{"layer": 3, "stage": stage, "group": "findings", "n_tokens": 8, "cosine": (low + high) / 2,
             "cosine_low": low, "cosine_high": high, "n_folds": folds} for stage in ("normed", "k", "v")]  # fmt: skip
    return Finished(scan or planted(), explanation(trajectory=rows))


def trainings(n: int, with_bias: bool, loss: float = 3.04) -> Finished:
    rows = [{"row": "run", "variant": v, "model": "m", "steps": 9.0, "scanned": True, "massive": float(massive),
             "eval_loss": base + 0.001 * i} for i in range(n)
            for v, massive, base in (("softmax", True, 3.04), ("kv-bias", with_bias, loss))]  # fmt: skip
    return Finished(planted(), trained=pd.DataFrame(rows))


def images(n: int = 16, onset: int = 8, positions: tuple[int, ...] = (3, 5, 9, 11), **more: Any) -> Finished:
    scan = planted(n=n, onset=onset, offset=11, positions=positions, where=("other",), kind="images")
    return Finished(scan, means={"positions": np.array([3, 4])}, **more)


def registers(n: int, alpha: float) -> Finished:
    sinks = [{"layer": 9, "sequence": s, "pos": 3, "alpha": alpha * (1 + 0.01 * s), "finding": True} for s in range(n)]
    seen = explanation(sinks=sinks, positions=[{"layer": 9, "pos": p} for p in range(200)])
    return images(n=n, positions=(3,), explanation=seen)


def contrasted(n: int, **with_bos: Any) -> Finished:
    side = {"n_findings": 8, "onset": 2, "dims": [DIM], "classes": {"start": 4}, "largest_ratio": 9e3, "n_sequences": n}
    return Finished(planted(bos={"with": side | with_bos, "without": side}))


def tuned(n: int, **there: Any) -> Finished:
    return Finished(planted(), tuned=planted(n=n, **there))


NEAR, FAR = (-0.001, 0.001), (2.0, 2.2)
Case = Callable[[], Finished]
MANY_OR_NONE: list[Case] = [lambda: Finished(planted(per=12)), lambda: Finished(planted(offset=1))]
CASES: dict[str, dict[str, list[Case]]] = {
    "E1": {HOLDS: [lambda: prompts(4, 5.0)],
           FAILS: [lambda: prompts(4, 400.0), lambda: prompts(4, 5.0, where=("other",))],
           UNTOLD: [lambda: prompts(3, 5.0), lambda: Finished(planted())]},
    "E2": {HOLDS: [lambda: Finished(planted())], FAILS: MANY_OR_NONE,
           UNTOLD: [lambda: Finished(planted(n=3))]},
    "E3": {HOLDS: [lambda: Finished(planted())], FAILS: MANY_OR_NONE,
           UNTOLD: [lambda: Finished(planted(n=3))]},
    "E4": {HOLDS: [lambda: Finished(planted())],
           FAILS: [lambda: Finished(planted(onset=6)), lambda: Finished(planted(offset=5)),
                   lambda: Finished(planted(grow=1.2))],
           UNTOLD: [lambda: Finished(planted(n=3)), lambda: Finished(planted(offset=1))]},
    "E5": {HOLDS: [lambda: Finished(planted())], FAILS: [lambda: Finished(planted(grow=1.3))],
           UNTOLD: [lambda: Finished(planted(n=3)), lambda: Finished(planted(before=400.0)),
                    lambda: Finished(planted(onset=0))]},
    "E6": {HOLDS: [lambda: Finished(planted())],
           FAILS: [lambda: Finished(planted(where=("other",))), lambda: Finished(planted(dims=(1, 2, 3, 4))),
                   lambda: Finished(planted(n=30, dims=tuple(range(10))))],
           UNTOLD: [lambda: Finished(planted(n=3)), lambda: Finished(planted(where=("start", "other"))),
                    lambda: Finished(planted(kind="images"))]},
    "E7": {HOLDS: [lambda: outliers(10, [])], FAILS: [lambda: outliers(10, [DIM])],
           UNTOLD: [lambda: outliers(0, []), lambda: Finished(planted())]},
    "E8": {HOLDS: [lambda: Finished(ranked(32, 0.02))],
           FAILS: [lambda: Finished(ranked(32, 0.3)), lambda: Finished(ranked(32, 0.02, mean=9.0))],
           UNTOLD: [lambda: Finished(ranked(4, 0.02))]},
    "E9": {HOLDS: [lambda: Finished(planted(n=16))], FAILS: [lambda: Finished(planted(n=16, spread=0.4))],
           UNTOLD: [lambda: Finished(planted(n=3)), lambda: Finished(planted(spread=0.0)),
                    lambda: Finished(planted(n=5, spread=0.1))]},
    "E10": {HOLDS: [lambda: edited(nats("zero", 0.02, 0.03), nats("random", *NEAR))],
            FAILS: [lambda: edited(nats("zero", *NEAR), nats("random", *NEAR)),
                    lambda: edited(nats("zero", *FAR), nats("random", *FAR))],
            UNTOLD: [lambda: edited(nats("zero", -1, 1), nats("random", *NEAR)), lambda: edited(nats("zero", *FAR)),
                     lambda: edited(nats("zero", *FAR, n=3), nats("random", *NEAR, n=3))]},
    "E11": {HOLDS: [lambda: edited(nats("zero", *FAR), nats("mean", *NEAR)),
                    lambda: edited(nats("zero", *FAR), nats("mean", -0.4, 0.002)),
                    lambda: edited(nats("zero", math.nan, math.nan, edited=math.inf), nats("mean", *NEAR))],
            FAILS: [lambda: edited(nats("zero", 0.05, 0.06), nats("mean", *NEAR)),
                    lambda: edited(nats("zero", *FAR), nats("mean", *FAR))],
            UNTOLD: [lambda: edited(nats("zero", 0.1, 2.0), nats("mean", *NEAR)),
                     lambda: edited(nats("zero", *FAR), nats("mean", 0, 0, change=0.0)),
                     lambda: edited(nats("zero", *FAR, n=2), nats("mean", *NEAR, n=2))]},
    "E12": {HOLDS: [lambda: edited(right("zero", 0.25, 0.3, "piqa/acc"), right("mean", *NEAR, "piqa/acc"))],
            FAILS: [lambda: edited(right("zero", 0.02, 0.1, "piqa/acc"), right("mean", *NEAR, "piqa/acc")),
                    lambda: edited(right("zero", 0.25, 0.3, "piqa/acc"), right("mean", 0.1, 0.2, "piqa/acc"))],
            UNTOLD: [lambda: edited(right("zero", 0.1, 0.3, "piqa/acc"), right("mean", *NEAR, "piqa/acc")),
                     lambda: edited(right("zero", 0.0, 0.1, "piqa/acc", base=0.51), right("mean", *NEAR, "piqa/acc")),
                     lambda: edited(nats("zero", *FAR))]},
    "E13": {HOLDS: [lambda: mapped(4, 0.9, -3.0)], FAILS: [lambda: mapped(4, 0.2, -3.0), lambda: mapped(4, 0.9, 3.0)],
            UNTOLD: [lambda: mapped(3, 0.9, -3.0), lambda: Finished(planted())]},
    "E14": {HOLDS: [lambda: attending(8, 0.1, 0.8)], FAILS: [lambda: attending(8, 0.4, 0.45)],
            UNTOLD: [lambda: attending(3, 0.1, 0.8), lambda: Finished(planted())]},
    "E15": {HOLDS: [lambda: normed(4, 0.9, 0.8)], FAILS: [lambda: normed(4, 0.1, 0.8), lambda: normed(4, 0.9, 0.1)],
            UNTOLD: [lambda: normed(2, 0.9, 0.8), lambda: Finished(planted())]},
    "E16": {HOLDS: [lambda: alike(0.95, 0.99)], FAILS: [lambda: alike(0.5, 0.7)],
            UNTOLD: [lambda: alike(0.85, 0.95), lambda: alike(0.95, 0.99, 3), lambda: alike(0.99, 1.0, math.nan),
                     lambda: alike(0.99, 1.0, scan=planted(spread=0.0))]},
    "E17": {HOLDS: [lambda: attending(8, 0.1, 0.8)],
            FAILS: [lambda: attending(8, 0.1, 0.8, 0.6), lambda: attending(8, 0.1, 0.8, 0.05, 0.06)],
            UNTOLD: [lambda: attending(2, 0.1, 0.8), lambda: Finished(planted())]},
    "E18": {HOLDS: [lambda: trainings(4, False)],
            FAILS: [lambda: trainings(4, True), lambda: trainings(4, False, loss=3.2)],
            UNTOLD: [lambda: trainings(1, False), lambda: trainings(3, True), lambda: Finished(planted())]},
    "E19": {HOLDS: [images], FAILS: [lambda: images(onset=3), lambda: images(positions=(5,))],
            UNTOLD: [lambda: images(n=3)]},
    "E20": {HOLDS: [lambda: edited(right("zero", 0.1, 0.2), right("mean", *NEAR))],
            FAILS: [lambda: edited(right("zero", *NEAR), right("mean", *NEAR)),
                    lambda: edited(right("zero", 0.1, 0.2), right("mean", 0.1, 0.2))],
            UNTOLD: [lambda: edited(right("zero", 0.0, 0.2), right("mean", *NEAR)),
                     lambda: edited(nats("zero", *FAR))]},
    "E21": {HOLDS: [lambda: images(n=64, positions=(3,))],
            FAILS: [lambda: images(n=64, positions=(5,)), lambda: images(n=64)],
            UNTOLD: [lambda: images(n=8, positions=(3,))]},
    "E22": {HOLDS: [lambda: overwritten(right("mean", *NEAR), right("zero", 0.2, 0.3))],
            FAILS: [lambda: overwritten(right("mean", 0.1, 0.2), right("zero", 0.2, 0.3))],
            UNTOLD: [lambda: overwritten(right("mean", *NEAR), right("zero", *NEAR)),
                     lambda: overwritten(right("mean", -0.1, 0.1), right("zero", 0.2, 0.3))]},
    "E23": {HOLDS: [lambda: registers(8, 0.5)], FAILS: [lambda: registers(8, 0.01)],
            UNTOLD: [lambda: registers(3, 0.5), lambda: images(explanation=explanation())]},
    "E24": {HOLDS: [lambda: contrasted(4)],
            FAILS: [lambda: contrasted(4, dims=[1]), lambda: contrasted(4, classes={"other": 9}),
                    lambda: contrasted(4, n_findings=0)],
            UNTOLD: [lambda: contrasted(2), lambda: Finished(planted(bos={"unavailable": "not asked for"}))]},
    "E25": {HOLDS: [lambda: tuned(8)], FAILS: [lambda: tuned(8, dims=(1,)), lambda: tuned(8, offset=1)],
            UNTOLD: [lambda: tuned(3), lambda: tuned(8, dims=(1, DIM)), lambda: Finished(planted())]},
    **theory_cases.CASES,
}  # fmt: skip


def test_every_claim_has_an_input_for_each_verdict() -> None:
    assert set(CASES) == set(ENTRIES)
    for name, entry in ENTRIES.items():
        assert set(CASES[name]) == set(CLAIM_VERDICTS), f"{name}: a claim that cannot fail, or cannot hold"
        assert entry.claim.fails_if.endswith(".")


@pytest.mark.parametrize(("name", "verdict", "case"), [
    pytest.param(name, verdict, case, id=f"{name}-{verdict}-{i}")
    for name, verdicts in CASES.items() for verdict, cases in verdicts.items() for i, case in enumerate(cases)
])  # fmt: skip
def test_a_claim_on_planted_tables(name: str, verdict: str, case: Case) -> None:
    found, parts = judged(name, case())
    assert found == verdict, parts
    for p in parts:
        assert p["verdict"] in CLAIM_VERDICTS and (p["verdict"] != UNTOLD or p["reason"])
        assert p["verdict"] == UNTOLD or p["n"] >= 4, "fewer than four sequences are no verdict"


def test_nothing_massive_is_no_verdict_on_what_massive_ones_do() -> None:
    """That there are some is a claim of its own; of all others nothing is said."""
    empty = Finished(planted(offset=1), explanation(), effects([]))
    said = {name: judged(name, empty)[0] for name in ENTRIES}
    assert {name for name, verdict in said.items() if verdict != UNTOLD} == {"E2", "E3"}


# ---- the rule
def test_the_interval_is_by_t() -> None:
    x = np.array([0.2, 0.5, 0.9, 0.4, 0.7])
    half = stats.t.ppf(0.975, 4) * x.std(ddof=1) / np.sqrt(5)
    p = averaged("x", [*x, math.nan], least=0.1)
    assert p["low"] == pytest.approx(x.mean() - half) and p["high"] == pytest.approx(x.mean() + half) and p["n"] == 5
    logs = averaged("x", x, log=True, least=0.1)
    half = stats.t.ppf(0.975, 4) * np.log(x).std(ddof=1) / np.sqrt(5)
    assert logs["low"] == pytest.approx(np.exp(np.log(x).mean() - half))


@pytest.mark.parametrize(("low", "high", "n", "verdict"), [
    (1.1, 2.0, 9, HOLDS), (0.1, 0.9, 9, FAILS), (0.9, 1.1, 9, UNTOLD), (1.1, 2.0, 3, UNTOLD), (0.1, 0.9, 3, UNTOLD),
    (1.0, 1.0, 9, HOLDS), (math.nan, math.nan, 9, UNTOLD),
])  # fmt: skip
def test_a_bound_is_kept_or_broken_by_the_whole_interval(low: float, high: float, n: int, verdict: str) -> None:
    assert bounded("x", Interval((low + high) / 2, low, high), n, least=1.0)["verdict"] == verdict
    assert bounded("x", Interval(-(low + high) / 2, -high, -low), n, most=-1.0)["verdict"] == verdict


def test_how_many_would_settle_it_does() -> None:
    x = [0.2, 0.9, 0.6, 0.7, 0.4, 0.8]
    open_ = averaged("x", x, least=0.45)
    assert open_["verdict"] == UNTOLD
    more = averaged("x", x * math.ceil(open_["n_needed"] / len(x)), least=0.45)
    assert more["verdict"] == HOLDS
    k = shared("x", 6, 10)
    assert k["verdict"] == UNTOLD and shared("x", int(0.6 * k["n_needed"]) + 1, int(k["n_needed"]))["verdict"] == HOLDS


def test_less_data_never_gives_the_stronger_claim() -> None:
    """Four sequences of a model for which a claim just holds say that it does not as seldom as the interval says."""
    draw = np.random.default_rng(0)
    wrong = sum(averaged("x", draw.normal(1.0, 1.0, 4), least=0.99)["verdict"] == FAILS for _ in range(2000))
    assert wrong / 2000 < 0.04  # 2.5 % at the bound


# ---- in the record, in words, and in tables
def test_a_record_has_claims_beside_published_values_and_an_older_one_none(tmp_path: Path) -> None:
    done = told(Finished(planted()), [ENTRIES[e] for e in ("E3", "E5", "E9", "E12")], ReproduceConfig())
    told_as = {name: (e["verdict"], e["claim"]) for name, e in done.info.experiments.items()}
    assert told_as["E3"] == told_as["E5"] == ("no published value", HOLDS) and told_as["E12"][1] == UNTOLD
    claims = done.claims
    assert set(claims["experiment"]) == {"E3", "E5", "E9", "E12"}
    assert set(claims.loc[claims["n"] > 0, "n"]) == {8}
    assert json.loads(json.dumps(done.as_dict(), allow_nan=False))["claims"][0]["experiment"] == "E3"
    done.save(tmp_path)
    again = Reproduction.open(tmp_path)
    assert again is not None and again.claims.equals(claims)
    said = reproduction_in_words(again)
    assert tells(said[0], "3 hold", "1 cannot be told") or tells(said[0], "2 hold", "2 cannot be told")
    row = claims[claims["experiment"] == "E5"].iloc[0]
    (line,) = (x for x in said if x.startswith("E5"))
    assert tells([line], f"claim {HOLDS}", number(row["value"]), "8 sequences", "at least 0.5")
    old = Reproduction.open(GOLDEN / "reproduced_1")
    assert old is not None and not len(old.claims)
    assert all(claim_in_words(old, name) == NOT_RECORDED for name in old.info.experiments)
    assert tells(reproduction_in_words(old)[0], f"{len(old.info.experiments)} {NOT_RECORDED}")


def test_the_reason_is_said_once_and_the_failing_part_alone() -> None:
    done = told(Finished(planted(offset=5, onset=5), missing={"explain": Nothing("It broke.", "failed")}),
                [ENTRIES["E4"], ENTRIES["E14"]], ReproduceConfig())  # fmt: skip
    lines = dict(x.split(", ", 1) for x in reproduction_in_words(done)[1:3])
    assert lines["E14"].count("It broke") == 1 and lines["E14"].endswith(f"[claim {UNTOLD}]")
    failing = done.claims[(done.claims["experiment"] == "E4") & (done.claims["verdict"] == FAILS)]
    others = done.claims[(done.claims["experiment"] == "E4") & (done.claims["verdict"] != FAILS)]
    said = lines["E4"].partition("[claim ")[2]
    assert all(p in said for p in failing["part"]) and not any(p in said for p in others["part"])


def test_what_is_kept_of_every_sequence_averages_to_what_is_told_of_all() -> None:
    kept = Explanation.open(EXPLAINED)
    assert kept is not None and len(kept.per_sequence) == 3 * len(kept.axes)
    mean = kept.per_sequence.groupby("layer").mean(numeric_only=True)
    joined = kept.decomposition[kept.decomposition["part"] == "concat"].set_index("layer")
    axes = kept.axes.set_index("layer")
    for name, told_of_all in (("concentration", axes["concentration"]), ("constancy", joined["constancy"]),
                              ("concentration_null", axes["concentration_null"]),
                              ("null_constancy", joined["null_constancy"])):  # fmt: skip
        np.testing.assert_allclose(mean[name].loc[told_of_all.index], told_of_all, rtol=1e-6)
    old = Explanation.open(EXPLAINED.parent / "explained_4")
    assert old is not None and not len(old.per_sequence) and old.trajectory["n_folds"].isna().all()


# ---- siblings
def test_layers_behind_the_last_are_not_those_up_to_the_first() -> None:
    """Of a model that reads massive tokens in layers 3 to 11 (planted) the last layer is a group of its own."""
    rows = [{"layer": i, "after_onset": 2 < i <= 11, "concentration": 0.8 if 2 < i <= 11 else 0.1 if i <= 2 else 0.6,
             "concentration_first": 0.0, "concentration_null": 0.0} for i in range(1, L + 1)]  # fmt: skip
    told = {r["quantity"]: r["ours"] for r in concentration(Finished(planted(), explanation(axes=rows)))}
    sides = {name: value for name, value in told.items() if "layers" in name}
    assert sorted(sides.values()) == pytest.approx([0.1, 0.6, 0.8])


def test_of_no_outlier_features_none_being_massive_agrees_with_nothing() -> None:
    rows = [r for r in outlier_features(outliers(0, [])) if r["quantity"] == "of them massive dims"]
    assert rows and all(math.isnan(r["ours"]) for r in rows)
