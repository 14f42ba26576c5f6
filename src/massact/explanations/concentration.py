"""From measured heads to tables: concentration, value drain, residual norm, stages and decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from massact.corpora import Corpus
from massact.records.anatomy import AttentionPlace
from massact.records.rules import BROADCAST, NOP, is_sink
from massact.records.sites import Site
from massact.records.tables import frame
from massact.stats.groups import GroupResult
from massact.stats.heads import PARTS, HeadResult

Heads = Mapping[Site, HeadResult]
PLAIN = (
    *("mass_first", "mass_first_uniform", "mass_findings", "mass_findings_uniform", "mass_random"),
    *("mass_random_uniform", "alpha_first", "secondary", "value_norm_first", "slot_mass"),
    *("mass_diagonal", "mass_diagonal_uniform"),
)  # columns of a head that are called as the statistic


def mean_of(x: np.ndarray, axis: int | None = None) -> Any:
    """Mean of what is available; NaN where nothing is."""
    known = ~np.isnan(x)
    n = known.sum(axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(n > 0, np.where(known, x, 0.0).sum(axis=axis) / n, np.nan)[()]


def heads_table(heads: Heads, places: Mapping[Site, AttentionPlace], eps: float) -> pd.DataFrame:
    """One row per head: the table `heads`."""
    rows = []
    for site, r in heads.items():
        means = {name: mean_of(x, axis=0) for name, x in r.per_head.items()}
        alpha_NH = r.per_head["alpha_first"]
        above_H = mean_of(np.where(np.isnan(alpha_NH), np.nan, is_sink(alpha_NH, eps)), axis=0)
        for h in range(places[site].n_heads):
            rows.append(
                {
                    "stack": site.stack, "layer": site.layer, "kind": site.point, "head": h,
                    "module": places[site].module, "sink_rate": above_H[h], "entropy_nats": means["entropy"][h],
                    "value_norm_ratio": means["value_norm_findings"][h], "update_stable_rank": r.stable_rank[h],
                    "n_sequences": len(r.sequence), "sink_type": sink_type(above_H[h], means["value_norm_first"][h]),
                    **{n: means[n][h] for n in PLAIN},
                }
            )  # fmt: skip
    return frame("heads", rows)


def sink_type(rate: float, value_norm: float) -> str:
    """What a head with a sink at position 0 gets from it: nop, broadcast or between; empty without one (Fesser 2026).

    Args:
        rate: share of sequences with a sink there.
        value_norm: norm of the value of position 0 over the mean of the others.
    """
    if not rate > 0.5 or np.isnan(value_norm):
        return ""
    return "nop" if value_norm < NOP else "broadcast" if value_norm >= BROADCAST else "between"


def positions_table(heads: Heads) -> pd.DataFrame:
    """One row per key position: alpha_k of Gu 2025 for all k, mean over the sequences in which a query sees it."""
    rows: list[pd.DataFrame] = []
    for site, r in heads.items():
        if not r.alpha or site.point.startswith("cross"):
            continue
        longest = max(map(len, r.alpha))
        counts = np.zeros((3, longest), np.int64)  # a sink is known of fewer positions than a mean
        sums = np.zeros((3, longest))
        for each in zip(r.alpha, r.alpha_max, r.sinks, strict=True):
            here = np.stack(each)
            counts[:, : here.shape[1]] += ~np.isnan(here)
            sums[:, : here.shape[1]] += np.nan_to_num(here)
        with np.errstate(invalid="ignore"):
            means = sums / counts
        named = dict(zip(("alpha", "alpha_max", "sink_rate"), means, strict=True))
        rows.append(
            pd.DataFrame({"stack": site.stack, "layer": site.layer, "pos": np.arange(longest), **named}).assign(
                n_sequences=counts[0]
            )
        )
    return frame("positions", pd.concat(rows, ignore_index=True) if rows else None)


def sinks_table(heads: Heads, texts: Mapping[str, Corpus], found: Mapping[str, Mapping[int, Any]]) -> pd.DataFrame:
    """Every token on which at least one head parks more than eps of its attention, and every token with findings."""
    rows = []
    for site, r in heads.items():
        if site.point.startswith("cross"):
            continue
        text = texts[site.stack]
        for sequence, alpha, greatest, share in zip(r.sequence, r.alpha, r.alpha_max, r.sinks, strict=False):
            mine = set(found[site.stack].get(int(sequence), ()))
            for pos in sorted({*np.flatnonzero(share > 0).tolist(), *(p for p in mine if p < len(share))}):
                at = int(sequence), int(pos)
                rows.append(
                    {
                        "stack": site.stack, "layer": site.layer, "sequence": at[0], "pos": at[1],
                        "token_id": text.token_id(*at), "token": text.token(*at),
                        "position_class": text.position_class(*at), "modality": text.modality(*at),
                        "heads": share[pos], "alpha": alpha[pos],
                        "alpha_max": greatest[pos], "finding": at[1] in mine,
                    }
                )  # fmt: skip
    return frame("sinks", rows)


def axes_table(heads: Heads, hidden: Mapping[Site, dict[str, GroupResult]], reading: set[tuple[str, int]]) -> Any:
    """Three axes side by side, one row per layer: concentration, value drain, residual norm.

    Args:
        hidden: groups of tokens before each block.
        reading: (stack, layer) of the blocks that read a hidden state with findings.
    """
    rows = []
    for site, r in heads.items():
        if site.point != "attention":
            continue
        groups = hidden.get(Site(site.stack, site.layer, "resid_pre"), {})
        both = "findings" in groups and "others" in groups and groups["others"].norm > 0
        rows.append(
            {
                "stack": site.stack, "layer": site.layer, "after_onset": (site.stack, site.layer) in reading,
                "concentration": mean_of(r.per_head["mass_findings"]),
                "concentration_uniform": mean_of(r.per_head["mass_findings_uniform"]),
                "concentration_first": mean_of(r.per_head["mass_first"]),
                "concentration_first_uniform": mean_of(r.per_head["mass_first_uniform"]),
                "concentration_null": mean_of(r.per_head["mass_random"]),
                "diagonal": mean_of(r.per_head["mass_diagonal"]),
                "diagonal_uniform": mean_of(r.per_head["mass_diagonal_uniform"]),
                "value_drain": mean_of(r.per_head["value_norm_findings"]),
                "value_drain_first": mean_of(r.per_head["value_norm_first"]),
                "residual_norm": groups["findings"].norm / groups["others"].norm if both else np.nan,
                **{f"{of}_tokens": groups[name].n_tokens if name in groups else 0
                   for of, name in (("found", "findings"), ("random", "random"), ("other", "others"))},
            }
        )  # fmt: skip
    return frame("axes", rows)


def stages_table(heads: Heads, stages: Mapping[str, Mapping[Site, dict[str, GroupResult]]]) -> pd.DataFrame:
    """Hidden state, norm, q, k, v of tokens with findings and without (Sun 2024, Fig. 7)."""
    rows = []
    for stage, sites in stages.items():
        rows += [_group_row(site, stage, group, g) for site, groups in sites.items() for group, g in groups.items()]
    for site, r in heads.items():
        if site.point == "attention":
            rows += [_group_row(site, stage, n, g) for stage, groups in r.groups.items() for n, g in groups.items()]
    return frame("trajectory", rows)


def _group_row(site: Site, stage: str, group: str, g: GroupResult) -> dict[str, object]:
    return {
        "stack": site.stack, "layer": site.layer, "stage": stage, "group": group, "n_tokens": g.n_tokens,
        "cosine": g.cosine, "cosine_low": g.cosine_low, "cosine_high": g.cosine_high,
        "n_folds": g.n_folds, "row_variance": g.row_variance, "sparsity": g.sparsity, "massive_share": g.share,
        "max": g.max, "norm": g.norm,
    }  # fmt: skip


def decomposition_table(heads: Heads) -> pd.DataFrame:
    """What the tokens with findings add to all others, beside random tokens (Sun 2024, Eq. 2, Fig. 8)."""
    rows = []
    for site, r in heads.items():
        if site.point != "attention" or np.isnan(r.residual).all():
            continue
        for part in PARTS:
            row: dict[str, object] = {"stack": site.stack, "layer": site.layer, "part": part}
            for of, prefix in (("findings", ""), ("random", "null_")):
                row |= {
                    f"{prefix}{name}": mean_of(r.parts[part, of, name])
                    for name in ("constancy", "cosine", "energy_share")
                }
                row[f"{prefix}between"] = r.between.get(of, np.nan) if part == "projected" else np.nan
            rows.append(
                row | {"residual_error": np.nanmax(r.residual), "n_sequences": int((~np.isnan(r.residual)).sum())}
            )
    return frame("decomposition", rows)


def sequences_table(heads: Heads) -> pd.DataFrame:
    """Of every sequence the attention on tokens with findings, and how constant what they add is: for intervals."""
    rows = []
    for site, r in heads.items():
        if site.point == "attention":
            rows.append(pd.DataFrame({
                "stack": site.stack, "layer": site.layer, "sequence": r.sequence,
                "concentration": mean_of(r.per_head["mass_findings"], axis=1),
                "concentration_null": mean_of(r.per_head["mass_random"], axis=1),
                "diagonal": mean_of(r.per_head["mass_diagonal"], axis=1),
                "constancy": r.parts["concat", "findings", "constancy"],
                "null_constancy": r.parts["concat", "random", "constancy"],
            }))  # fmt: skip
    return frame("per_sequence", pd.concat(rows, ignore_index=True) if rows else None)
