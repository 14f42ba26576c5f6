"""E18, E24 and E25: trained with explicit biases, with and without BOS, and fine-tuned (Sun 2024, 4.3, A.2, A.3)."""

from __future__ import annotations

import math
from functools import partial

from massact.records.answer import Answer
from massact.records.kinds.reproduction import NOT_RUN
from massact.reproductions.entries import Entry, Finished, Nothing, Row, answers, at, massive, plain, row
from massact.reproductions.variation_claims import ELIMINATED, KEPT_BY_TUNING, WITH_AND_WITHOUT

VARIANTS = {"softmax": "default", "kv-bias": "KV bias", "sink-token": "sink token"}


def trained(f: Finished) -> list[Row]:
    """E18: loss and massive activations of trainings that differ by how they attend."""
    assert f.trained is not None
    rows = []
    for r in at(f.trained, row="run").itertuples():
        steps = "" if math.isnan(r.steps) else f", {r.steps:,.0f} steps"
        line = partial(row, place=f"{r.model}{steps}")
        label = VARIANTS.get(str(r.variant), str(r.variant)) or str(r.label)
        if r.trained:
            rows.append(line(f"{label}: validation loss", r.eval_loss, unit="nats", headline=True))
        if r.scanned:
            rows.append(line(f"{label}: massive", text="yes" if r.massive else "no", headline=True))
            rows.append(line(f"{label}: greatest |h|", r.max, unit="|h|", headline=True))
        else:
            rows.append(line(f"{label}: massive", reason="it was not scanned"))
        if r.explained:
            rows.append(line(f"{label}: attention on position 0", r.mass_first, unit="share"))
    return rows


def bos(f: Finished) -> list[Row]:
    """E24: onset, dims and places with and without BOS."""
    both = Answer.from_dict(f.scan.info.answer).bos
    if not both or "unavailable" in both:
        why = str(both.get("unavailable", "it was not measured"))
        raise Nothing(
            f"No comparison with and without BOS: {why}.", NOT_RUN if why == "not asked for" else "nothing to show"
        )
    rows: list[Row] = []
    for name, side in both.items():
        line = partial(row, place=f"{name} BOS")
        rows += [line("massive activations", side["n_findings"], unit="count", headline=True),
                 line("largest |h|", side["largest_magnitude"], unit="|h|", headline=True)]  # fmt: skip
        if "n_sequences" in side:
            rows.append(line("sequences that these are over", side["n_sequences"], unit="count"))
        if side["n_findings"]:
            rows += [line("first layer", side["onset"], unit="layer"),
                     line("dims", text=plain(side["dims"]), headline=True),
                     line("positions", text=", ".join(sorted(side["classes"])), headline=True)]  # fmt: skip
    return rows


def tuned(f: Finished) -> list[Row]:
    """E25: the same dims, layers and positions in a tuned model?"""
    assert f.tuned is not None
    name, rows = str(f.tuned.info.model.get("name") or f.tuned.info.model.get("id")), []
    for which, scan in (("base", f.scan), (f"tuned ({name})", f.tuned)):
        s = answers(scan)[0]
        rows.append(row("massive activations", s.n_findings, unit="count", place=which, stack=s.stack))
        if s.n_findings:
            rows += [row("dims", text=plain(d for d, _ in s.dims), place=which, stack=s.stack, headline=True),
                     row("first layer", s.onset or 0, unit="layer", place=which, stack=s.stack, headline=True),
                     row("positions", text=s.group, place=which, stack=s.stack, headline=True)]  # fmt: skip
    if f.scan.found and f.tuned.found:
        ours, theirs = (set(massive(s)[0].dims) for s in (f.scan, f.tuned))
        base, other = {d for d, _ in ours}, {d for d, _ in theirs}
        rows.append(row("dims in both", len(base & other), text=plain(base & other), unit="count", headline=True))
        rows.append(row("dims in one only", len(base ^ other), text=plain(base ^ other), unit="count", headline=True))
    return rows


TRAINED = Entry(
    "E18", "4.3, Eq. 3, Figs. 9 and 10, App. B.4", "Explicit attention biases", "language", ("trained",),
    "Trainings from scratch that differ by how they attend: loss, the greatest |h|, E3.",
    "With a learned key and value GPT-2 reaches the same loss and has no massive activations.", trained, ELIMINATED,
    ("trained/figures/compare_losses.png", "trained/figures/compare_magnitudes.png"),
)  # fmt: skip
VARIATIONS = (
    Entry("E24", "App. A.3", "With and without BOS", "language", ("scan",),
          "E3 on a few sequences with the BOS token in front of them and without it.",
          "They persist; those of LLaMA2 stay where they are, on BOS as the starting token.", bos, WITH_AND_WITHOUT),
    Entry("E25", "App. A.2", "Fine-tuned models", "language", ("scan", "tuned"),
          "E3 on the same text with a tuned model; dims, layers and positions beside those of the base model.",
          "Tuned models keep the massive activations of their base, at the same dims.", tuned, KEPT_BY_TUNING),
)  # fmt: skip
