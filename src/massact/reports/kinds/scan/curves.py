"""Panels with the layer on the x axis: magnitudes (Fig. 4 of Sun 2024), headroom, norms."""

from __future__ import annotations

import math

import numpy as np

from massact.records.kinds.scan import ScanResult
from massact.reports import panels
from massact.reports.kinds.scan.views import FORMATS, Rule, StackView, nonfinite_note, rule_of, views
from massact.reports.panels import Color, Limit, Line, Note, Panel, Sheet
from massact.reports.spelling import number, shortened, visible

CURVES = (
    ("top1", "Top 1", Color.BLUE, "circle"),
    ("top2", "Top 2", Color.GREEN, "circle"),
    ("top3", "Top 3", Color.PURPLE, "circle"),
    ("median", "Median", Color.GREY, "triangle-up"),
)


def measured(result: ScanResult) -> list[StackView]:
    """The stacks that have layers to draw."""
    return [view for view in views(result) if len(view.layers)]


def named(result: ScanResult) -> str:
    """The model, for the head of a sheet."""
    model = result.info.model
    return shortened(visible(model.get("name") or model.get("id")), 48)


def titled(view: StackView, title: str) -> str:
    """'title: stack' where there are several."""
    return f"{title}: {view.label}" if view.label else title


def draw_layers(result: ScanResult) -> Sheet:
    """The three largest |h| and the median of every layer, on a linear and a log axis (Sun 2024, Fig. 4)."""
    rule = rule_of(result)
    return Sheet([magnitudes(view, rule) for view in measured(result)], named(result)) or panels.unmeasured()


def magnitudes(view: StackView, rule: Rule) -> Panel:
    """The three largest |h| and the median of every layer of a stack."""
    at, bad, span = view.column("layer"), nonfinite_note(view), view.span
    values = {name: view.column(name) for name, *_ in CURVES}
    limits = []
    if rule.magnitude is not None:
        limits = [Limit(rule.magnitude, f"|h| = {number(rule.magnitude)} ({shortened(rule.name, 20)})")]
    mean = f", mean over {view.n_sequences:,} sequences" if view.n_sequences > 1 else ""
    where = f" Shaded: layers {span[0]} to {span[1]}, onset to offset of the largest cluster." if span else ""
    left_out = f" {bad}; what is not finite is not drawn." if bad else ""
    lines = [Line(at, values[name], label, color, symbol) for name, label, color, symbol in CURVES]
    drawn = [*np.concatenate(list(values.values())), *(limit.value for limit in limits)]
    x, y = panels.layer_axis(view.n_layers), panels.log_axis(drawn, "Magnitude |h|")
    shades = [(span[0] - 0.5, span[1] + 0.5)] if span else []
    notes = _onset(span, view.n_layers) if span else []
    title = titled(view, "The three greatest |h| and the median of each layer")
    caption = f"As Fig. 4 of Sun 2024{mean}.{where}{left_out}"
    sees = (
        "How large the largest numbers in the hidden state are, beside the median of all of them. Massive activations: "
    )
    sees += "one or two curves jump, far above the others, and stay up until the last layers; the median does not move."
    given = (title, lines, x, y, caption, bad, limits, shades, notes, sees)
    return Panel(*given, height=340, width="full", both=True)


def _onset(span: tuple[int, int], n_layers: int) -> list[Note]:
    """Onset and offset at the top of the shaded layers, or beside them where they are few."""
    first, last = span
    if (last - first + 1) > 0.4 * (n_layers + 1):
        return [Note(first - 0.5, f"onset {first}"), *[Note(last + 0.5, f"offset {last}", ends=True)] * (last > first)]
    text = f"onset {first}, offset {last}" if last > first else f"layer {first} only"
    left = n_layers - last <= first
    return [Note(first - 0.5 if left else last + 0.5, text, ends=left)]


def draw_headroom(result: ScanResult) -> Sheet:
    """max|h| of every layer against the largest values that fp16 and fp8-e4m3 hold."""
    made = headroom(result)
    return Sheet([made], named(result)) if made else panels.unmeasured()


def headroom(result: ScanResult) -> Panel | None:
    """max|h| of every layer of every stack, and layers with NaN or Inf above every number."""
    stacks = measured(result)
    if not stacks:
        return None
    limits = [Limit(value, f"{name}: {number(value, 5)}") for _, name, value in FORMATS if value < 1e6]
    axis = panels.log_axis([*np.concatenate([v.column("max") for v in stacks]), *(x.value for x in limits)], "max |h|")
    lines, said, bad = [], ["A layer above a line overflows in that number format unless it is scaled."], []
    for view, look in zip(stacks, panels.looks(len(stacks)), strict=True):
        at, most = view.column("layer"), view.column("max")
        lines.append(Line(at, most, view.label or "max |h|", **look))
        bad += list(at[(view.column("nonfinite") > 0) | np.isinf(most)])
        known = [(m, int(x)) for m, x in zip(most, at, strict=True) if math.isfinite(m)]
        if known and not math.isnan(step := view.step("bf16", max(known)[1])):
            all_of_them = f"bf16 holds all of them, in steps of {number(step)} at the largest (layer {max(known)[1]})."
            said.append(panels.headed(view.label, all_of_them))
        said += [panels.headed(view.label, f"{nonfinite_note(view)}.")] if nonfinite_note(view) else []
    if bad:
        assert axis.limits is not None
        lines.append(Line(bad, [axis.limits[1] / 1.12] * len(bad), "NaN or Inf", Color.LIMIT, "x", ""))
    x, sees = (
        panels.layer_axis(max(v.n_layers for v in stacks)),
        "How far the largest number is from what a format holds.",
    )
    return Panel("Headroom", lines, x, axis, " ".join(said), limits=limits, sees=sees)


def draw_norms(result: ScanResult) -> Sheet:
    """Mean L2 norm of the token at position 0 and of all others, per layer."""
    return Sheet([norms(view) for view in measured(result)], named(result)) or panels.unmeasured()


def norms(view: StackView) -> Panel:
    """Mean L2 norm of the token at position 0 and of all others, of a stack."""
    first, rest, at = view.column("norm_first"), view.column("norm_rest"), view.column("layer")
    lines = [
        Line(at, first, "Position 0", Color.BLUE),
        Line(at, rest, "All other positions", Color.GREY, "triangle-up"),
    ]
    known = lines * bool(np.isfinite(panels.shown([first, rest])).any())
    y = panels.log_axis(np.concatenate([first, rest]), "Mean L2 norm")
    title = titled(view, "Norm of the first position and of the others")
    sees = (
        "The length of whole hidden states: with a massive activation on it, that of the first position is far longer."
    )
    return Panel(title, known, panels.layer_axis(view.n_layers), y, sees=sees, empty="No finite norm.")
