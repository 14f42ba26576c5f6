"""Experiments whose steps are long or rare (tasks, labels, BOS, trainings, registers' attention), on made-up tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from massact.records.answer import Answer
from massact.records.kinds.classics import Classics, ClassicsInfo
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.scan import ScanResult, open_run
from massact.reproductions.attention_entries import concentration
from massact.reproductions.effect_entries import FIVE, accuracy, perplexity, zero_shot
from massact.reproductions.entries import Finished, Nothing
from massact.reproductions.experiments import chosen
from massact.reproductions.image_entries import register_attention
from massact.reproductions.job import told
from massact.reproductions.judgement import judged
from massact.reproductions.place_entries import outlier_features
from massact.reproductions.values import PUBLISHED
from massact.reproductions.variation_entries import bos, trained
from massact.verbs.reproduce import ReproduceConfig
from tests.facts import tells
from tests.reproductions import tables

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def scan() -> ScanResult:
    return open_run(GOLDEN / "explained_1")


def effects(metrics: dict[str, tuple[float, float, float]], text: str = "embedded") -> Intervention:
    """metric -> original, at zero, at the mean."""
    rows = [{"edit": edit, "metric": metric, "baseline": cells[0], "edited": x, "delta": x - cells[0]}
            for metric, cells in metrics.items() for edit, x in (("zero", cells[1]), ("mean", cells[2]))]  # fmt: skip
    return tables.effects(rows, text)


def by_key(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(r["quantity"], r["place"]): r["ours"] for r in rows}


def test_tasks_and_their_mean(scan: ScanResult) -> None:
    """The numbers of Table 3 for LLaMA2-7B, as shares; and without one of the five there is no mean of five."""
    cells = dict(zip(FIVE, [(0.777, 0.3, 0.777), (0.781, 0.4, 0.781), (0.691, 0.5, 0.691), (0.763, 0.3, 0.763),
                            (0.434, 0.3, 0.434)], strict=True))  # fmt: skip
    found = zero_shot(Finished(scan, intervention=effects({f"{t}/acc": c for t, c in cells.items()})))
    numbers = by_key(found)
    assert numbers["original", "piqa"] == pytest.approx(78.1) and numbers["set to zero", "winogrande"] == pytest.approx(
        50
    )
    assert numbers["original", "mean of five"] == pytest.approx(68.92)
    assert numbers["set to zero", "mean of five"] == pytest.approx(36.0)
    verdicts = [
        r["verdict"] for r in judged(found, "E12", "LLaMA2-7B", 2048, PUBLISHED) if r["place"] == "mean of five"
    ]
    assert verdicts == ["agrees"] * 3
    cells.pop("boolq")
    four = zero_shot(Finished(scan, intervention=effects({f"{t}/acc": c for t, c in cells.items()})))
    assert len(four) == 12 and not any(r["place"] == "mean of five" for r in four)
    with pytest.raises(Nothing, match="--tasks"):
        zero_shot(Finished(scan, intervention=effects({"perplexity": (1, 2, 1)})))


def test_perplexity_of_every_text_beside_its_own_published_one(scan: ScanResult) -> None:
    done = Finished(scan, intervention=effects({"perplexity": (9.0, 9.0, 9.0)}),
                    texts={"wikitext-2": effects({"perplexity": (5.47, np.inf, 5.50)}, "wikitext-2"),
                           "c4": effects({"perplexity": (7.85, 20.0, 7.86)}, "c4")})  # fmt: skip
    rows = judged(perplexity(done), "E11", "LLaMA2-7B", 2048, PUBLISHED)
    told = {(r["place"], r["quantity"]): r["verdict"] for r in rows}
    assert told["embedded", "original"] == "no published value"
    assert [told["wikitext-2", q] for q in ("original", "set to zero", "set to mean")] == ["agrees"] * 3
    assert told["c4", "set to zero"] == "differs" and told["c4", "original"] == "agrees"
    assert told["pg19", "original"] == "not run"
    longer = judged(perplexity(done), "E11", "LLaMA2-7B", 4096, PUBLISHED)
    assert not {r["verdict"] for r in longer} & {"agrees", "differs"}


def test_top_1_of_images(scan: ScanResult) -> None:
    numbers = by_key(accuracy(Finished(scan, intervention=effects({"accuracy": (0.755, 0.598, 0.755)}))))
    assert numbers == {("original", "top-1"): 75.5, ("set to zero", "top-1"): pytest.approx(59.8),
                       ("set to mean", "top-1"): 75.5}  # fmt: skip
    with pytest.raises(Nothing):
        accuracy(Finished(scan, intervention=effects({"kl": (0, 1, 0)})))


def test_outlier_features_at_both_sites(scan: ScanResult) -> None:
    at = {
        "inputs": {"n": 10, "dims": list(range(10)), "massive": []},
        "resid_post": {"n": 1, "dims": [7], "massive": [7]},
    }
    info = ClassicsInfo(outcomes={"outlier-features": {"": {"at": at}}})
    rows = judged(outlier_features(Finished(scan, classics=Classics(info))), "E7", "LLaMA2-7B", 4096, PUBLISHED)
    told = {(r["place"], r["quantity"]): (r["ours"], r["verdict"]) for r in rows}
    assert told["linear inputs", "outlier features"] == (10, "agrees")
    assert told["linear inputs", "of them massive dims"] == (0, "agrees")
    assert told["hidden state (resid_post)", "of them massive dims"] == (1, "no published value")
    refused = ClassicsInfo(outcomes={"outlier-features": {"unavailable": "why not"}})
    with pytest.raises(Nothing, match="why not"):
        outlier_features(Finished(scan, classics=Classics(refused)))


def test_with_and_without_bos(scan: ScanResult) -> None:
    side = {"n_findings": 8, "onset": 2, "dims": [2533, 1415], "classes": {"start": 4, "delimiter": 4},
            "largest_ratio": 9e3, "largest_magnitude": 2576.0, "n_sequences": 4}  # fmt: skip
    answer = replace(Answer.from_dict(scan.info.answer), bos={"with": side, "without": side | {"dims": [1415]}})
    scan = replace(scan, info=replace(scan.info, answer=answer.as_dict()))
    rows = judged(bos(Finished(scan)), "E24", "LLaMA2-7B", 4096, PUBLISHED)
    assert {r["place"]: r["verdict"] for r in rows if r["quantity"] == "dims"} == {"with BOS": "agrees",
                                                                                "without BOS": "differs"}  # fmt: skip
    none = replace(scan, info=replace(scan.info, answer=answer.as_dict() | {"bos": {"unavailable": "not asked for"}}))
    with pytest.raises(Nothing, match="not asked for"):
        bos(Finished(none))


def test_trainings_of_the_paper_and_of_another_size(scan: ScanResult) -> None:
    def run(variant: str, model: str, loss: float, massive: float, **more: Any) -> dict[str, Any]:
        columns = {"row": "run", "label": variant, "variant": variant, "model": model, "steps": 50_000.0, "max": 9.0,
                   "eval_loss": loss, "massive": massive, "trained": True, "scanned": True, "explained": False,
                   "mass_first": np.nan}  # fmt: skip
        return columns | more

    paper = pd.DataFrame([run("softmax", "gpt2-124m", 3.05, 1), run("kv-bias", "gpt2-124m", 3.03, 1)])
    told = {
        r["quantity"]: r["verdict"] for r in judged(trained(Finished(scan, trained=paper)), "E18", None, 128, PUBLISHED)
    }
    assert told["default: validation loss"] == told["KV bias: validation loss"] == told["default: massive"] == "agrees"
    assert told["KV bias: massive"] == "differs" and told["sink token: massive"] == "not run"
    small = pd.DataFrame([run("softmax", "tiny", 3.04, 1, steps=100.0), run("kv-bias", "tiny", 3.04, 0, scanned=False)])
    rows = judged(trained(Finished(scan, trained=small)), "E18", None, 128, PUBLISHED)
    assert {r["verdict"] for r in rows if "tiny" in r["place"]} == {"no published value", "nothing to show"}
    assert tells([r["reason"] for r in rows], "not", "scanned")


def test_attention_on_registers(scan: ScanResult) -> None:
    shares = pd.DataFrame([
        {"stack": "", "layer": layer, "query": q, "key": k, "mass": 0.1 * layer, "n_images": 2, "n_keys": 4.0}
        for layer in (1, 2) for q in ("class", "patches", "registers") for k in ("registers", "patches")
    ])  # fmt: skip
    rows = register_attention(Finished(scan, shares=shares))
    headlines = {r["quantity"] for r in rows if r["headline"]}
    assert len(rows) == 8 and headlines == {f"attention of {q} on registers" for q in ("class", "patches")}
    assert {r["layer"] for r in rows if r["headline"]} == {2}
    for without in (None, shares[shares["key"] != "registers"]):
        with pytest.raises(Nothing):
            register_attention(Finished(scan, shares=without))


def test_unavailable_attention_is_no_zero(scan: ScanResult) -> None:
    """A layer whose attention is not seen has no row; where none is, there is a reason."""
    from massact.records.kinds.explanation import Explanation

    explanation = Explanation.open(GOLDEN / "explained_1")
    assert explanation is not None
    explanation.axes.loc[0, ["concentration", "concentration_null", "concentration_first"]] = np.nan
    rows = concentration(Finished(scan, explanation))
    assert int(explanation.axes.loc[0, "layer"]) not in {r["layer"] for r in rows}
    assert all(np.isfinite(r["ours"]) for r in rows)
    explanation.axes = explanation.axes.iloc[:0]
    with pytest.raises(Nothing, match="not seen"):
        concentration(Finished(scan, explanation))


def test_a_step_that_is_missing_says_so_in_every_experiment_that_needs_it(scan: ScanResult) -> None:
    found = Finished(scan, missing={"explain": Nothing("It broke.", "failed"), "tasks": Nothing("Ask.", "not run")})
    done = told(found, chosen(("E12", "E14", "E16", "E5")), ReproduceConfig())
    assert {n: e["verdict"] for n, e in done.info.experiments.items()} == {
        "E5": "no published value", "E12": "not run", "E14": "failed", "E16": "failed"}  # fmt: skip
    assert done.info.experiments["E14"]["reason"] == "It broke."
    empty = done.reproduced[done.reproduced["experiment"] != "E5"]
    assert len(empty) == 3 and empty["ours"].isna().all()
