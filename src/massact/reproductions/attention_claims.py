"""The claims of E13 to E17, and of E23: attention concentrates on massive tokens, and adds a bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.reproductions.claims import Claim, Part, averaged, bounded, untold
from massact.reproductions.entries import Finished, Nothing, at, massive
from massact.reproductions.main_cluster import main, same_by_construction
from massact.stats.intervals import Interval

MOST_OF_IT = 0.5
CONCENTRATES = 0.1  # of the attention, more than before
ALIKE = 0.9  # cosine
NEARLY_CONSTANT = 0.25  # |u - mean| / |mean|
OF_RANDOM = 0.5  # of what random tokens vary by
TIMES_UNIFORM = 10.0
OLDER = "The explanation is older than its table of sequences: massact explain RUN writes it anew."


def explained(f: Finished) -> Explanation:
    """The explanation of the run."""
    if f.explanation is None:
        raise Nothing("It was not explained.")
    return f.explanation


def looking(f: Finished) -> list[Part]:
    """E13: of every prompt the attention on massive tokens behind the first layer, and the sign of other logits."""
    masses, signs = [], []
    for scan, explanation in f.looked().values():
        if explanation is None or not explanation.maps or not scan.found:
            continue
        maps = explanation.maps
        found = at(scan.findings, stack=str(maps["stack"]), sequence=0)
        n = maps["logits"].shape[1]
        keys = sorted({int(p) for p in found["pos"] if 0 <= p < n})
        rest = [p for p in range(n) if p not in keys]
        queries = [q for q in rest if keys and q > max(keys)]
        behind = [i for i, layer in enumerate(maps["layers"].tolist()) if len(found) and layer > found["layer"].min()]
        if not queries or not behind:
            continue
        seen = maps["logits"][behind][:, queries][:, :, rest]
        masses.append(maps["probs"][behind][:, queries][:, :, keys].sum(2).mean())
        signs.append((seen[np.isfinite(seen)] < 0).mean())
    if not masses:
        raise Nothing("No prompt has a map of attention behind a massive activation.")
    line: dict[str, Any] = {"of": "prompts", "unit": "share"}
    return [averaged("attention on massive tokens", masses, least=MOST_OF_IT, **line),
            averaged("logits elsewhere that are negative", signs, least=MOST_OF_IT, **line)]  # fmt: skip


def _sequences(f: Finished, c: object) -> pd.DataFrame:
    rows = explained(f).per_sequence
    if not len(rows):
        if len(f.explanation.axes) == 0:  # type: ignore[union-attr]
            raise Nothing("The attention of this model is not seen; the notes of the explanation say why.")
        raise Nothing(OLDER)
    return at(rows, stack=c.stack)  # type: ignore[attr-defined]


def concentrating(f: Finished) -> list[Part]:
    """E14: of every sequence the attention on massive tokens behind the first layer of the main one."""
    c = main(f.scan)
    rows, name = _sequences(f, c), "attention on massive tokens, more than before the first layer"
    after = (
        rows[(rows["layer"] > c.onset) & (rows["layer"] <= c.offset + 1)].groupby("sequence")["concentration"].mean()
    )
    before = rows[rows["layer"] <= c.onset].groupby("sequence")["concentration"].mean()
    if not len(before):
        return [
            untold(name, "They are there before the first block: there is no attention before them.", stack=c.stack)
        ]
    if not len(after):
        return [untold(name, "No block that is seen reads them.", stack=c.stack)]
    return [averaged(name, after - before, least=CONCENTRATES, unit="share", stack=c.stack)]


def sparse(f: Finished) -> list[Part]:
    """E15: of every prompt the share of the massive dims after the norm, and how sparse it is beside other tokens."""
    shares, sparser = [], []
    for scan, explanation in f.looked().values():
        if explanation is None or not scan.found:
            continue
        s = massive(scan)[0]
        rows = at(explanation.trajectory, stack=s.stack, layer=(s.onset or 0) + 1, stage="normed").set_index("group")
        if {"findings", "others"} <= set(rows.index):
            shares.append(rows.loc["findings", "massive_share"])
            sparser.append(rows.loc["findings", "sparsity"] - rows.loc["others", "sparsity"])
    if not shares:
        massive(f.scan)
        raise Nothing("No prompt has a massive activation that a later block reads.")
    return [averaged("share of |x|^2 in the massive dims", shares, least=MOST_OF_IT, of="prompts", unit="share"),
            averaged("sparser than other tokens", sparser, least=0.0, of="prompts", unit="Hoyer")]  # fmt: skip


def alike(f: Finished) -> list[Part]:
    """E16: the cosine of massive tokens of two sequences after the norm, and as keys and values."""
    c = main(f.scan)
    rows = at(explained(f).trajectory, stack=c.stack, layer=c.onset + 1, group="findings").set_index("stage")
    told = []
    for stage, called in (("normed", "after the norm"), ("k", "keys"), ("v", "values")):
        name = f"cosine {called}"
        if stage not in rows.index:
            told.append(untold(name, "It was not seen.", stack=c.stack))
            continue
        r = rows.loc[stage]
        folds = 0 if np.isnan(r["n_folds"]) else int(r["n_folds"])
        line = {"of": "folds of sequences", "unit": "mean of pairs", "stack": c.stack}
        why = same_by_construction(f.scan, c)
        if why:
            told.append(untold(name, why, n=folds, **line))
        elif np.isnan(r["n_folds"]):
            told.append(untold(name, OLDER, **line))
        else:
            found = Interval(r["cosine"], r["cosine_low"], r["cosine_high"])
            told.append(bounded(name, found, folds, least=ALIKE, **line))
    return told


def biased(f: Finished) -> list[Part]:
    """E17: of every sequence how what massive tokens add varies over queries, also beside random tokens."""
    c = main(f.scan)
    rows = _sequences(f, c)
    rows = rows[(rows["layer"] > c.onset) & (rows["layer"] <= c.offset + 1)]
    by = rows.groupby("sequence")[["constancy", "null_constancy"]].median()
    if not len(by):
        return [untold("", "No block that is seen reads them.", stack=c.stack)]
    line = {"unit": "|u - mean| / |mean|", "stack": c.stack}
    ratio = by["constancy"] / by["null_constancy"]
    return [averaged("variation over queries", by["constancy"], most=NEARLY_CONSTANT, **line),
            averaged("beside that of random tokens", ratio, most=OF_RANDOM, unit="ratio", stack=c.stack)]  # fmt: skip


def on_registers(f: Finished) -> list[Part]:
    """E23: of every image the attention that massive registers get, over that of a uniform head."""
    c = main(f.scan)
    name = "attention on the massive register, over a uniform head's"
    registers = f.means["positions"].tolist() if "positions" in f.means else []
    rows = explained(f)
    seen = at(rows.sinks, stack=c.stack, finding=True)
    seen = seen[seen["pos"].isin(registers) & (seen["layer"] > c.onset) & (seen["layer"] <= c.offset + 1)]
    if not len(seen):
        return [
            untold(name, "No register has massive activations that a later block reads.", of="images", stack=c.stack)
        ]
    T = int(at(rows.positions, stack=c.stack)["pos"].max()) + 1
    by = seen.groupby("sequence")["alpha"].mean() * T
    return [averaged(name, by, log=True, least=TIMES_UNIFORM, of="images", unit="times", stack=c.stack)]


LOOKING = Claim(
    "Massive tokens get less than half of the attention, or most logits on other tokens are positive.", looking
)
CONCENTRATING = Claim("They get less than a tenth of the attention more than up to their first layer.", concentrating)
SPARSE = Claim(
    "After the norm the massive dims have less than half of |x|^2, or it is no sparser than other tokens.", sparse
)
ALIKE_IN_ALL = Claim("The mean cosine of two of them is below 0.9 after the norm, as keys or as values.", alike)
BIASED = Claim(
    "It varies by more than a quarter of its mean, or more than half as much as what random tokens add.", biased
)
ON_REGISTERS = Claim("The massive register gets less than ten times a uniform head's attention.", on_registers)
