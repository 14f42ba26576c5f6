"""`reproduce`: every experiment of the paper that applies to a model, from steps that they share."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from massact.records.errors import UserError, near
from massact.records.kinds.comparison import Comparison
from massact.records.kinds.reproduction import (
    AGREES,
    DIFFERS,
    NOT_APPLICABLE,
    NOTHING,
    UNPUBLISHED,
    VERDICTS,
    ReproduceInfo,
    Reproduction,
)
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.runinfo import git_state
from massact.records.tables import frame
from massact.reproductions.claims import Part, concluded, untold
from massact.reproductions.entries import ASK, Entry, Finished, Nothing, Row, finished, row
from massact.reproductions.experiments import ENTRIES, chosen
from massact.reproductions.judgement import KNOWN, judged, known_as
from massact.reproductions.values import PUBLISHED
from massact.reproductions.verb_steps import Progress, Work, domain
from massact.verbs.reproduce import ReproduceConfig

DOMAINS = {"language": "text", "image": "images", "other": "neither text nor images"}


def reproduce(
    target: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    model: str | None = None,
    corpus: Any = None,
    trained: Comparison | None = None,
    scan_options: dict[str, Any] | None = None,
    loading: dict[str, Any] | None = None,
    watch: tuple[Progress, Callable[[Any, Path], object]] | None = None,
    **options: Any,
) -> Reproduction:
    """Redo the experiments E1 to E25 of the founding paper, and those beyond it, that apply to a model.

    Args:
        target: the directory of a scanned run, to which everything is added; or a model (anything that `load` takes, or
            loaded), which is scanned into `out`. What a directory has already is kept.
        out: run directory for a model; not for a run.
        model, corpus: of a run: where its model and its text lie now. Of a model: corpus is the text to scan.
        trained: trainings side by side (E18), see `massact.reports.compare`.
        scan_options: of the scan of a model; loading: of `load`.
        watch: called with (stage, done, in all), and with each finished result and its folder.
        **options: see `ReproduceConfig`.

    Returns:
        The result; saved in the directory.

    Raises:
        UserError: bad options, a run whose model or text is another one, or no directory.
        WorkError: the model could not be scanned. Other steps that fail are reported with their experiments.
    Source: Sun 2024.
    """
    config, began = ReproduceConfig.of(options), time.perf_counter()
    entries = chosen(config.only)
    is_run = isinstance(target, str | os.PathLike) and os.path.isfile(Path(target) / "run.json")
    if is_run and (out is not None or scan_options):
        raise UserError("out and options of a scan are for a model, not for a run.", do="Leave them out.")
    if not is_run and (out is None or model is not None):
        raise UserError("A model is scanned into a directory of its own.", do="Give out, and no second model.")
    place = Path(target if is_run else out)  # type: ignore[arg-type]
    progress, keep = watch or (lambda *_: None, lambda *_: None)
    if config.published_as is not None and config.published_as not in KNOWN:
        raise UserError(f"There is no published model {config.published_as!r}.", do=near(config.published_as, KNOWN))
    work = Work(place, config, open_run(place) if is_run else None, model if is_run else target, corpus,
                dict(scan_options or {}), dict(loading or {}), trained, progress, keep)  # fmt: skip
    if is_run:
        known_as(work.target.info.model, config.published_as)  # type: ignore[union-attr]  # refused before any work
    work.run(entries)
    done = told(finished(place, work.missing), entries, config, work.states)
    done.info.wall_s = time.perf_counter() - began
    joined(Reproduction.open(place), done).save(place)
    return done


def joined(before: Reproduction | None, now: Reproduction) -> Reproduction:
    """What is saved: the experiments of this time, and those of an earlier time that were not asked for again."""
    if before is None or before.info.model.get("weights_sha256") != now.info.model.get("weights_sha256"):
        return now
    both = before.info.experiments | now.info.experiments
    order = [name for name in ENTRIES if name in both]

    def both_of(name: str) -> pd.DataFrame:
        old, new = getattr(before, name), getattr(now, name)
        table = pd.concat([old[~old["experiment"].isin(list(now.info.experiments))], new], ignore_index=True)
        return table.iloc[table["experiment"].map(order.index).argsort(kind="stable")].reset_index(drop=True)

    steps = before.info.steps | now.info.steps
    info = replace(now.info, experiments={name: both[name] for name in order}, steps=steps)
    return Reproduction(info, frame("reproduced", both_of("reproduced")), frame("claims", both_of("claims")))


def told(
    found: Finished, entries: list[Entry], config: ReproduceConfig, states: dict[str, dict[str, Any]] | None = None
) -> Reproduction:
    """The rows, the verdicts and the record of experiments whose steps are finished."""
    scan, kind = found.scan, domain(found.scan)
    known = known_as(scan.info.model, config.published_as)
    info = ReproduceInfo(
        config=config.record(),
        model={k: scan.info.model.get(k) for k in ("id", "name", "weights_sha256")},
        corpus={k: scan.info.corpus.get(k) for k in ("name", "sha256", "n_sequences", "seq_len")},
        git=git_state(), published=known, steps=states or {},
    )  # fmt: skip
    asked = scan.info.config
    if asked.get("thresholds") or asked.get("criterion") != "sun2024":
        rule, constants = scan.info.criterion.get("name"), dict(scan.info.criterion.get("thresholds") or {})
        told_as = ", ".join(f"{k} {v:g}" for k, v in constants.items())
        info.notes.append(f"Massive is not what the paper calls so: the rule of this run is {rule} with {told_as}.")
    if known.get("name") and scan.info.corpus.get("bos") not in ("never", None):
        info.notes.append("This run has BOS in its sequences; published values are without, where not said otherwise.")
    table: list[Row] = []
    claims: list[Row] = []
    for entry in entries:
        rows = rows_of(entry, found, kind)
        given = [r for r in rows if "verdict" not in r]
        mine = judged(given, entry.id, known.get("name"), scan.info.corpus.get("seq_len"), PUBLISHED) if given else []
        mine += [{"experiment": entry.id} | r for r in rows if "verdict" in r]
        verdict, reason = verdict_of(mine)
        parts = parts_of_claim(entry, found, kind)
        claim, why = concluded(parts)
        info.experiments[entry.id] = {
            "title": entry.title, "section": entry.section, "says": entry.says, "computation": entry.computation,
            "verdict": verdict, "reason": reason, "figures": list(entry.figures),
            "claim": claim, "claim_reason": why, "fails_if": entry.claim.fails_if,
        }  # fmt: skip
        table += mine
        claims += [{"experiment": entry.id} | p for p in parts]
    return Reproduction(info, frame("reproduced", table), frame("claims", claims))


def _check_needs(entry: Entry, found: Finished, kind: str) -> None:
    """Raise `Nothing` where an experiment has no number because of what it is about, or needs."""
    if entry.domain not in ("any", kind):
        raise Nothing(f"It is about {DOMAINS[entry.domain]}; the model reads {DOMAINS[kind]}.", NOT_APPLICABLE)
    for need in entry.needs:
        if need in found.missing and not (need == "prompts" and found.missing[need].verdict == NOT_APPLICABLE):
            raise found.missing[need]


def parts_of_claim(entry: Entry, found: Finished, kind: str) -> list[Part]:
    """The parts of the claim of one experiment; one that cannot be told, with the reason, where it has none."""
    try:
        _check_needs(entry, found, kind)
        parts = entry.claim.judge(found)
        return [p | {"of": "images"} if kind == "image" and p["of"] == "sequences" else p for p in parts]
    except Nothing as nothing:
        return [untold("", nothing.reason)]


def rows_of(entry: Entry, found: Finished, kind: str) -> list[Row]:
    """The rows of one experiment; one with a verdict and its reason where it has none."""
    try:
        _check_needs(entry, found, kind)
        return entry.run(found)
    except Nothing as nothing:
        return [row("", reason=nothing.reason) | _unpublished() | {"verdict": nothing.verdict}]


def _unpublished() -> Row:
    return {"published": float("nan"), "published_text": "", "tag": "", "source": "", "tolerance": float("nan")}


def verdict_of(rows: list[Row]) -> tuple[str, str]:
    """The verdict of an experiment, from those of its rows, with the reason or the count."""
    counts = Counter(r["verdict"] for r in rows)
    compared = counts[AGREES] + counts[DIFFERS]
    if compared:
        how = f"{counts[AGREES]} of {compared} published values agree"
        return (DIFFERS if counts[DIFFERS] else AGREES), how
    whole = [r for r in rows if not r["quantity"]]  # of the experiment, not of one number
    first = next((r["reason"] for r in whole if r["verdict"] == NOTHING and r["reason"]), "")
    for verdict in (NOTHING, UNPUBLISHED) if first else (UNPUBLISHED,):
        if counts[verdict]:
            return verdict, first
    verdict = next((v for v in VERDICTS if counts[v]), NOTHING)
    return verdict, next((r["reason"] for r in rows if r["verdict"] == verdict), "")


def listing(options: dict[str, Any], scan: ScanResult | None = None) -> list[tuple[Entry, str]]:
    """All experiments that were chosen, each with what it still needs; empty if it can run.

    Args:
        options: see `ReproduceConfig`; and "trained", whether trainings were given.
        scan: of the run, where there is one: it says whether the model reads text or images.
    """
    trained = bool(options.pop("trained", False))
    config = ReproduceConfig.of(options)
    given = {"trained": trained, "tasks": config.tasks, "labels": config.labels, "tuned": config.tuned}
    listed = []
    for entry in chosen(config.only):
        kind = None if scan is None else domain(scan)
        lacks = [ASK[n] for n in entry.needs if n in given and not given[n]]
        if kind is not None and entry.domain not in ("any", kind):
            listed.append((entry, f"not applicable: the model reads {DOMAINS[kind]}"))
        else:
            listed.append((entry, f"needs {', '.join(lacks)}" if lacks else ""))
    return listed
