"""Sections of an explanation: attention, the bias that is added, who writes."""

from __future__ import annotations

from massact.records.kinds.explanation import Explanation
from massact.reports.kinds.explanation import attention as figures
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.kinds.scan.nouns import nouns_of
from massact.reports.panels import Panel, parts_in
from massact.reports.parts import Part, Section, Words, parts_of, said_where_empty, table_of


def attention(e: Explanation) -> Section:
    """How much attention goes to the tokens with findings, their values and norms, sinks (Sun 2024, Figs. 5 and 6)."""
    parts: list[Part | None] = [Words(story_in_words(e))]
    parts += said_where_empty(parts_in(figures.draw_axes(e)), " in this run.")
    parts += [*parts_of(*parts_in(figures.draw_heads(e)), *parts_in(figures.draw_own(e))), *_maps(e)]
    if not any(isinstance(part, Panel) for part in parts):
        parts.append(Words(["Statistics of attention are unavailable in this run; the notes say why."]))
    sinks = e.sinks.sort_values("heads", ascending=False, kind="stable")
    parts += [
        table_of("axes", e.axes, "Concentration, value drain and residual norm of each layer", shown_first=True),
        table_of("heads", e.heads, "Heads", most=1200),
        table_of("sinks", sinks, "Sinks, those of most heads first", most=100),
        table_of("positions", e.positions.sort_values("alpha", ascending=False, kind="stable"),
                 "Positions, those with most attention first", most=100),
    ]  # fmt: skip
    return Section("attention", "Attention", parts_of(*parts))


def _maps(e: Explanation) -> list[Part]:
    """The maps of the prompt, where it is short enough for a page."""
    sheet = figures.draw_maps(e)
    if sheet is None or sheet.page:
        return parts_in(sheet)
    n, words = len(e.maps["tokens"]), nouns_of(e.info.corpus, e.maps["tokens"])
    return [Words([f"The attention maps of {words.the()} ({n:,} {words.plural()}) are in figures/attention_maps."])]


def bias(e: Explanation) -> Section | None:
    """What these tokens add to all others: constant or not (Sun 2024, Eq. 2 and Figs. 7 and 8)."""
    if not (len(e.decomposition) or len(e.trajectory)):
        return None
    parts: list[Part | None] = []
    parts += parts_of(*parts_in(figures.draw_bias(e)), *parts_in(figures.draw_trajectory(e)))
    if not parts:
        parts.append(Words(["No block reads a hidden state with findings, so there is nothing that they add."]))
    parts += [
        table_of("decomposition", e.decomposition, "Decomposition: what the tokens with findings add to the others",
                 most=600),
        table_of("trajectory", e.trajectory, "From the hidden state to q, k and v", most=600),
    ]  # fmt: skip
    return Section("bias", "What they add to the others", parts_of(*parts))


def writers(e: Explanation) -> Section | None:
    """Which submodule, neuron or weight writes the massive dims, and which takes them away."""
    if not (len(e.writers) or len(e.norm_weights)):
        return None
    parts: list[Part | None] = []
    parts += parts_in(figures.draw_writers(e))
    left = len(e.writers[["stack", "dim", "position_class"]].drop_duplicates()) - figures.MOST_COORDINATES
    if left > 0:
        parts.append(Words([f"{left:,} more coordinates are in the table."]))
    roles = e.writers.assign(size=e.writers["share"].abs()).sort_values("size", ascending=False, kind="stable")
    parts += [
        table_of("writers", roles, "Writers, the largest share first"),
        table_of("neurons", e.neurons, "Neurons and experts behind each step"),
        table_of("norm_weights", e.norm_weights, "Norm weights at these dims"),
    ]
    return Section("writers", "Who writes them", parts_of(*parts))
