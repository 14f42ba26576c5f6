"""Sections of a scan: the layers, where findings are, the prompt in three dimensions, ranks."""

from __future__ import annotations

import math

import numpy as np

from massact.records.kinds.scan import ScanResult
from massact.records.kinds.trajectory import Trajectory
from massact.reports import charts
from massact.reports.kinds.scan.portrait import _kept_tokens, outline, peaks
from massact.reports.kinds.scan.views import FORMATS, Rule, StackView, census, nonfinite_note, rule_of, views
from massact.reports.parts import Chart, Facts, Part, Section, Table, Words, parts_of, table_of
from massact.reports.render.markup import figure_text
from massact.reports.spelling import listed, number, shortened, visible

CURVES = (("top1", "top 1", "--s1", "circle"), ("top2", "top 2", "--s3", "circle"),
          ("top3", "top 3", "--s4", "circle"), ("median", "median", "--s6", "triangle-up"))  # fmt: skip
# The columns that a reader wants first; all are in the folded table.
MAIN = ("stack", "site", "layer", "top1", "top2", "top3", "median", "ratio", "headroom_fp16", "nonfinite", "n_findings")
MOST_BARS, MOST_PANELS, BINS = 12, 3, 160


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
    rule, parts = rule_of(scan), []
    for view in views(scan):
        if not len(view.layers):
            continue
        parts += [_trajectory(view, rule), _headroom(view), _norms(view)]
    parts += [table_of("layers", scan.layers, "Largest and median |h| of each layer", MAIN, 600, shown_first=True),
              table_of("layers", scan.layers, "All statistics of every layer", most=600)]  # fmt: skip
    return Section("layers", "Layers", parts_of(*parts))


def _trajectory(view: StackView, rule: Rule) -> Chart:
    at, shown = view.column("layer"), {name: view.column(name) for name, *_ in CURVES}
    data = [
        charts.line(at, shown[name], label, color, symbol=symbol) for name, label, color, symbol in CURVES
    ]  # fmt: skip
    values = np.concatenate(list(shown.values()))
    layout = charts.layer_layout(
        view.n_layers, "Magnitude |h|", log=True, values=np.append(values, rule.magnitude or [])
    )
    if view.span:
        layout["shapes"] = [charts.shade(*view.span)]
    if rule.magnitude is not None:
        shape, note = charts.limit(rule.magnitude, f"|h| = {number(rule.magnitude)}, {rule.name}")
        layout["shapes"], layout["annotations"] = [*layout.get("shapes", []), shape], [note]
    mean = f", mean over {view.n_sequences:,} sequences" if view.n_sequences > 1 else ""
    where = f" Shaded: layers {view.span[0]} to {view.span[1]}, which have findings." if view.span else ""
    bad = f" {nonfinite_note(view)}; what is not finite is not drawn." if nonfinite_note(view) else ""
    title = _titled(view, "The three greatest |h| and the median of each layer")
    return Chart(title, data, layout, f"As Fig. 4 of Sun 2024{mean}.{where}{bad}", 380, log=True)


def _titled(view: StackView, title: str) -> str:
    return f"{title}: {view.label}" if view.label else title


def _headroom(view: StackView) -> Chart:
    most = view.column("max")
    limits = [(name, value) for _, name, value in FORMATS if value < 1e6]
    data = [charts.line(view.column("layer"), most, "max |h|", "--s1")]
    layout = charts.layer_layout(view.n_layers, "max |h|", log=True, values=[*most, *(v for _, v in limits)])
    drawn = [charts.limit(value, f"{name}: {number(value, 5)}") for name, value in limits]
    layout |= {"shapes": [s for s, _ in drawn], "annotations": [a for _, a in drawn], "showlegend": False}
    said = "A layer above a line overflows in that number format unless it is scaled."
    known = [(m, int(x)) for m, x in zip(most, view.column("layer"), strict=True) if math.isfinite(m)]
    if known and not math.isnan(step := view.step("bf16", max(known)[1])):
        said += f" bf16 holds all of them, in steps of {number(step)} at the largest (layer {max(known)[1]})."
    bad = nonfinite_note(view)
    return Chart(
        _titled(view, "Headroom"), data, layout, f"{said} {bad + '.' if bad else ''}".strip(), 300, width="half"
    )


def _norms(view: StackView) -> Chart:
    first, rest, at = view.column("norm_first"), view.column("norm_rest"), view.column("layer")
    data = [charts.line(at, first, "position 0", "--s1"),
            charts.line(at, rest, "all others", "--s6", symbol="triangle-up")]  # fmt: skip
    layout = charts.layer_layout(view.n_layers, "Mean L2 norm", log=True, values=np.concatenate([first, rest]))
    return Chart(_titled(view, "Norm of the first token and of the others"), data, layout, "", 300, width="half")


def where(scan: ScanResult) -> Section | None:
    """Dims, tokens and positions of the findings (Sun 2024, section 2.2); near misses."""
    if not (len(scan.findings) or len(scan.near_misses)):
        return None
    parts: list[Part | None] = []
    for view in views(scan):
        if len(view.findings):
            parts += _census(view)
        elif view.n_sequences:
            parts.append(Words([f"{view.label + ': n' if view.label else 'N'}o findings under {rule_of(scan).name}."]))
    coordinates = scan.coordinates.sort_values("count", ascending=False, kind="stable")
    findings = scan.findings.sort_values("magnitude", ascending=False, kind="stable")
    near = scan.near_misses.sort_values("ratio", ascending=False, kind="stable")
    parts += [
        table_of("coordinates", coordinates, "Coordinates: findings by layer, dim and class of position",
                 shown_first=True),
        table_of("findings", findings, "Findings, the largest first"),
        table_of("near_misses", near, "Near misses: at least half of every threshold, the highest ratio "
                 "first", most=50),
    ]  # fmt: skip
    return Section("where", "Dims, tokens, positions", parts_of(*parts))


def _census(view: StackView) -> list[Part]:
    rows = view.findings[view.findings["layer"] == view.peak_layer]
    of = f"layer {view.peak_layer}"
    by_dim = rows["dim"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    once, by_token = rows.drop_duplicates(["sequence", "pos"]), census(rows)
    by_pos = once["pos"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    dims = [f"dim {d}" if d >= 0 else "whole token" for d in by_dim.index]
    places = [f"position {p}" if p >= 0 else "no position" for p in by_pos.index]
    tokens = [f"\u201c{shortened(visible(t), 18)}\u201d" if t else "no token" for t, _ in by_token.index]
    colors = [charts.CLASSES.get(str(c), "--s6") for _, c in by_token.index]
    plain = ["--s5"] * MOST_BARS
    padding = "purple: padding; " if (rows["position_class"] == "padding").any() else ""
    classes = f" Blue: start; orange: delimiter; {padding}grey: other."
    made: list[Part] = []
    panels = (
        ("Findings by dim", dims, by_dim, plain, "", "dims", "Findings"),
        ("Tokens with findings", tokens, by_token, colors, f"Each counts once.{classes}", "tokens", "Positions"),
        ("Positions with findings", places, by_pos, plain, "", "positions", "Sequences"),
    )  # fmt: skip
    kinds = rows["modality"].value_counts()
    if len(kinds) > 1:
        named = [f"{n:,} on {visible(k) + ' tokens' if k else 'tokens of unknown modality'}" for k, n in kinds.items()]
        made.append(Words([f"Findings by modality, {of}: {listed(named)}."]))
    slots = max(4, *(min(len(labels), MOST_BARS) for _, labels, *_ in panels))
    for title, labels, counts, paint, said, noun, unit in panels:
        left = len(labels) - MOST_BARS
        more = f" {left:,} more {noun} are not shown." if left > 0 else ""
        few, values = labels[:MOST_BARS], counts.to_numpy()[:MOST_BARS]
        made.append(Chart(_titled(view, f"{title}, {of}"), [charts.bars(few, values, paint[: len(few)], unit.lower())],
                          charts.bar_layout(few, unit, slots), (said + more).strip(),
                          70 + 19 * slots, width="third"))  # fmt: skip
    return made


def portrait(scan: ScanResult) -> Section | None:
    """|h| of the prompt over tokens and dims, in three dimensions (Sun 2024, Figs. 1 to 3)."""
    made = portraits(scan)
    if not made:
        return None
    said = "One prompt: tokens along one side, dims along the other, |h| upwards. Drag to turn. "
    said += "Of every few dims a line shows the greatest, so no spike is lost."
    return Section("portrait", "One prompt in three dimensions", [Words([said]), *made])


def portraits(scan: ScanResult, only: int | None = None, title: str = "") -> list[Part]:
    """Charts of the prompt, one for each layer that is kept of it.

    Args:
        only: the place of one layer; None: the first three.
        title: goes before that of each chart.
    """
    kept = scan.portrait
    if not {"magnitude", "layers", "tokens"} <= set(kept) or 0 in kept["magnitude"].shape:
        return []
    h_PTD, rule = kept["magnitude"].astype(np.float64), rule_of(scan)
    tokens, panels = [str(t) for t in kept["tokens"]], range(min(len(h_PTD), MOST_PANELS))
    spikes = [p for panel in panels for p in peaks(h_PTD[panel], rule)]
    shown = _kept_tokens(len(tokens), list(dict.fromkeys(pos for pos, _ in spikes)))
    finite = [h_PTD[p][np.isfinite(h_PTD[p])] for p in panels]
    top = max((float(x.max()) for x in finite if x.size), default=1.0)
    return [_panel(h_PTD[p], int(kept["layers"][p]), tokens, shown, top, title)
            for p in (panels if only is None else [only])]  # fmt: skip


def _panel(h_TD: np.ndarray, layer: int, tokens: list[str], kept: list[int], top: float, title: str) -> Part:
    name, n_bad = f"{title}{', l' if title else 'L'}ayer {layer}", int((~np.isfinite(h_TD)).sum())
    if n_bad == h_TD.size:
        return Words([f"{name}: all values are NaN or Inf."])
    finite_TD = np.where(np.isfinite(h_TD), h_TD, 0.0)
    x: list[int | None] = []
    y: list[int | None] = []
    z: list[float | None] = []
    said: list[str] = []
    labels = [figure_text(_short(tokens[pos]), 14) for pos in kept]
    for i, pos in enumerate(kept):  # one trace for all tokens: a gap between two
        dims, heights = outline(finite_TD[pos], BINS)
        x += [*[i] * len(dims), None]
        y += [*(int(d) for d in dims), None]
        z += [*charts.drawable(heights, 4), None]
        said += [f"{labels[i]} (position {pos})"] * (len(dims) + 1)
    trace = {"type": "scatter3d", "mode": "lines", "x": x, "y": y, "z": z, "line": {"color": "--s1", "width": 2.5},
             "text": said, "hovertemplate": "%{text}, dim %{y}: |h| = %{z:.4~g}<extra></extra>",
             "connectgaps": False}  # fmt: skip
    every = max(1, math.ceil(len(kept) / 12))
    at = list(range(0, len(kept), every))
    scene = {
        "xaxis": {"title": {"text": ""}, "tickmode": "array", "tickvals": at, "tickfont": {"size": 10},
                  "ticktext": [_flat(tokens[kept[i]]) for i in at]},
        "yaxis": {"title": {"text": ""}, "range": [0, h_TD.shape[1]], "nticks": 4, "tickfont": {"size": 10}},
        "zaxis": {"title": {"text": ""}, "range": [0, top * 1.05 or 1.0], "nticks": 5, "tickfont": {"size": 10}},
        "aspectmode": "manual", "aspectratio": {"x": 1.15, "y": 1.15, "z": 0.95},
        "camera": {"eye": {"x": 1.15, "y": -2.1, "z": 0.85}, "center": {"x": -0.12, "y": -0.06, "z": -0.06}},
    }  # fmt: skip
    most = h_TD[np.isfinite(h_TD)].max()
    told = f"max |h| {number(most)}" + (f"; {n_bad:,} values are NaN or Inf and drawn as 0" if n_bad else "")
    some = f"; {len(kept)} of {len(tokens):,} tokens" if len(kept) < len(tokens) else ""
    return Chart(name, [trace], {"scene": scene, "showlegend": False}, f"{told}{some}.", 300, width="third")


def _flat(token: str) -> str:
    """A token for the axis of a scene, which reads tags but no entities: angle quotes stand for angle brackets."""
    return _short(token).replace("<", "\u2039").replace(">", "\u203a")


def _short(token: str) -> str:
    return shortened(visible(token.strip(" ") or token), 10) or "(empty)"


def ranks(scan: ScanResult) -> Section | None:
    """Tables 1 and 2 of Sun 2024: the ranks of |h| in one prompt and over the sequences."""
    if not len(scan.ranks):
        return None
    parts = parts_of(*(ranks_of(view, source) for view in views(scan) for source in ("prompt", "corpus")))
    return Section("ranks", "Ranks", parts) if parts else None


def ranks_of(view: StackView, source: str) -> Table | None:
    """The ranks of one stack: Table 1 of Sun 2024 of the prompt, Table 2 of the corpus."""
    rows = view.ranks[view.ranks["source"] == source]
    columns: tuple[str, ...] = ("rank", "magnitude", "value_mean")
    name = "in the prompt (Table 1 of Sun 2024)"
    if source == "corpus":
        columns, name = (*columns, "value_std", "same_dim", "n_sequences"), "over sequences (Table 2 of Sun 2024)"
    title = _titled(view, f"Ranks of |h| {name}, layer {view.shown_layer}")
    return table_of("ranks", rows, title, columns, shown_first=True)
