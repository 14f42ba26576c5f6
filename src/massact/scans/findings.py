"""From evidence and a criterion to findings, coordinates and the answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from massact.corpora import Corpus
from massact.records.answer import Peak, StackAnswer
from massact.records.clusters import alike, clusters_table, passing
from massact.records.errors import UserError
from massact.records.formats import MAXIMA
from massact.records.tables import frame
from massact.scans.criteria import Criterion, Evidence


def findings_table(rows: pd.DataFrame, rule: Criterion, texts: Mapping[str, Corpus]) -> pd.DataFrame:
    """Rows that pass (or nearly pass) a criterion, as the table `findings`.

    Criteria of whole tokens have no dim, those of dims and layers no sequence and position: -1 stands there.

    Args:
        texts: of each stack, the corpus as it reads it (`tokens_of`).
    """
    if not len(rows):
        return frame("findings")
    data = rows.copy()
    data["criterion"] = rule.name
    if rule.kind == "token":
        size = "norm" if "norm" in data else "max"
        data = data.assign(dim=-1, value=data[size], magnitude=data[size], median=np.nan, ratio=np.nan, rank=0)
    elif rule.kind == "dim":
        data = data.assign(
            sequence=-1, pos=-1, value=data["max"], magnitude=data["max"], median=np.nan, ratio=np.nan, rank=0
        )
    elif rule.kind == "layer":
        size = next(iter(rule.thresholds))
        data = data.assign(sequence=-1, pos=-1, dim=-1, value=data[size], magnitude=data[size], rank=0)
        data = data.assign(median=np.nan, ratio=np.nan)
    places = list(zip(data["stack"].map(texts), data.sequence.astype(int), data.pos.astype(int), strict=True))
    data["token_id"] = [text.token_id(s, p) if s >= 0 else -1 for text, s, p in places]
    data["token"] = [text.token(s, p) if s >= 0 else "" for text, s, p in places]
    data["position_class"] = [text.position_class(s, p) if s >= 0 else "other" for text, s, p in places]
    data["modality"] = [text.modality(s, p) if s >= 0 else "" for text, s, p in places]
    data["origin"] = [text.written_by(s, p) if s >= 0 else "" for text, s, p in places]
    data["median_so_far"] = np.nan
    order = ["stack", "site", "layer", "sequence", "rank", "pos", "dim"]
    return frame("findings", data.sort_values(order, kind="stable").to_dict("list"))


def with_modalities(seen: Evidence, texts: Mapping[str, Corpus]) -> Evidence:
    """Evidence whose candidates say what token they are on, for criteria that ask.

    Raises:
        UserError: no stack reads text and images.
    """
    c = seen.candidates
    places = c[["stack", "sequence", "pos"]].drop_duplicates()
    kinds = {
        (stack, s, p): (texts[stack].modality(s, p), texts[stack].position_class(s, p))
        for stack, s, p in places.itertuples(index=False)
    }
    if not any(text.kind == "tokens" and has_images(text) for text in texts.values()):
        raise UserError(
            "The criterion is about image tokens among text, and the corpus has none.",
            do="Give a model of images and text both: {'input_ids': ..., 'pixel_values': ...}, or another criterion.",
        )
    told = [kinds[key] for key in zip(c["stack"], c.sequence, c.pos, strict=True)]
    return replace(seen, candidates=c.assign(modality=[m for m, _ in told], position_class=[p for _, p in told]))


def has_images(text: Corpus) -> bool:
    """Whether a text holds placeholders of images."""
    ids = [] if text.modalities is None else [i for i, kind in text.modalities.ids.items() if kind == "image"]
    return bool(torch.isin(text.inputs["input_ids"], torch.tensor(ids)).any()) if ids else False


def coordinates_table(findings: pd.DataFrame, n_sequences: int) -> pd.DataFrame:
    """Findings grouped by (layer, dim, position class): how often, how large, how constant (Sun 2024, Table 2).

    Findings of whole dims and layers are of no sequence, so they have no share of the sequences: NaN.
    """
    rows = []
    keys = ["stack", "site", "layer", "dim", "position_class"]
    for key, group in findings.groupby(keys, sort=True):
        mean, std = float(group.value.mean()), float(group.value.std(ddof=0))
        tokens = group.token.value_counts()
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "count": len(group),
                "share": group.sequence.nunique() / n_sequences if (group.sequence >= 0).all() else np.nan,
                "mean": mean,
                "std": std,
                "spread": std / abs(mean) if mean else float("inf"),
                "n_tokens": len(tokens),
                "tokens": json.dumps(list(tokens.index[:8]), ensure_ascii=False),
            }
        )
    return frame("coordinates", rows)


def scanned_clusters(
    findings: pd.DataFrame, near_misses: pd.DataFrame, evidence: Evidence, n_sequences: int
) -> pd.DataFrame:
    """The table `clusters` of a scan: with the values that were kept where nothing passes, and how many tokens are."""
    norms = evidence.norms
    last = norms[norms.layer == norms.groupby("stack").layer.transform("max")] if len(norms) else norms
    sizes = last.groupby(["stack", "site"]).size().groupby("stack").max() if len(norms) else pd.Series(dtype=float)
    width = {str(stack): float(n) / n_sequences for stack, n in sizes.items()}
    kept = evidence.candidates if len(evidence.candidates) else None
    return clusters_table(findings, near_misses, n_sequences=n_sequences, n_tokens=width, kept=kept)


def stack_answer(
    stack: str,
    site: str,
    evidence: Evidence,
    tables: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
    text: Corpus,
) -> StackAnswer:
    """The answer for one stack at one site, in numbers; onset and offset are those of its largest cluster.

    Args:
        tables: findings, coordinates, clusters of all stacks.
        text: the corpus as that stack reads it (`tokens_of`).
    """

    def here(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["stack"] == stack) & (table.site == site)] if len(table) else table

    found, coords, clusters = map(here, tables)
    layers, tops = here(evidence.layers).set_index("layer"), here(evidence.candidates)
    blocks = evidence.layers[evidence.layers["stack"] == stack].drop_duplicates("layer").set_index("layer").module
    with_findings = sorted(int(layer) for layer in found.layer.unique())
    having = passing(clusters)
    main = having.iloc[0] if len(having) else None
    onset = int(main.onset) if main is not None else None
    peak = found.loc[found.magnitude.idxmax()] if len(found) else None
    at_peak = found[found.layer == peak.layer] if peak is not None else found
    before = layers["max"].get(onset - 1) if onset else None
    if peak is not None:
        coords = coords[coords.layer == peak.layer].assign(size=coords["mean"].abs())
        coords = coords.sort_values(["count", "size"], ascending=False, kind="stable")  # of two as frequent the larger
    dims = found.dim.value_counts(sort=True)
    census = at_peak.groupby(["token", "position_class"]).size().sort_values(ascending=False, kind="stable")
    return StackAnswer(
        stack=stack,
        site=site,
        n_layers=int(blocks.index.max()),
        n_findings=len(found),
        layers=with_findings,
        onset=onset,
        offset=int(main.offset) if main is not None else None,
        onset_module=str(blocks[onset]) if onset is not None else None,
        onset_jump=float(layers["max"][onset] / before) if onset is not None and before else None,
        dims=[(int(d), int(n) / len(found)) for d, n in dims.items()][:10],
        tokens=[(str(t), str(c), int(n)) for (t, c), n in census.items()][:12],
        group=position_group(at_peak, text),
        per_sequence=len(at_peak) / max(text.n_sequences, 1),
        peak=_peak(peak, text) if peak is not None else None,
        spread=float(coords.spread.iloc[0]) if peak is not None and len(coords) else None,
        largest=_largest(tops, "ratio", text),
        largest_magnitude=_largest(tops, "magnitude", text),
        headroom={name: _headroom(layers[f"headroom_{name}"]) for name in MAXIMA},
        nonfinite=int(layers.nonfinite.sum()),
        modalities=_modalities(at_peak, text),
    )


def _modalities(at_peak: pd.DataFrame, text: Corpus) -> list[tuple[str, int]]:
    """How many of some findings are on tokens of each modality, in a stack that reads more than one."""
    mixed = text.modalities is not None and (text.modalities.places or text.modalities.ids)
    if not mixed or not len(at_peak) or set(text.inputs) <= {"input_ids"}:
        return []
    return [(str(m), int(n)) for m, n in at_peak.modality.value_counts().items() if m]


def _headroom(column: pd.Series) -> tuple[float, int]:
    known = column.dropna()
    return (float(known.min()), int(known.idxmin())) if len(known) else (float("nan"), -1)


def _largest(tops: pd.DataFrame, by: str, text: Corpus) -> Peak | None:
    finite = tops[np.isfinite(tops[by])] if len(tops) else tops
    return _peak(finite.loc[finite[by].idxmax()], text) if len(finite) else None


def _peak(row: pd.Series, text: Corpus) -> Peak:
    sequence, pos = int(row["sequence"]), int(row["pos"])
    token, place = ("", "other") if sequence < 0 else (text.token(sequence, pos), text.position_class(sequence, pos))
    return Peak(
        int(row["layer"]),
        pos,
        int(row["dim"]),
        float(row["value"]),
        float(row["magnitude"]),
        float(row["median"]),
        float(row["ratio"]),
        token,
        sequence,
        place,
    )


def position_group(findings: pd.DataFrame, text: Corpus) -> str:
    """Which of the paper's three groups of models (Sun 2024, Section 2.2) the positions of one layer make."""
    if not len(findings) or (findings.sequence < 0).all():
        return "none"
    classes = set(findings.position_class)
    if classes == {"start"}:
        return "start"
    if "start" not in classes:
        return "not at the start"
    elsewhere = findings.loc[findings.position_class != "start", ["sequence", "pos"]].drop_duplicates()
    if classes == {"start", "delimiter"} and all(_first_delimiter(text, int(s)) == p for s, p in elsewhere.to_numpy()):
        return "start and first delimiter"
    return "start, delimiters and others" if "delimiter" in classes else "start and others"


def _first_delimiter(text: Corpus, sequence: int) -> int:
    return next(pos for pos in itertools.count() if text.position_class(sequence, pos) == "delimiter")


def short_answer(findings: pd.DataFrame, near_misses: pd.DataFrame, evidence: Evidence, n: int) -> dict[str, object]:
    """What the null twin and the BOS contrast report: a few numbers over all stacks.

    Onset, dims and classes are those of the largest cluster and of the others of its label.
    """
    tops = evidence.candidates
    ratio = tops.ratio[np.isfinite(tops.ratio)]
    clusters = scanned_clusters(findings, near_misses, evidence, n)
    main = alike(passing(clusters))
    classes = main.groupby("position_class", sort=False).n_findings.sum()
    return {
        "n_findings": len(findings),
        "onset": int(main.onset.iloc[0]) if len(main) else None,
        "dims": [int(d) for d in dict.fromkeys(main.dim)][:5],
        "classes": {str(k): int(v) for k, v in classes.items()},
        "largest_ratio": float(ratio.max()) if len(ratio) else float("nan"),
        "largest_magnitude": float(tops.magnitude.max()) if len(tops) else float("nan"),
    }
