"""Sections of a scan: the layers, where findings are, the prompt in three dimensions, ranks."""

from __future__ import annotations

from massact.records.kinds.scan import ScanResult
from massact.records.kinds.trajectory import Trajectory
from massact.reports.kinds.scan import census, cluster_curves, curves
from massact.reports.kinds.scan.curves import titled
from massact.reports.kinds.scan.portrait import nouns
from massact.reports.kinds.scan.portrait import portrait as scenes_of
from massact.reports.kinds.scan.rises import mixed_ways
from massact.reports.kinds.scan.views import StackView, rule_of, views
from massact.reports.parts import Facts, Part, Section, Table, Words, parts_of, said_where_empty, table_of
from massact.reports.spelling import listed, number, visible

# The columns that a reader wants first; all are in the folded table.
MAIN = ("stack", "site", "layer", "top1", "top2", "top3", "median", "ratio", "headroom_fp16", "nonfinite", "n_findings")
CLUSTERS = ("stack", "site", "label", "dim", "position_class", "onset", "offset", "last", "peak_layer", "mean", "std",
            "spread", "ratio", "share", "per_sequence", "n_findings", "n_near", "tokens")  # fmt: skip


def definition(result: ScanResult | Trajectory) -> list[Part]:
    """The rule that says what is massive."""
    rule = rule_of(result)
    if not rule.name:
        return []
    constants = ", ".join(f"{k} = {number(v, 6)}" for k, v in rule.thresholds.items())
    pairs = [("Name", rule.name), ("A finding is", f"one {rule.kind}"), ("Formula", rule.formula or "not recorded"),
             ("Constants", constants or "none"), ("Source", rule.source or "not recorded")]  # fmt: skip
    return [Facts([(k, visible(v)) for k, v in pairs], "Definition of massive in this run", open=False)]


def layers(scan: ScanResult) -> Section | None:
    """The trajectory over layers (Sun 2024, Fig. 4), headroom and norms."""
    if not len(scan.layers):
        return None
    stacks, rule = curves.measured(scan), rule_of(scan)
    parts: list[Part | None] = [curves.magnitudes(view, rule) for view in stacks]
    parts += [curves.headroom(scan), *map(curves.norms, stacks)]
    main = (*MAIN[:3], *("mixer",) * mixed_ways(scan.layers), *MAIN[3:])
    parts += [table_of("layers", scan.layers, "Largest and median |h| of each layer", main, 600, shown_first=True),
              table_of("rises", scan.rises, "Where clusters rise, and what is left of them at the next attention"),
              table_of("layers", scan.layers, "All statistics of every layer", most=600)]  # fmt: skip
    return Section("layers", "Layers", parts_of(*parts))


def where(scan: ScanResult) -> Section | None:
    """Dims, tokens and positions of the findings (Sun 2024, section 2.2); near misses."""
    if not (len(scan.findings) or len(scan.near_misses)):
        return None
    rule = rule_of(scan)
    parts: list[Part | None] = [cluster_curves.clusters(v, rule) for v in views(scan) if len(v.clusters)]
    for view in views(scan):
        if len(view.findings):
            parts += [_modalities(view), *census.counts(view, nouns(scan))]
        elif view.n_sequences:
            parts.append(Words([f"{view.label + ': n' if view.label else 'N'}o findings under {rule.name}."]))
            parts.append(census.nearest(view, rule))
    parts.append(table_of("clusters", scan.clusters, "Clusters: dim and class of tokens, the largest first", CLUSTERS,
                          shown_first=True))  # fmt: skip
    coordinates = scan.coordinates.sort_values("count", ascending=False, kind="stable")
    findings = scan.findings.sort_values("magnitude", ascending=False, kind="stable")
    near = scan.near_misses.sort_values("ratio", ascending=False, kind="stable")
    parts += [
        table_of("coordinates", coordinates, "Coordinates: findings by layer, dim and class of position"),
        table_of("findings", findings, "Findings, the largest first"),
        table_of("near_misses", near, "Near misses: at least half of every threshold, the highest ratio "
                 "first", most=50),
    ]  # fmt: skip
    return Section("where", "Dims, tokens, positions", parts_of(*parts))


def _modalities(view: StackView) -> Words | None:
    """Findings of the peak layer by modality, where there are several."""
    rows = view.findings[view.findings["layer"] == view.peak_layer]
    kinds = rows["modality"].value_counts()
    if len(kinds) < 2:
        return None
    named = [f"{n:,} on {visible(k) + ' tokens' if k else 'tokens of unknown modality'}" for k, n in kinds.items()]
    return Words([f"Findings by modality, layer {view.peak_layer}: {listed(named)}."])


def portrait(scan: ScanResult) -> Section | None:
    """|h| of one sequence over positions and dims, in three dimensions (Sun 2024, Figs. 1 to 3)."""
    made = scenes_of(scan)
    if made is None:
        return None
    said = "The slider goes through the layers; drag to turn. "
    said += "Of every few dims a line shows the greatest, so no spike is lost."
    title = f"One {nouns(scan).sequence} in three dimensions"
    return Section("portrait", title, [*said_where_empty([made]), Words([said])])


def ranks(scan: ScanResult) -> Section | None:
    """Tables 1 and 2 of Sun 2024: the ranks of |h| in one prompt and over the sequences."""
    if not len(scan.ranks):
        return None
    parts = parts_of(*(ranks_of(v, source, nouns(scan).the()) for v in views(scan) for source in ("prompt", "corpus")))
    return Section("ranks", "Ranks", parts) if parts else None


def ranks_of(view: StackView, source: str, first: str) -> Table | None:
    """The ranks of one stack: Table 1 of Sun 2024 of the prompt (or what is first), Table 2 of the corpus."""
    rows = view.ranks[view.ranks["source"] == source]
    columns: tuple[str, ...] = ("rank", "magnitude", "value_mean")
    name = f"in {first} (Table 1 of Sun 2024)"
    if source == "corpus":
        columns, name = (*columns, "value_std", "same_dim", "n_sequences"), "over sequences (Table 2 of Sun 2024)"
    title = titled(view, f"Ranks of |h| {name}, layer {view.shown_layer}")
    return table_of("ranks", rows, title, columns, shown_first=True)
