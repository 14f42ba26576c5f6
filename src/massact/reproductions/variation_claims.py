"""The claims of E18, E21, E24 and E25: trained with explicit biases, registers, with and without BOS, fine-tuned."""

from __future__ import annotations

import math

from massact.records.answer import Answer
from massact.records.verdicts import LEAST
from massact.reproductions.claims import FAILS, HOLDS, Claim, Part, bounded, part, shared, too_few, untold
from massact.reproductions.entries import ASK, Finished, Nothing, at
from massact.reproductions.main_cluster import main, n_sequences
from massact.stats.intervals import Interval, difference_interval, mean_interval

SAME_LOSS = 0.02  # nats, as of the published 3.04
DEFAULT, EXPLICIT = "softmax", "kv-bias"


def eliminated(f: Finished) -> list[Part]:
    """E18: trainings with a learned key and value have no massive activations and the same loss, others have some."""
    if f.trained is None:
        raise Nothing(f"It needs {ASK['trained']}.")
    runs = at(f.trained, row="run")
    plain, biased = (at(runs, variant=v) for v in (DEFAULT, EXPLICIT))
    if not len(plain) or not len(biased):
        raise Nothing(f"It needs trainings with {DEFAULT} and with {EXPLICIT}.")
    if len({(m, s) for m, s in zip(runs["model"], runs["steps"], strict=True)}) > 1:
        raise Nothing("The trainings are of different models or lengths.")
    told = []
    for name, mine, massive in (("default trainings with massive activations", plain, True),
                                ("trainings with KV bias without any", biased, False)):  # fmt: skip
        known = mine[mine["scanned"].astype(bool)]
        k = int((known["massive"].astype(bool) == massive).sum())
        told.append(shared(name, k, len(known), of="trainings"))
    if told[0]["verdict"] == FAILS:
        raise Nothing("The default trainings have no massive activations that could go away.")
    a, b = (mine["eval_loss"].dropna().to_numpy(float) for mine in (biased, plain))
    n, name = min(len(a), len(b)), "loss with KV bias, more than without"
    found = difference_interval(mean_interval(a), mean_interval(b)) if n > 1 else Interval(
        a.mean() - b.mean() if n else math.nan, math.nan, math.nan)  # fmt: skip
    return [*told, bounded(name, found, n, most=SAME_LOSS, of="trainings", unit="nats")]


def on_one_register(f: Finished) -> list[Part]:
    """E21: in most images the largest value is on the same register."""
    c = main(f.scan)
    rows = at(f.scan.findings, stack=c.stack, site=c.site, layer=c.peak_layer)
    largest = rows.loc[rows.groupby("sequence")["magnitude"].idxmax(), "pos"].to_numpy()
    registers = f.means["positions"].tolist() if "positions" in f.means else []
    most = max((int((largest == r).sum()) for r in registers), default=0)
    return [
        shared("images with the largest on one register", most, len(largest), least=0.9, of="images", stack=c.stack)
    ]


def with_and_without(f: Finished) -> list[Part]:
    """E24: with BOS there are as without, most of them at the same dim and class of positions."""
    both = Answer.from_dict(f.scan.info.answer).bos
    if not both or "unavailable" in both:
        raise Nothing(f"No comparison with and without BOS: {both.get('unavailable', 'it was not measured')}.")
    one, other = both["with"], both["without"]
    n = int(min(one.get("n_sequences", 0), other.get("n_sequences", 0)))
    if not other["n_findings"]:
        raise Nothing("Without BOS there are none, which could persist with it.")
    told = [_so("massive activations with BOS", one["n_findings"] > 0, n)]
    if one["n_findings"]:
        dims, classes = ([next(iter(side[k])) for side in (one, other)] for k in ("dims", "classes"))
        told += [_so("the dim that most are at is the same", dims[0] == dims[1], n),
                 _so("so is the class of positions", classes[0] == classes[1], n)]  # fmt: skip
    return told


def _so(name: str, so: bool, n: int) -> Part:
    """What all sequences together say, with no interval."""
    if n < LEAST:
        return untold(name, too_few(n, "sequences"), n=n, n_needed=LEAST)
    return part(name, verdict=HOLDS if so else FAILS, n=n)


def kept_by_tuning(f: Finished) -> list[Part]:
    """E25: most sequences of the tuned model have the main one of the base: its dim, at its class of positions."""
    if f.tuned is None:
        raise Nothing(f"It needs {ASK['tuned']}.")
    c = main(f.scan)
    rows = at(f.tuned.findings, dim=c.dim, position_class=c.position_class)
    rows = rows[(rows["layer"] >= c.onset) & (rows["layer"] <= c.offset)]
    name = f"sequences of the tuned model with dim {c.dim} at {c.position_class}"
    return [shared(name, rows["sequence"].nunique(), n_sequences(f.tuned), stack=c.stack)]


ELIMINATED = Claim("Half of the trainings with a learned key and value have massive activations, or lose more than "
                   f"{SAME_LOSS:g} nats.", eliminated)  # fmt: skip
ON_ONE_REGISTER = Claim(
    "In a tenth of the images or more the largest is on another token than one register.", on_one_register
)
WITH_AND_WITHOUT = Claim("With BOS there are none, or most are at another dim or class of positions.", with_and_without)
KEPT_BY_TUNING = Claim("In most sequences the tuned model has none at that dim and class of positions.", kept_by_tuning)
