"""`intervene`: the quartet of edits at the onset layer, and what each does to the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from massact.corpora import PADDING, Corpus
from massact.interventions.class_heads import head_of
from massact.interventions.edit_names import Setting, check_name, edit_named, of_findings
from massact.interventions.effects import Paired, effect_rows, evaluate, told_apart
from massact.interventions.labels import labelled, labels_of
from massact.interventions.massive_entries import (
    Massive,
    class_of,
    exactly,
    findings_at,
    in_all_streams,
    meant,
    pairs,
    targets_of,
)
from massact.interventions.repetition import evaluate_repetition
from massact.interventions.sinks import Sinks, unseen_attention
from massact.interventions.tasks import check_tasks, evaluate_tasks
from massact.interventions.zero_shot import ZeroShot
from massact.models import Model, with_attention_for
from massact.records.clusters import HUMP, keys_of, passing
from massact.records.errors import UserError, near
from massact.records.kinds.intervention import InterveneInfo, Intervention
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import jsonable
from massact.records.sites import Site, spanned
from massact.records.tables import frame
from massact.scans import prove_at_length, proved_at, scanned_corpus, scanned_inputs
from massact.trace import AttentionEdit, Edit, KeyValueEdit
from massact.trace.edits import AnyEdit, parts_of
from massact.verbs.intervene import InterveneConfig

EACH, MOST_TOLD = "each", 6  # every cluster for itself, too; so many are named
LEAST_HELD_OUT = 8  # sequences from which on half of them are kept apart for the means


def check_edits(options: InterveneConfig) -> None:
    """Refuse an edit that there is not, or one that is given twice, and tasks without lm-eval.

    Raises:
        UserError: says which are near, or what to install.
    """
    check_tasks(options.tasks)
    for i, name in enumerate(options.sets):
        check_name(name)
        if name in options.sets[:i]:
            raise UserError(f"The edit {name!r} is given twice.", do="Give it once.")


def intervene(
    model: Any,
    corpus: Any,
    scan: ScanResult,
    *,
    evaluate_on: Any = None,
    labels: Sequence[int] | str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    head: ZeroShot | str | Path | None = None,
    more: Sequence[AnyEdit] = (),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Intervention:
    """What happens without the massive activations: zero, mean, matched-random and shuffle side by side.

    Args:
        model: the scanned model, with its head; loaded, or anything that `load` takes.
        corpus: what was scanned, see `explain`.
        scan: its result.
        evaluate_on: another text for the effects (what `massact.corpus` takes); cuts, means and the shuffle's values
            are of all sequences of the scanned one then.
        labels: classes of the sequences (images) that effects are of, for accuracy; 'auto': those that the corpus came
            with; or a CSV, see `massact.interventions.labels.labels_of`.
        groups: column -> label of every such sequence: effects are also told for each label.
        head: of a model of images without one: `ZeroShot(...)`, or the file of a linear head, see
            `massact.interventions.class_heads`.
        more: further edits of the catalogue, or one's own.
        progress: called with sequences done and sequences in all.
        **options: see `InterveneConfig`.

    Raises:
        UserError: nothing was found, or a bad option.
        WorkError: an edit changed nothing.
    Source: Sun 2024, Section 3 and Table 3; Owen 2025; Parodi 2026 (controls).
    """
    config, began = InterveneConfig.of(options), time.perf_counter()
    check_edits(config)
    loaded, ready = scanned_inputs(model, corpus, scan)
    other = None if evaluate_on is None else scanned_corpus(loaded, evaluate_on, scan)
    text = ready if other is None else other
    if head is not None:
        pictures = labelled(text, labels) if isinstance(labels, str) else text.pictures
        loaded = replace(loaded, head=head_of(loaded, text, head, getattr(pictures, "classes", None)))
    classes = None if labels is None else labels_of(loaded, text, labels)
    for what, given in (groups or {}).items():
        if len(given) != text.n_sequences:
            raise UserError(
                f"{what} has {len(given)} entries for {text.n_sequences} sequences.", do="Give one for each sequence."
            )
    half = ready.n_sequences // 2 if other is None and config.hold_out and ready.n_sequences >= LEAST_HELD_OUT else 0
    chosen = _chosen(scan, config)
    targets = tuple(_told_delimiters(t, loaded, (ready, text)) for t in _targets(chosen, half, ready.n_sequences))
    here = chosen[chosen.sequence >= half] if other is None else None
    here = None if here is None else here.assign(sequence=here.sequence - half)
    if here is not None and half:
        _same_places(targets, here, half)
    if config.exact:
        if here is None:
            raise UserError("The findings of a scan are not in another text.", "exact edits them one by one.",
                            "Leave out --exact: massive entries are found again by their size.")  # fmt: skip
        targets = tuple(exactly(t, here) for t in targets)
    # Another text, or a run of an older version: does what the edits rely on hold at its length?
    stacks = [targets[0].site.stack] if targets else _read_stacks(loaded, text)
    at_length = None if proved_at(scan, text) else prove_at_length(loaded, text, stacks)
    loaded = with_attention_for(loaded, text)
    attends = list(dict.fromkeys(loaded.anatomy.together(name)[0] for name in stacks))
    setting = Setting(loaded, targets, ready.head(half) if half else ready, config.seed, config.stack)
    named = [edit_named(name, setting) for name in config.sets]
    others, passed_over = _others(scan, config, setting, half, (ready, text))
    edits = told_apart([*named, *more, *(e for e, _ in others)])
    held_out = text.part(half, trim=False) if half else text  # padding as it is: both halves are computed alike
    paired = evaluate(
        loaded, held_out, edits, batch_size=config.batch_size, progress=progress,
        labels=None if classes is None else torch.tensor(classes[half:]),
        sinks=Sinks(targets[0] if targets else None, config.all_keys, stack=attends[0]) if config.sinks else None,
    )  # fmt: skip
    columns = {column: np.array([str(x) for x in list(values)[half:]]) for column, values in (groups or {}).items()}
    info = _info(config, scan, (ready, text, half), targets)
    if at_length is not None:
        info.model["proof"] = {"at_length": jsonable(at_length)}
    info.config["labels"] = labels if isinstance(labels, str | None) else "given"
    info.config["head"] = None if loaded.head is None else loaded.head.record
    if half and classes is not None and (new := set(classes[half:]) - set(classes[:half])):
        info.notes.append(f"{len(new)} of the {len(set(classes[half:]))} classes of these images are not among the "
                          "images that cuts and means are of: class folders are read one after another.")  # fmt: skip
    if here is not None and len(targets) == 1:
        info.notes += _told(edits[: len(config.sets)], paired, targets[0], here)
    if config.sinks:
        info.notes += loaded.anatomy.unseen_attention(attends)
        if wrote := [e.name for e in edits if unseen_attention(loaded, e)]:
            info.notes.append(f"Who attends to what is not given under {', '.join(wrote)}: an edit of what attention "
                              "gives is made behind its softmax.")  # fmt: skip
    attention = [note for name in stacks for note in _of_attention_alone(loaded, name, edits)]
    info.notes += [*attention, *passed_over]
    place = targets[0].site if targets else Site(config.stack or "", -1, "")
    at = {e.name: (place.layer, _keys(targets)) for e in named if targets and _of_entries(e)}
    at |= {e.name: (layer, key) for e, (layer, key) in others}
    told = partial(effect_rows, stack=place.stack, layer=place.layer, at=at, margin=config.margin)
    rows = told(paired, groups=columns)
    rows += _more_rows(loaded, held_out, edits, (config, told, info.notes, progress))
    info.wall_s = time.perf_counter() - began
    return Intervention(info, frame("effects", rows))


def _of_attention_alone(model: Model, stack: str, edits: Sequence[AnyEdit]) -> list[str]:
    """What an edit of attention calls leaves as it is, in a model whose tokens meet elsewhere too."""
    cut = [e.name for e in edits if any(isinstance(part, AttentionEdit | KeyValueEdit) for part in parts_of(e))]
    others = model.anatomy.stack(stack).other_mixers()
    if not cut or not others:
        return []
    where = "; ".join(f"{kinds} at {spanned(layers)}" for kinds, layers in others.items())
    return [f"Edits of attention ({', '.join(cut)}) leave as it is what mixes tokens otherwise: {where}."]


def _read_stacks(model: Model, text: Corpus) -> list[str]:
    """The stacks that a text runs through."""
    return [s.name for s in model.anatomy.stacks if model.reaches(s, text.inputs)]


def _chosen(scan: ScanResult, config: InterveneConfig) -> pd.DataFrame:
    """The findings that are edited; none where the scan has none and no edit asks for them."""
    asked = config.layer != "onset" or config.cluster is not None or config.exact
    if not asked and not (scan.findings["dim"] >= 0).any() and not any(map(of_findings, config.sets)):
        return scan.findings.iloc[:0]
    chosen = _meant(scan, config)
    return chosen if config.stack is not None else in_all_streams(chosen, scan)


def _meant(scan: ScanResult, config: InterveneConfig) -> pd.DataFrame:
    """The findings that are meant, of all sequences: the onset is that of the whole scan, not of a half of it.

    Raises:
        UserError: no findings there, or no such cluster.
    """
    clusters, layer = scan.clusters, config.layer
    if config.cluster not in (None, EACH):
        clusters = clusters if config.stack is None else clusters[clusters["stack"] == config.stack]
        clusters = passing(clusters)
        names = keys_of(clusters)
        clusters = clusters[names == config.cluster]
        if not len(clusters):
            raise UserError(f"The scan has no cluster {config.cluster!r} that passes.",
                            do=near(config.cluster, [str(n) for n in names.unique()]))  # fmt: skip
        if layer not in ("onset", "all"):
            raise UserError("--cluster and a layer exclude each other.", do="Leave out one of them.")
    layers = sorted(set(layer)) if isinstance(layer, tuple | list) else [layer]
    return pd.concat([meant(scan.findings, one, config.stack, clusters) for one in layers])


def _targets(chosen: pd.DataFrame, half: int, n: int) -> tuple[Massive, ...]:
    """What is edited at every layer, the first layer first; cuts and values are of the sequences before `half`.

    Args:
        chosen: findings that are meant.
        half: 0: of all n sequences.
    """
    findings = chosen[chosen.sequence < half] if half else chosen
    if not len(chosen):
        return ()
    if not len(findings):
        row = chosen.iloc[0]
        where = "" if chosen.layer.nunique() > 1 else f" at {Site(row['stack'], int(row['layer']), row['site'])}"
        raise UserError(
            f"All findings{where} are in sequences {half} to {n - 1}, whose effects are measured.",
            f"Cuts and means are of sequences 0 to {half - 1}, which have none.",
            "Use --no-hold-out, or more sequences.",
        )
    return targets_of(findings)


def _keys(targets: Sequence[Massive]) -> str:
    """The clusters that are edited, as their names on a command line."""
    return ", ".join(dict.fromkeys(f"{d}@{c}" for t in targets for d, c in t.pairs))


def _labels(scan: ScanResult, targets: Sequence[Massive]) -> dict[str, str]:
    """The clusters that are edited, by name, with their labels."""
    mine = _of_place(scan, targets[0].site)
    label_of = dict(zip(reversed(_edited_as(mine).tolist()), reversed(mine["label"].tolist()), strict=True))
    return {key: label_of[key] for key in _keys(targets).split(", ") if key in label_of}  # of two parts the larger


def _of_place(scan: ScanResult, at: Site) -> pd.DataFrame:
    """The clusters of a stack at one point of the hidden state."""
    return scan.clusters[(scan.clusters["stack"] == at.stack) & (scan.clusters["site"] == at.point)]


def _edited_as(clusters: pd.DataFrame) -> pd.Series:
    """The names of clusters as edits tell their tokens apart: padding like other frames."""
    return keys_of(clusters.assign(position_class=class_of(clusters)))


def _without_humps(clusters: pd.DataFrame) -> pd.DataFrame:
    """Clusters of single dims that pass, but for humps."""
    mine = passing(clusters)
    return mine[(mine["label"] != HUMP) & (mine["dim"] >= 0)]


def _left(scan: ScanResult, at: Site, edited: str) -> pd.DataFrame:
    """Clusters of a place that pass and are not edited; humps are not counted."""
    mine = _without_humps(_of_place(scan, at))
    return mine[~_edited_as(mine).isin(edited.split(", "))]


def _elsewhere(scan: ScanResult, edited: Collection[str]) -> list[str]:
    """That other stacks have clusters that pass, which are not edited: one edit is of one stack."""
    having = _without_humps(scan.clusters[~scan.clusters["stack"].isin(edited)])
    return [f"Not edited: {name}, whose {', '.join(keys_of(mine).iloc[:MOST_TOLD])} pass. --stack {name} edits it."
            for name, mine in having.groupby("stack", sort=False)]  # fmt: skip


def _others(
    scan: ScanResult, config: InterveneConfig, setting: Setting, half: int, texts: tuple[Corpus, Corpus]
) -> tuple[list[tuple[AnyEdit, tuple[int, str]]], list[str]]:
    """The same edits of every other cluster, at its own onset, with its layer and name; and what is not edited."""
    if not setting.targets:
        return [], []
    at, n = setting.targets[0].site, texts[0].n_sequences
    left = _left(scan, at, _keys(setting.targets))
    edited = {t.site.stack for t in setting.targets}
    elsewhere = _elsewhere(scan, edited) if config.stack is None and config.cluster in (None, EACH) else []
    if config.cluster != EACH or not len(left):
        if not len(left) or config.layer != "onset" or config.cluster is not None:
            return [], elsewhere
        names = ", ".join((keys_of(left) + " (" + left["label"] + ")").iloc[:MOST_TOLD])
        more = f" and {len(left) - MOST_TOLD} more" if len(left) > MOST_TOLD else ""
        passed = f"Not edited, though they pass: {names}{more}. --cluster {EACH} edits each of them as well."
        return [], [passed, *elsewhere]
    made: list[tuple[AnyEdit, tuple[int, str]]] = []
    notes = elsewhere
    for (_, row), key in zip(left.iterrows(), keys_of(left), strict=True):
        chosen = meant(scan.findings, "onset", at.stack, left[left["cluster"] == row["cluster"]])
        try:
            targets = _targets(chosen, half, n)
        except UserError as error:
            notes.append(f"{key} is not edited: {error.what}")
            continue
        told = tuple(_told_delimiters(t, setting.model, texts) for t in targets)
        for edit in (edit_named(name, replace(setting, targets=told)) for name in config.sets):
            if _of_entries(edit):
                made.append((replace(edit, name=f"{edit.name} {key}"), (targets[0].site.layer, key)))
    return made, notes


def _of_entries(edit: AnyEdit) -> bool:
    """Whether an edit is of massive entries, so that every cluster can have its own."""
    return any(isinstance(part, Edit) and part.writes is not None for part in parts_of(edit))


def _told_delimiters(target: Massive, model: Model, texts: Sequence[Corpus]) -> Massive:
    """A target that tells the delimiters of some texts from other tokens, not only those that the findings are on.

    Of first tokens alone nothing else has to be told; where tokens have no spelling, none is a delimiter.
    """
    spelling = texts[0].spelling
    if spelling is None or {c for _, c in target.pairs} == {"start"}:
        return target
    reads = model.reads(model.anatomy.stack(target.site.stack)) or target.reads
    given = [text.inputs[reads] for text in texts if reads in text.inputs]
    if not given or any(x.is_floating_point() for x in given):
        return target  # a tower of images beside a text
    ids = {int(i) for x in given for i in x.unique()}
    known = frozenset(i for i in ids if spelling.is_delimiter(i))
    return replace(target, delimiters=target.delimiters | known, reads=reads)


def _same_places(targets: Sequence[Massive], here: pd.DataFrame, half: int) -> None:
    """Refuse edits that would reach no finding of the sequences whose effects are measured: all are elsewhere."""
    there = {t.site: set(pairs(findings_at(here, t.site))) for t in targets}
    if any(there.values()) and not any(there[t.site] & set(t.pairs) for t in targets):
        dims = sorted({d for found in there.values() for d, _ in found})
        raise UserError(
            f"No finding of the sequences from {half} on, whose effects are measured, would be edited.",
            f"They are at dims {dims}; dims, cuts and means are of the sequences before, whose findings are elsewhere.",
            "Use --no-hold-out, or more sequences.",
        )


def _info(
    config: InterveneConfig, scan: ScanResult, texts: tuple[Corpus, Corpus, int], targets: tuple[Massive, ...]
) -> InterveneInfo:
    ready, text, half = texts
    n = ready.n_sequences
    elsewhere = "" if text is ready else f" of {text.name}"
    info = InterveneInfo.of(
        scan.info, config.record(), text, text.n_sequences, target=jsonable(_record(scan, targets)),
        estimated_on=f"sequences 0 to {(half or n) - 1}" + (f" of {ready.name}" if elsewhere else ""),
        evaluated_on=f"sequences {half} to {text.n_sequences - 1}{elsewhere}",
    )  # fmt: skip
    if set(scan.findings.position_class) >= {PADDING, "other"}:
        info.notes.append("Findings in padding and in other frames are edited alike; means and shuffles mix them.")
    if not half and not elsewhere:
        info.notes.append("Means and cuts are of the sequences that the effects are of.")
    return info


def _record(scan: ScanResult, targets: tuple[Massive, ...]) -> dict[str, Any]:
    """What is edited, as it is recorded; nothing where no edit asks for massive activations."""
    if not targets:
        return {}
    first = targets[0]
    told = {"site": str(first.site), "dims": first.dims, "cuts": first.cuts, "means": first.means,
            "clusters": _labels(scan, targets)}  # fmt: skip
    layers, stacks = sorted({t.site.layer for t in targets}), list(dict.fromkeys(t.site.stack for t in targets))
    return told | ({"layers": layers} if len(layers) > 1 else {}) | ({"stacks": stacks} if len(stacks) > 1 else {})


def _told(edits: Sequence[AnyEdit], paired: Paired, target: Massive, findings: pd.DataFrame) -> list[str]:
    """A note where the entries that are edited are not just the findings of these sequences at that layer."""
    fired = [paired.fired[e.name] for e in edits if isinstance(e, Edit) and e.writes is not None]
    if not fired or target.only is not None:
        return []
    known, reached = findings_at(findings, target.site), int(fired[0].n_elements)
    cut = known.dim.map(dict(zip(target.dims, target.cuts, strict=True)))  # NaN, which nothing reaches, at other dims
    among = int((known.magnitude >= cut).sum())
    if reached == among == len(known):
        return []
    found = f"among them {among:,} of the {len(known):,} findings there; --exact edits the findings alone"
    return [f"Edited are all entries of these dims that reach half of the smallest finding: {reached:,}, "
            f"{found if len(known) else 'none of them a finding'}."]  # fmt: skip


def _more_rows(
    model: Model, corpus: Corpus, edits: Sequence[AnyEdit], rest: tuple[Any, ...]
) -> list[dict[str, object]]:
    """Rows of greedy samples and of lm-eval tasks."""
    config, told, notes, progress = rest
    rows: list[dict[str, object]] = []
    if config.repetition:
        samples = evaluate_repetition(model, corpus, edits)
        if isinstance(samples, str):
            notes.append(f"No samples: {samples}.")
        else:
            rows += told(samples)
    if config.tasks:
        folder = None if config.task_folder is None else Path(config.task_folder)
        done = evaluate_tasks(model, config.tasks, edits, folder=folder, limit=config.limit, progress=progress)
        for task, questions in done.items():
            rows += told(questions, task=task)
    return rows
