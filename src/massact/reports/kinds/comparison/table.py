"""From opened runs to the tables of a comparison: numbers that the runs recorded, side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from massact.records.clusters import MASSIVE, passing
from massact.records.kinds.comparison import ComparedRun, Comparison
from massact.records.kinds.scan import ScanResult
from massact.records.tables import frame
from massact.reports.kinds.comparison.survival import survival_table
from massact.reports.kinds.scan.cluster_words import cluster_in_words
from massact.reports.kinds.scan.views import rule_of
from massact.reports.spelling import listed, number, quoted, ranges, real, shortened, visible

# Fields of a training's configuration that make it no other training: what it is called and how it is run.
INCIDENTAL = ("seed", "keep", "report_to", "per_layer", "workers", "notes", "device", "save_every", "log_every",
              "monitor_every", "monitor_sequences", "eval_every")  # fmt: skip
TRAINED = ("steps", "tokens", "train_loss", "eval_loss", "perplexity")
SCANNED = ("massive", "onset", "max", "ratio")
EXPLAINED = ("sink_rate", "mass_first", "slot_mass", "value_norm_first")
NUMBERS = (*TRAINED, *SCANNED, *EXPLAINED)
_DRAWN = ("top1", "top2", "top3", "median", "mass_first", "slot_mass")


def compare(runs: Sequence[ComparedRun], by_seed: bool = True) -> Comparison:
    """Put runs side by side.

    Args:
        runs: opened, see `open_compared`.
        by_seed: also give mean and range over the runs whose trainings differ by their seed only.
    """
    groups = _groups(runs) if by_seed else {}
    group_of = {i: name for name, places in groups.items() for i in places}
    rows = [_row(run, group_of.get(i, "")) for i, run in enumerate(runs)]
    layers = pd.concat([_layers(run, group_of.get(i, "")) for i, run in enumerate(runs)], ignore_index=True)
    table = [*rows]
    for name, places in groups.items():
        table += _over_seeds(name, [rows[i] for i in places])
    layers = pd.concat([layers, *(_layers_over_seeds(layers, name) for name in groups)], ignore_index=True)
    notes = [f"{visible(run.label)}: {visible(note)}" for run in runs for note in run.notes]
    notes += [*_untrained(runs), *_unlike(runs), *_uneven(rows, groups)]
    return Comparison(list(runs), groups, frame("compare", table), frame("compare_layers", layers), notes,
                      survival_table(runs))  # fmt: skip


# ---------------------------------------------------------------------------------------- a run
def _row(run: ComparedRun, group: str) -> dict[str, Any]:
    """The numbers of a run; NaN where it has none."""
    training, scan = run.training, run.scan
    config = training.info.config if training is not None else {}
    model = (training.info.model if training is not None else {}) or (scan.info.model if scan is not None else {})
    seed = config.get("seed")
    return {
        "label": run.label, "row": "run", "group": group, "n_runs": 1, "directory": str(run.directory),
        "model": _text(model.get("name") or model.get("id")), "variant": _text(config.get("variant")),
        "trained": training is not None, "scanned": scan is not None, "explained": run.explanation is not None,
        "cluster": "", "seed": seed if isinstance(seed, int) else -1,
        "criterion": rule_of(scan).name if scan is not None else "",
        **dict.fromkeys(NUMBERS, math.nan), **_trained(run), **_scanned(scan), **_explained(run),
    }  # fmt: skip


def _text(value: Any) -> str:
    """Text that a file can hold: a half of a surrogate pair becomes its escape."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else ""


def images(run: ComparedRun) -> bool:
    """Whether a training read images."""
    return run.training is not None and "n_images" in run.training.info.corpus


def _trained(run: ComparedRun) -> dict[str, float]:
    if run.training is None:
        return {}
    losses = run.training.info.losses
    loss = real(losses.get("eval_loss"))
    return {
        "steps": real(losses.get("step")), "tokens": real(losses.get("tokens")),
        "train_loss": real(losses.get("train_loss")), "eval_loss": loss,
        "perplexity": math.nan if images(run) else _exp(loss),
    }  # fmt: skip


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _scanned(scan: ScanResult | None) -> dict[str, Any]:
    if scan is None:
        return {}
    having = passing(scan.clusters)
    main = having.loc[having["max"].idxmax()] if len(having) else None  # of several places that of the largest
    if main is not None:
        main = having[(having[["stack", "site"]] == main[["stack", "site"]]).all(axis=1)].iloc[0]
    any_ = (having["label"] == MASSIVE).any() if rule_of(scan).kind == "element" else scan.found
    return {
        "massive": float(any_), "onset": math.nan if main is None else float(main["onset"]),
        "cluster": "" if main is None else cluster_in_words(main, rule_of(scan)),
        "max": greatest(scan.layers["max"]), "ratio": greatest(scan.layers["ratio_max"]),
    }  # fmt: skip


def _explained(run: ComparedRun) -> dict[str, float]:
    if run.explanation is None:
        return {}
    heads = run.explanation.heads
    heads = heads[heads["kind"] == "attention"]
    found = {name: mean_of(heads[name]) for name in EXPLAINED}
    # A ratio of norms is large in the few layers whose values are short: its mean would be theirs alone.
    values = heads["value_norm_first"].to_numpy(float)
    return found | {"value_norm_first": float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan}


def greatest(values: Iterable[Any]) -> float:
    """The greatest number; infinity counts, NaN does not, and of nothing it is NaN."""
    x = np.asarray(list(values), float)
    x = x[~np.isnan(x)]
    return float(x.max()) if x.size else math.nan


def mean_of(values: Iterable[Any]) -> float:
    """Mean of what is there; of nothing it is NaN."""
    x = np.asarray(list(values), float)
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else math.nan


def _layers(run: ComparedRun, group: str) -> pd.DataFrame:
    """The layers of a run, each beside its block's attention."""
    if run.scan is None:
        return frame("compare_layers")
    rows = run.scan.layers.assign(label=run.label, row="run", group=group, mass_first=math.nan, slot_mass=math.nan)
    rows["stack"] = rows["stack"].fillna("")
    if run.explanation is not None:
        heads = run.explanation.heads
        heads = heads[heads["kind"] == "attention"]
        for name in ("mass_first", "slot_mass"):
            of = {(stack, layer): mean_of(v) for (stack, layer), v in heads.groupby(["stack", "layer"])[name]}
            keys = zip(rows["stack"], rows["layer"], strict=True)
            rows[name] = [of.get((stack, layer), math.nan) for stack, layer in keys]
    return frame("compare_layers", rows.reset_index(drop=True))


# ---------------------------------------------------------------------------------------- seeds
def _groups(runs: Sequence[ComparedRun]) -> dict[str, list[int]]:
    """Runs whose finished trainings differ by their seed only."""
    alike: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if run.training is not None and run.training.info.status == "ok":
            info = run.training.info
            kept = {k: v for k, v in info.config.items() if k not in INCIDENTAL}
            key = json.dumps([kept, info.corpus.get("tokens_sha256")], sort_keys=True, default=str)
            alike.setdefault(key, []).append(i)
    several = []
    for places in alike.values():
        seeds = {json.dumps(_config(runs[i]).get("seed"), default=str) for i in places}
        if len(places) > 1 and len(seeds) == len(places):  # the same seed twice is a repetition, not a sample
            several.append(places)
    names: dict[str, list[int]] = {}
    for places in several:
        first = _stem([runs[i].label for i in places]) or _text(_config(runs[places[0]]).get("variant")) or "runs"
        name = f"{first} ({len(places)} seeds)"
        while name in names or any(name == run.label for run in runs):
            name += "'"
        names[name] = places
    return names


def _config(run: ComparedRun) -> dict[str, Any]:
    return run.training.info.config if run.training is not None else {}


def _stem(labels: list[str]) -> str:
    """What labels begin with, without a seed at its end: 'kv' of 'kv-seed1' and 'kv-seed2'."""
    first, last = min(labels), max(labels)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return re.sub(r"[-_./ =]*(?<![A-Za-z])(seeds?|s|run|r)?[-_./ =]*\d*$", "", first[:n]).rstrip("-_./ =")


def _over_seeds(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, min and max of a group of runs, each over those that have the number."""
    same = rows[0] | {"label": name, "group": name, "n_runs": len(rows), "directory": "", "seed": -1}
    same |= {flag: any(row[flag] for row in rows) for flag in ("trained", "scanned", "explained")}
    same["cluster"] = rows[0]["cluster"] if len({row["cluster"] for row in rows}) == 1 else ""
    same["criterion"] = rows[0]["criterion"] if len({row["criterion"] for row in rows}) == 1 else ""
    out = []
    for kind, of in _KINDS.items():
        out.append(same | {"row": kind} | {c: of([row[c] for row in rows]) for c in NUMBERS})
    return out


def _least(values: Iterable[Any]) -> float:
    return -greatest(-x for x in values)


_KINDS = {"mean": mean_of, "min": _least, "max": greatest}


def _layers_over_seeds(layers: pd.DataFrame, name: str) -> pd.DataFrame:
    mine, rows = layers[layers["group"] == name], []
    for (stack, site, layer), part in mine.groupby(["stack", "site", "layer"], sort=False):
        here = {"label": name, "group": name, "stack": stack, "site": site, "layer": layer}
        rows += [here | {"row": kind} | {c: of(part[c]) for c in _DRAWN} for kind, of in _KINDS.items()]
    return frame("compare_layers", rows)


# ---------------------------------------------------------------------------------------- notes
def _untrained(runs: Sequence[ComparedRun]) -> list[str]:
    """One note about all runs that are scans alone."""
    alone = [visible(run.label) for run in runs if run.training is None]
    if not alone or len(alone) == len(runs):  # none is a training: nothing is missing
        return []
    what = "is a scan" if len(alone) == 1 else "are scans"
    return [f"{listed(alone)} {what} without the record of a training (train.json), which alone has variant, steps, "
            "tokens and losses."]  # fmt: skip


def _unlike(runs: Sequence[ComparedRun]) -> list[str]:
    """What makes a difference between runs no effect of what was varied."""
    scans = [run.scan.info for run in runs if run.scan is not None]
    trained = [run.training.info for run in runs if run.training is not None]
    models = [_shape(info.model) for info in scans]
    rules = [rule_of(run.scan).in_words() for run in runs if run.scan is not None]
    eps = [number(run.explanation.info.config.get("eps")) for run in runs if run.explanation is not None]
    corpora = [f"{visible(i.corpus.get('name')) or 'corpus'} (hash {str(i.corpus.get('sha256'))[:8]})" for i in scans]
    data = [f"hash {str(info.corpus.get('tokens_sha256'))[:8]}" for info in trained]
    lengths = [number(info.losses.get("step"), 9) for info in trained]
    texts = [run.scan.portrait.get("tokens") for run in runs if run.scan is not None]
    prompts = [quoted("".join(map(str, tokens)), 40) for tokens in texts if tokens is not None]
    found = (
        ("The models are of different shape", models), ("The runs were scanned on different inputs", corpora),
        ("Fig. 9 is of different prompts", prompts),
        ("Massive is what different criteria say", rules), ("Sinks are counted with different eps", eps),
        ("The trainings read different data", data), ("The trainings are of different length, in steps", lengths),
    )  # fmt: skip
    notes = [f"{what}: {listed(list(dict.fromkeys(of)))}." for what, of in found if len(set(of)) > 1]
    for run in runs:
        if run.training is not None and run.scan is not None:
            ours, theirs = (i.model.get("weights_sha256") for i in (run.training.info, run.scan.info))
            if ours and theirs and ours != theirs:
                notes.append(f"{visible(run.label)}: its scan is of other weights than those that its training ended "
                             "with.")  # fmt: skip
        if run.scan is not None and run.scan.layers["nonfinite"].sum() > 0:
            notes.append(f"{visible(run.label)}: some values are NaN or Inf; its statistics are over the others.")
        notes += _unseen(run)
    if any(map(images, runs)):
        notes.append("The loss of an image model is over classes: it has no perplexity.")
    return notes


def _unseen(run: ComparedRun) -> list[str]:
    """Which layers the means of a run's attention are not over."""
    e = run.explanation
    found = {} if e is None else {stack: e.info.unseen_layers(stack) for stack in e.info.attention}
    return [
        f"{visible(run.label)}: its means of attention are not over layer{'s' * (len(layers) > 1)} {ranges(layers)}"
        f"{' of ' + visible(stack) if stack else ''}, where it could not be seen."
        for stack, layers in found.items() if layers
    ]  # fmt: skip


def _shape(model: dict[str, Any]) -> str:
    def of(name: str) -> str:
        value = model.get(name)
        return "/".join(str(v) for v in value.values()) if isinstance(value, dict) else "?"

    return f"{visible(model.get('architecture')) or '?'} ({of('n_layers')} layers of {of('d_model')})"


def _uneven(rows: list[dict[str, Any]], groups: dict[str, list[int]]) -> list[str]:
    notes = []
    for name, places in groups.items():
        for flag, what in (("scanned", "scanned"), ("explained", "explained")):
            n = sum(rows[i][flag] for i in places)
            if 0 < n < len(places):
                notes.append(f"{visible(name)}: {n} of its {len(places)} runs are {what}; mean and range are over "
                             "these.")  # fmt: skip
    return notes


def differing(runs: Sequence[ComparedRun]) -> list[str]:
    """Fields of the configuration in which the trainings differ, with their values."""
    configs = [run.training.info.config for run in runs if run.training is not None]
    found = []
    for name in dict.fromkeys(k for c in configs for k in c):
        values = [json.dumps(c.get(name), sort_keys=True, default=str) for c in configs]
        if name != "notes" and len(set(values)) > 1:
            some = [shortened(visible(v.strip('"')), 40) for v in dict.fromkeys(values)]
            found.append(f"{visible(name)} ({'; '.join(some[:8])}{'; ...' * (len(some) > 8)})")
    return found
