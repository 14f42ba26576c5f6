"""E10 to E12 and E20: what happens without massive activations (Sun 2024, Section 3 and 5.1, Tables 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd

from massact.records.kinds.intervention import Intervention
from massact.records.kinds.reproduction import NOT_RUN
from massact.records.verdicts import NOT_JUDGED, verdict_of
from massact.reproductions.effect_claims import BREAKING, DECISIVE, DROPPING, FALLING
from massact.reproductions.entries import ASK, Entry, Finished, Nothing, Row, at, plain, row

FIVE = ("boolq", "piqa", "winogrande", "arc_easy", "arc_challenge")
FIGURE = "figures/effects.png"


def _effects(f: Finished) -> Intervention:
    if f.intervention is None:
        raise Nothing("Nothing was edited.")
    return f.intervention


def _whole(effects: pd.DataFrame, metric: str) -> pd.DataFrame:
    return at(effects, metric=metric, group="all")


def edited(f: Finished) -> list[Row]:
    """E10: what was overwritten, where, and how much."""
    done = _effects(f)
    layer = int(done.effects["layer"].iloc[0])
    line = partial(row, layer=layer, stack=str(done.effects["stack"].iloc[0]))
    rows = [line("dims", text=plain(done.info.target.get("dims") or []), headline=True)]
    for edit, mine in done.effects.groupby("edit", sort=False):
        r = mine[mine["group"] == "all"].iloc[0]
        rows.append(line("values set in a sequence", r["n_elements"] / r["n_sequences"], place=str(edit), unit="count",
                         headline=edit == "zero"))  # fmt: skip
        for metric, what in (("kl", "KL from the model as it is"), ("top1_agreement", "same first guess")):
            kl = metric == "kl"
            rows += [line(what, x, place=str(edit), unit="nats" if kl else "share", headline=kl)
                     for x in _whole(mine, metric)["edited"]]  # fmt: skip
    return rows


def perplexity(f: Finished) -> list[Row]:
    """E11: perplexity without an edit and with each, on every text."""
    rows: list[Row] = []
    for done in (_effects(f), *f.texts.values()):
        rows += _before_and_after(
            done.effects, "perplexity", place=str(done.info.corpus.get("name")), unit="perplexity"
        )
    if not rows:
        raise Nothing("The model predicts no next tokens: it has no perplexity.")
    return rows


def _before_and_after(effects: pd.DataFrame, metric: str, place: str, unit: str, scale: float = 1.0) -> Iterator[Row]:
    """The metric without an edit once, then with each."""
    rows = _whole(effects, metric)
    for i, r in enumerate(rows.itertuples()):
        line = partial(row, place=place, unit=unit, stack=str(r.stack), layer=r.layer)
        if i == 0:
            yield line("original", scale * r.baseline, headline=True)
        interval = f"change {scale * r.delta:+.4g} ({scale * r.ci_low:+.4g} to {scale * r.ci_high:+.4g})"
        said = verdict_of(r._asdict())
        interval += "" if said == NOT_JUDGED else f": {said}"
        yield line(f"set to {r.edit}" if r.edit in ("zero", "mean") else str(r.edit), scale * r.edited, text=interval,
                   headline=r.edit in ("zero", "mean", "random"))  # fmt: skip


def zero_shot(f: Finished) -> list[Row]:
    """E12: accuracy on tasks without an edit and with each, in per cent, and the mean over the paper's five."""
    effects = _effects(f).effects
    tasks = [str(m) for m in dict.fromkeys(effects["metric"]) if "/" in str(m)]
    if not tasks:
        raise Nothing(f"It needs {ASK['tasks']}.", NOT_RUN)
    rows: list[Row] = []
    for metric in tasks:
        task, _, measure = metric.partition("/")
        is_share = measure.startswith("acc")
        rows += _before_and_after(effects, metric, place=task if measure == "acc" else metric,
                                  unit="%" if is_share else measure, scale=100.0 if is_share else 1.0)  # fmt: skip
    if set(FIVE) <= {str(r["place"]) for r in rows}:
        five = pd.DataFrame([r for r in rows if r["place"] in FIVE])
        for quantity, mine in five.groupby("quantity", sort=False):
            layer = mine["layer"].iloc[0]
            rows.append(
                row(str(quantity), mine["ours"].mean(), layer=layer, place="mean of five", unit="%", headline=True)
            )
    return rows


def accuracy(f: Finished) -> list[Row]:
    """E20: top-1 without an edit and with each."""
    rows = list(_before_and_after(_effects(f).effects, "accuracy", place="top-1", unit="%", scale=100.0))
    if not rows:
        raise Nothing(f"It needs {ASK['labels']}.", NOT_RUN)
    return rows


EFFECTS = (
    Entry("E10", "3", "Overwriting them", "any", ("scan", "intervene"),
          "h <- 0 or the mean, for the massive (token, dim) at the first layer; as many values near the median <- 0.",
          "Four values of LLaMA2-7B decide; as many others, near the median, do nothing.", edited, DECISIVE, (FIGURE,)),
    Entry("E11", "3, Table 3", "Perplexity", "language", ("scan", "intervene"),
          "exp(mean cross-entropy) of disjoint windows, without and with E10.",
          "Set to zero they break the model; set to their mean nothing changes.", perplexity, BREAKING, (FIGURE,)),
    Entry("E12", "3, Table 3", "Zero-shot tasks", "language", ("scan", "intervene", "tasks"),
          "Accuracy of lm-eval on BoolQ, PIQA, WinoGrande, ARC-Easy and ARC-Challenge under E10.",
          "Set to zero accuracy falls to chance; set to their mean nothing changes.", zero_shot, FALLING, (FIGURE,)),
)  # fmt: skip
ACCURACY = Entry(
    "E20", "5.1, Table 4", "Intervention on images", "image", ("scan", "intervene", "labels"),
    "E10 on every image, the token found in each, and top-1 classification.",
    "Set to zero accuracy drops clearly; set to their mean it does not change.", accuracy, DROPPING, (FIGURE,),
)  # fmt: skip
