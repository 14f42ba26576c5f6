"""The vision toy lab in words and as tables: what was found, with intervals, and what it does not show."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.table import Table

from massact.records.kinds.shapes import COMPARED_WITH, ShapeLab
from massact.reports.lab import BIAS, CONSTANT, CONTENT, FREE, UNSEEN, _change, _interval, verdict_of
from massact.reports.legible import number, or_dash, percent, real, visible
from massact.reports.terminal import _framed, _Section, _table


def shapes_verdict(lab: ShapeLab, arm: str, target: str) -> str:
    """What the states of registers, or of the most attended patch, after the middle block are for.

    Args:
        target: "registers" or "top patch".

    Returns:
        "bias", "content", "free" or "unseen", see `lab_verdict`; compared is with other patches.
    """
    return verdict_of(lab.effect(arm, target, "zero"), lab.effect(arm, COMPARED_WITH[target], "zero"),
                      lab.effect(arm, target, "mean"))  # fmt: skip


def shapes_in_words(lab: ShapeLab) -> list[str]:
    """What a vision toy lab shows, in sentences, as far as its intervals say so.

    Args:
        lab: fresh, or of a directory.
    """
    c, corpus = lab.info.config, lab.info.corpus
    words = [
        f"Vision toy lab, drawn shapes: {real(c.get('steps')):,.0f} steps of {visible(c.get('optimiser'))}, seed "
        f"{c.get('seed')}; background {visible(c.get('background'))}. Looked at are {corpus.get('n_held_out')} "
        f"held-out images; {percent(corpus.get('background_share'))} of their patches hold no part of a shape."
    ]
    for arm in lab.arms:
        said = [_named(lab, arm), _norms(lab, arm), _attention(lab, arm)]
        said += [_state(lab, arm, target) for target in COMPARED_WITH]
        words.append(f"{visible(arm)}: {' '.join(one for one in said if one)}")
    return [*words, _not_shown(lab)]


def _named(lab: ShapeLab, arm: str) -> str:
    row = lab.last(arm)
    return f"it is right in {percent(row['accuracy'])} of the images (loss {number(row['nats'])} nats)."


def _norms(lab: ShapeLab, arm: str) -> str:
    layers = lab.layers(arm)
    row = layers.loc[layers["patch_norm_ratio"].idxmax()]
    return (
        f"The largest patch has {number(row['patch_norm_ratio'])} x the median norm, after block {int(row['layer'])}; "
        f"in {percent(row['largest_on_background'])} of the images it holds no part of the shape."
    )


def mean_attention(lab: ShapeLab, arm: str) -> pd.Series:
    """Attention at the end, mean over the blocks: the columns `..._to_...` and top_on_background."""
    columns = [c for c in lab.shapes_layers.columns if "_to_" in c or c == "top_on_background"]
    return lab.layers(arm)[columns].mean(skipna=False)


def _attention(lab: ShapeLab, arm: str) -> str:
    mean = mean_attention(lab, arm)
    if mean["class_to_class"] != mean["class_to_class"]:
        return "Its attention cannot be seen."
    even = real(lab.info.arms[arm].get("uniform_attention"))
    said = (
        f"Mean over blocks and heads, the most attended patch gets {number(mean['patches_to_top_patch'])} from the "
        f"patches and {number(mean['class_to_top_patch'])} from the class token (a head that looks everywhere alike: "
        f"{number(even, 2)}); in {percent(mean['top_on_background'])} of the images it is on the background."
    )
    for key, name in (("registers", "The registers take"), ("slot", "The slot takes")):
        if mean[f"class_to_{key}"] == mean[f"class_to_{key}"]:
            said += (
                f" {name} {number(mean[f'patches_to_{key}'])} of the patches' and {number(mean[f'class_to_{key}'])} of "
                "the class token's attention."
            )
    return said


def _state(lab: ShapeLab, arm: str, target: str) -> str:
    verdict = shapes_verdict(lab, arm, target)
    if verdict == UNSEEN:
        return ""
    zero, other, mean = (lab.effect(arm, *what) for what in
                         ((target, "zero"), (COMPARED_WITH[target], "zero"), (target, "mean")))  # fmt: skip
    assert zero is not None and other is not None and mean is not None
    states = f"{'The registers' if target == 'registers' else 'The most attended patch'} after block {lab.middle}"
    said = (
        f"{states} set to zero: loss {_change(zero)} nats ({COMPARED_WITH[target]}: {_change(other)}), to the mean: "
        f"{_change(mean)}"
    )
    constant = real(zero["cosine"]) >= CONSTANT
    return said + {
        BIAS: "; zero hurts and the mean does not, which says nothing of states that are the same in every image."
        if constant else "; zero hurts, the mean does not: a bias.",
        CONTENT: "; zero hurts, and the mean does not undo that.",
        FREE: "; zero is not seen to hurt more than elsewhere.",
    }[verdict]  # fmt: skip


def _not_shown(lab: ShapeLab) -> str:
    """What a reader must not take this for."""
    rows = lab.shapes_layers[lab.shapes_layers["layer"] >= 1]
    top, ratio, largest = (real(rows[name].max()) for name in ("top1", "ratio", "patch_norm_ratio"))
    massive, outliers = real(rows["massive"].max()), real(rows["outliers"].max())
    limit = number(lab.info.corpus.get("outlier"))
    said = []
    if not massive > 0:
        said.append(f"massive activations (|h| > 100 and >= 1,000 x the median: the greatest |h| is {number(top)}, the "
                    f"greatest ratio {number(ratio)})")  # fmt: skip
    if not outliers > 0:
        said.append(f"outlier patches (above {limit} x the median norm: the largest has {number(largest)} x)")
    intervals = "Intervals are over the images of one training: other seeds differ by more."
    return f"What this does not show: {'; '.join(said)}. {intervals}" if said else intervals


# -------------------------------------------------------------------------------------------- tables
def show_shapes(lab: ShapeLab, console: Console) -> None:
    """Print what a vision toy lab shows in words, then its tables.

    Args:
        lab: fresh, or of a directory.
        console: where to; colours and width are its own.
    """
    words = [visible(line, console.encoding) for line in shapes_in_words(lab)]
    console.print(_framed(words, console.encoding, "vision toy lab"))
    for note in lab.info.notes:
        console.print(visible(note, console.encoding), markup=False, highlight=False, style="dim")
    for title, table in (
        ("At the end, greatest of the layers (held out)", _ends(lab, console.encoding)),
        ("Attention at the end, mean over blocks, heads and images (-: not there)", _looks(lab, console.encoding)),
        ("Change of the loss (nats) when states are set", _changes(lab, console.encoding)),
    ):
        if table.row_count:
            console.print()
            console.print(_Section(title, table))


def _ends(lab: ShapeLab, encoding: str) -> Table:
    table = _table("arm", "loss", "accuracy", "max |h|", "ratio", "largest patch\n/ median", "register\n/ median",
                   "class token\n/ median", "outlier\npatches", left=("arm",), folding=("arm",))  # fmt: skip
    for arm in lab.arms:
        end, layers = lab.last(arm), lab.layers(arm)
        greatest = [layers[c].max() for c in ("top1", "ratio", "patch_norm_ratio", "register_norm_ratio",
                                              "class_norm_ratio")]  # fmt: skip
        table.add_row(visible(arm, encoding), or_dash(end["nats"]), percent(end["accuracy"]),
                      *(or_dash(x) for x in greatest), percent(layers["outliers"].max(), 2))  # fmt: skip
    return table


def _looks(lab: ShapeLab, encoding: str) -> Table:
    table = _table("arm", "from", "class\ntoken", "registers", "slot", "top\npatch", "everywhere\nalike",
                   left=("arm", "from"), folding=("arm",))  # fmt: skip
    for arm in lab.arms:
        mean, even = mean_attention(lab, arm), lab.info.arms[arm].get("uniform_attention")
        for query in ("class", "patches"):
            shares = [mean[f"{query}_to_{key}"] for key in ("class", "registers", "slot", "top_patch")]
            table.add_row(visible(arm, encoding) if query == "class" else "", query, *map(or_dash, shares),
                          or_dash(even))  # fmt: skip
    return table


def _changes(lab: ShapeLab, encoding: str) -> Table:
    """The name of each arm, then two rows for each target and layer: narrow enough for 80 columns."""
    table = _table("states, block", "set to", "change", "others, alike", "top-1", left=("states, block", "set to"),
                   folding=("states, block",))  # fmt: skip
    for arm in lab.arms:
        rows: list[tuple[str, ...]] = []
        for target, others in COMPARED_WITH.items():
            for layer in sorted(set(lab.shapes_effects["layer"])):
                zero = lab.effect(arm, target, "zero", layer)
                if zero is None:
                    continue
                rows += [
                    (f" {target}, {layer}", "zero", _interval(zero), _interval(lab.effect(arm, others, "zero", layer)),
                     f"{100 * real(zero['delta_accuracy']):+.1f}%"),
                    ("", "mean", _interval(lab.effect(arm, target, "mean", layer)), "", ""),
                ]  # fmt: skip
        if rows:
            table.add_row(visible(arm, encoding), "", "", "", "")
        for row in rows:
            table.add_row(*row)
    return table
