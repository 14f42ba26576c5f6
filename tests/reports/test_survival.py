"""A model beside its quantised form: which runs are such a pair, and what became of each cluster (planted)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compared
import pandas as pd
import pytest
import synthetic

from massact.records.clusters import clusters_table, passing
from massact.records.kinds.comparison import Comparison, open_compared
from massact.records.kinds.scan import ScanResult
from massact.records.tables import read_table
from massact.reports import compare, comparison_in_words
from massact.reports.kinds.comparison.survival import pairs
from tests.facts import tells

INT8 = {"type": "int", "bits": 8, "strategy": "channel", "group_size": None, "symmetric": True, "dynamic": False,
        "n_modules": 21}  # fmt: skip
PACKING = {"method": "torchao", "weights": [INT8], "activations": [], "kv_cache": None, "ignored": ["lm_head"],
           "types": {"int8": 21}, "dequantised": False}  # fmt: skip


def scan_of(
    change: Callable[[pd.DataFrame], pd.DataFrame] = lambda f: f, vectors: str = "", **model: Any
) -> ScanResult:
    """A scan with two dims that are massive on two classes of tokens, its findings changed."""
    scan = synthetic.massive(n_layers=12, span=(3, 11))
    scan.findings = change(scan.findings.copy())
    scan.clusters = clusters_table(scan.findings, scan.near_misses)
    scan.info.model |= {"n_layers": {"": 12}, "d_model": {"": 4096}, "vectors_sha256": vectors} | model
    return scan


def comparison(folder: Path, **scans: ScanResult) -> Comparison:
    return compare(open_compared([compared.write(folder / name, None, scan) for name, scan in scans.items()]))


def only(c: Comparison, **at: Any) -> pd.Series:
    rows = c.survival[(c.survival[list(at)] == list(at.values())).all(axis=1)]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def scaled(factor: float, dim: int = 2533) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(findings: pd.DataFrame) -> pd.DataFrame:
        findings.loc[findings["dim"] == dim, ["value", "magnitude"]] *= factor
        return findings

    return change


def without(**at: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda f: f[~(f[list(at)] == list(at.values())).all(axis=1)]


def later(findings: pd.DataFrame) -> pd.DataFrame:
    return findings[(findings["dim"] != 2533) | (findings["layer"] >= 6)]


def elsewhere(findings: pd.DataFrame) -> pd.DataFrame:
    findings.loc[findings["dim"] == 2533, "dim"] = 77
    return findings


def flipped(findings: pd.DataFrame) -> pd.DataFrame:
    findings.loc[findings["dim"] == 2533, "value"] *= -1
    return findings


WHAT = {
    "kept": lambda f: f, "kept as 0.9": scaled(0.9), "stronger": scaled(1.5), "weaker": scaled(0.6),
    "gone": without(dim=2533), "moved": later, "moved elsewhere": elsewhere, "moved over zero": flipped,
}  # fmt: skip


@pytest.mark.parametrize("what", WHAT)
def test_what_became_of_a_cluster(what: str, tmp_path: Path) -> None:
    c = comparison(tmp_path, full=scan_of(), small=scan_of(WHAT[what], quantised=PACKING))
    old = passing(scan_of().clusters)
    verdict = what.split()[0]
    assert set(c.survival["original"]) == {"full"} and set(c.survival["quantised"]) == {"small"}
    for _, cluster in old.iterrows():
        row = only(c, dim=cluster["dim"], position_class=cluster["position_class"], cluster=cluster["cluster"])
        assert row["verdict"] == (verdict if cluster["dim"] == 2533 else "kept")
        assert (row["onset"], row["value"], row["share"]) == (cluster["onset"], cluster["mean"], cluster["share"])
        if cluster["dim"] != 2533:
            assert (row["value_quantised"], row["spread_quantised"]) == (row["value"], row["spread"])
        elif what == "gone":
            assert math.isnan(row["value_quantised"]) and row["dim_quantised"] == -1
        elif what in ("stronger", "weaker", "kept as 0.9"):
            factor = {"stronger": 1.5, "weaker": 0.6}.get(what, 0.9)
            assert row["value_quantised"] == pytest.approx(factor * row["value"])
            assert row["spread_quantised"] == pytest.approx(row["spread"])
        elif what == "moved elsewhere":
            assert row["dim_quantised"] == 77
        elif what == "moved":
            assert (row["onset"], row["onset_quantised"]) == (3, 6)
    assert len(c.survival) == len(old), "what has moved is not new as well"


def test_a_cluster_that_only_the_quantised_form_has_is_new(tmp_path: Path) -> None:
    c = comparison(tmp_path, full=scan_of(without(dim=2533)), small=scan_of(quantised=PACKING))
    new = c.survival[c.survival["verdict"] == "new"]
    assert set(new["dim"]) == {2533} and (new["cluster"] == 0).all() and new["value"].isna().all()
    assert new["value_quantised"].notna().all()


def test_fewer_sequences_are_weaker(tmp_path: Path) -> None:
    few = scan_of(quantised=PACKING)
    few.clusters.loc[few.clusters["dim"] == 2533, "share"] *= 0.5
    c = comparison(tmp_path, full=scan_of(), small=few)
    assert set(c.survival[c.survival["dim"] == 2533]["verdict"]) == {"weaker"}


def test_what_is_of_other_inputs_is_not_judged(tmp_path: Path) -> None:
    other = scan_of(quantised=PACKING)
    other.info.corpus["sha256"] = "another"
    c = comparison(tmp_path, full=scan_of(), small=other)
    assert set(c.survival["verdict"]) == {"not judged"} and c.survival["value_quantised"].notna().all()
    assert tells(comparison_in_words(c), "not judged") and tells(comparison_in_words(c), "different inputs")


def test_runs_are_a_pair_by_what_they_record(tmp_path: Path) -> None:
    """The same norms, or else the only model of that shape; a file of GGUF counts as well, another shape does not."""
    gguf = {"gguf": {"file": "x.gguf", "sha256": "", "types": {"Q4_1": 3, "F32": 2}, "settled": {}, "notes": []}}
    c = comparison(
        tmp_path, one=scan_of(vectors="a"), two=scan_of(vectors="b"), of_two=scan_of(vectors="b", quantised=PACKING),
        file=scan_of(vectors="a", **gguf), lost=scan_of(vectors="c", quantised=PACKING),
        wider=scan_of(vectors="a", d_model={"": 8192}, quantised=PACKING),
        plain=scan_of(gguf={"types": {"F16": 3}}, n_layers={"": 13}), old=scan_of(n_layers={"": 13}, quantised=PACKING),
        folded=scan_of(vectors="d", n_layers={"": 14}), hadamard=scan_of(vectors="e", n_layers={"": 14}, **gguf),
    )  # fmt: skip
    found = {(p.original.label, p.quantised.label): p.same for p in pairs(c.runs)}
    assert found == {("two", "of_two"): True, ("one", "file"): True, ("plain", "old"): None,
                     ("folded", "hadamard"): False}  # fmt: skip
    assert set(zip(c.survival["original"], c.survival["quantised"], strict=True)) == set(found)


def test_words_and_files(tmp_path: Path) -> None:
    small = scan_of(scaled(0.6), vectors="a", quantised=PACKING)
    c = comparison(tmp_path, full=scan_of(vectors="a"), small=small)
    words = comparison_in_words(c)
    n = len(passing(scan_of().clusters))
    weaker = int((c.survival["verdict"] == "weaker").sum())
    assert 0 < weaker < n
    assert tells(words, "small", "full", "torchao") and tells(words, "int8", "lm_head")
    assert tells(words, f"{n - weaker} kept", f"{weaker} weaker")
    largest = c.survival.iloc[0]
    assert tells(words, str(largest["dim"]), largest["verdict"], largest["value"], largest["value_quantised"])
    c.save(tmp_path / "out")
    pd.testing.assert_frame_equal(read_table(tmp_path / "out", "survival"), c.survival)
    assert len(c.as_dict()["survival"]) == n
    none = comparison(tmp_path / "plain", a=scan_of(), b=scan_of(scaled(0.5)))
    none.save(tmp_path / "none")
    assert not len(none.survival) and not (tmp_path / "none" / "survival.parquet").exists()
    assert not tells(comparison_in_words(none), "quantised")


def test_two_runs_without_findings(tmp_path: Path) -> None:
    a, b = synthetic.quiet(), synthetic.quiet()
    b.info.model |= {"quantised": PACKING}
    c = comparison(tmp_path, full=a, small=b)
    assert not len(c.survival) and tells(comparison_in_words(c), "Neither")
