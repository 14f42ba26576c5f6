"""`fold`: search of a prefix, slots, proof, effects."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from massact.corpora import Corpus
from massact.interventions.effects import effect_rows
from massact.models import Model, with_attention
from massact.prefixes.candidates import spelled
from massact.prefixes.construction import Folded
from massact.prefixes.equality import prove_equal
from massact.prefixes.layer_changes import heads_table, layers_table
from massact.prefixes.position_shift import positions_of
from massact.prefixes.prefix_files import save_folded
from massact.prefixes.pruning import SuperWeight, prune, super_weights_of, zero_edits
from massact.prefixes.refusals import MOST_SLOTS, check_foldable, check_ids, check_massive
from massact.prefixes.search import LAST_LAYERS, Bench, Judge, Search, judged, search_prefix
from massact.prefixes.starts import Texts, lead_of, parts_of_corpus, rows_of, together, without_lead
from massact.prefixes.ways import Way, compare
from massact.records.clusters import MASSIVE, OUTLIER, keys_of, passing
from massact.records.errors import UserError
from massact.records.kinds.fold import Fold, FoldInfo
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import jsonable
from massact.records.tables import frame
from massact.records.verdicts import HARMLESS, HELPFUL
from massact.scans import scan as scan_model
from massact.scans import scanned_inputs
from massact.verbs.fold import AUTO, FoldConfig

Progress = Callable[[str, int, int], None]
SLOTS, FRONT, NONE = "folded", "prefix in front", "nothing in front"
SUPER, BOTH = "super weights to zero", "folded, super weights to zero"
PRUNED = "super weights to zero, against folded"  # of which the baseline is the folded model


def fold(model: Any, corpus: Any, scan: ScanResult, *, progress: Progress | None = None, **options: Any) -> Fold:
    """Fold the massive activation of a causal language model into slots of keys and values, without training.

    In a causal model the first token sees itself alone and reaches the others by its keys and values. Kept as slots of
    every block they do what it did, and no token of the text has to be massive.

    Args:
        model: the scanned model; loaded, or anything that `load` takes. It is as before.
        corpus: what was scanned; None makes it again from the scan's record.
        scan: its result, with findings.
        progress: called with (stage, done, in all).
        **options: see `FoldConfig`.

    Returns:
        The folded model, the proof, tables of what it changes; `save(DIR)` writes them.

    Raises:
        UserError: a model that cannot be folded exactly, nothing to fold, or a bad option.
        ProofError: the folded model is not the model with the prefix in front.
        WorkError: no candidate takes the massive activation over.
    Source: ours; slots as Sun et al. 2024, Eq. 3, trains them; prefixes as PrefixQuant (Chen et al. 2024) seeks them.
    """
    config, began = FoldConfig.of(options), time.perf_counter()
    loaded, ready = scanned_inputs(model, corpus, scan)
    result = _checked(loaded, ready, scan, config, progress).run()
    result.info.wall_s = time.perf_counter() - began
    return result


def folded_of(
    model: Model, corpus: Corpus, scan: ScanResult, progress: Progress | None = None, **options: Any
) -> tuple[Folded, Corpus]:
    """The folded model alone, proved, and the text as it takes it: without what stood in front.

    Args:
        **options: see `FoldConfig`.

    Raises:
        UserError, ProofError, WorkError: as `fold`.
    """
    job = _checked(model, corpus, scan, FoldConfig.of(options), progress)
    parts = job.parts()
    _, folded = job.search(parts)
    prove_equal(model, folded, [row for text in parts[::-1] for row in text.rows()])
    return folded, job.text(folded.n)


def _checked(model: Model, corpus: Corpus, scan: ScanResult, config: FoldConfig, progress: Progress | None) -> _Job:
    """One fold, of what can be folded."""
    check_massive(scan)
    check_foldable(with_attention(model), corpus)
    if isinstance(config.prefix, tuple):
        check_ids(config.prefix, model)
    return _Job(model, corpus, scan, config, progress or (lambda *_: None))


@dataclass
class _Job:
    """One fold."""

    model: Model
    corpus: Corpus
    scan: ScanResult
    config: FoldConfig
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def run(self) -> Fold:
        parts = self.parts()
        found, folded = self.search(parts)
        self.progress("proof", 0, 1)
        proof = prove_equal(self.model, folded, [row for text in parts[::-1] for row in text.rows()])
        self.progress("proof", 1, 1)
        text = self.text(folded.n)
        heads = heads_table((self.model, self.corpus), (folded.model, text), self.scan)
        after = self.scanned(folded, text)
        weights: list[SuperWeight] = []
        if self.config.prune:
            weights, told = super_weights_of(self.model, self.corpus, self.scan)
            self.notes += told
        effects = self.effects(folded, text, weights)
        info = FoldInfo.of(self.scan.info, self.config.record(), self.corpus, text.n_sequences)
        info.ids, info.lead = list(folded.ids), list(parts[0].lead)
        info.tokens = [spelled(self.corpus, [i]) for i in folded.ids]
        info.positions, info.proof = folded.positions.way, jsonable(proof.as_dict())
        info.cleared, info.fails = found.cleared, [list(pair) for pair in found.fails]
        info.before, info.after = _sizes(self.scan), _sizes(after)
        info.stays = _stays(after, Judge.of(self.scan))
        info.pruned = self.pruned(folded, weights, effects, found.cleared and not _massive(info.stays))
        info.notes += self.notes
        return Fold(
            info, prefixes=frame("prefixes", found.rows), fold_layers=layers_table(self.scan, after, heads),
            fold_heads=heads, fold_effects=effects, model=folded.model,
            write=lambda folder: save_folded(self.model, folded, self.corpus, folder),
        )  # fmt: skip

    def parts(self) -> tuple[Texts, Texts]:
        """Texts to choose by, and texts held out, with room for a prefix."""
        parts = parts_of_corpus(self.model, self.corpus)
        if missing := sorted({*parts[0].missing, *parts[1].missing}):
            self.notes.append(f"No text begins with {', '.join(missing)}: the model has no such tokens.")
        room = self.room(MOST_SLOTS)
        return tuple(
            replace(texts, corpus=together([row[:room] for row in rows_of(texts.corpus)], texts.corpus))
            for texts in parts
        )  # type: ignore[return-value]

    def room(self, n: int) -> int:
        """How long a text may be with a prefix in front.

        Raises:
            UserError: nothing is left.
        """
        room = (self.model.context or 10**9) - n
        if room < 2:
            raise UserError(f"The context of {self.model.context} tokens has no room for a prefix of {n}.")
        return room

    def search(self, parts: tuple[Texts, Texts]) -> tuple[Search, Folded]:
        """The prefix, and the model with it as slots."""
        bench = Bench(self.model, positions_of(self.model), Judge.of(self.scan))
        if self.config.prefix == AUTO:
            found = search_prefix(bench, parts, self.scan, self.config.slots, self.progress)
        else:
            ids = tuple(int(i) for i in self.config.prefix)
            found = judged(bench, parts, ids, [ids])
        return found, bench.folded(found.ids)

    def text(self, n: int) -> Corpus:
        """What was scanned without what stood in front of it, with room for a prefix."""
        text = without_lead(self.corpus, lead_of(self.model, self.corpus))
        room, longest = self.room(n), max(map(len, rows_of(text)))
        if longest > room:
            self.notes.append(f"Texts of {longest} tokens were cut to {room}: the context has {self.model.context}.")
        return together([row[:room] for row in rows_of(text)], text)

    def scanned(self, folded: Folded, text: Corpus) -> ScanResult:
        """The folded model scanned by the same rule."""
        config = self.scan.info.config
        kept = {k: config[k] for k in ("criterion", "thresholds", "batch_size", "top_k") if k in config}
        return scan_model(
            folded.model, text, null=False, bos_contrast=False, rank_sequences=0,
            progress=lambda _, done, n: self.progress("scan of the folded model", done, n), **kept,
        )  # fmt: skip

    def effects(self, folded: Folded, text: Corpus, weights: list[SuperWeight]) -> pd.DataFrame:
        """Losses of the held-out texts, each way, against the texts as they were scanned."""
        rows, lead = rows_of(text), tuple(lead_of(self.model, self.corpus))
        held = rows[(len(rows) + 1) // 2 :] or rows
        room = self.room(max(folded.n, len(lead)))
        held_out = together([row[:room] for row in held], text)
        ways = [Way(SLOTS, folded.model), Way(FRONT, self.model, folded.ids)]
        if lead:
            ways.append(Way(NONE, self.model))
        if weights:
            edits = zero_edits(weights)
            ways += [Way(SUPER, self.model, lead, edits), Way(BOTH, folded.model, (), edits)]
        found = self.compared(Way("", self.model, lead), ways, held_out)
        if weights:
            found += self.compared(Way("", folded.model), [Way(PRUNED, folded.model, (), edits)], held_out)
        return frame("fold_effects", found)

    def compared(self, base: Way, ways: list[Way], text: Corpus) -> list[dict[str, object]]:
        """Rows of effects."""
        paired = compare(base, ways, text, self.config.batch_size, self.progress)
        return effect_rows(paired, stack=self.model.anatomy.stacks[0].name, margin=self.config.margin)

    def pruned(
        self, folded: Folded, weights: list[SuperWeight], effects: pd.DataFrame, cleared: bool
    ) -> dict[str, Any]:
        """The super weights at zero in the folded model, if that changes nothing."""
        if not weights:
            return {}
        verdict = _verdict(effects, PRUNED)
        done = cleared and verdict in (HARMLESS, HELPFUL)
        if done:
            prune(folded.model, weights)
        why = "" if done else f"the loss with them at zero: {verdict}" if cleared else "a token is still massive"
        return {"weights": [jsonable(vars(w)) for w in weights], "zero": done, "why": why, "verdict": verdict}


def _verdict(effects: pd.DataFrame, name: str) -> str:
    """The verdict on the loss of one way; nothing where it was not measured."""
    mine = effects[(effects["edit"] == name) & (effects["metric"] == "nll") & (effects["group"] == "all")]
    return "" if not len(mine) else str(mine.iloc[0]["verdict"])


def _sizes(scan: ScanResult) -> dict[str, Any]:
    """Findings, and greatest |h| of the layers below the last two."""
    last = int(scan.layers["layer"].max())
    below = scan.layers[scan.layers["layer"] <= max(1, last - LAST_LAYERS)]
    return {"n_findings": len(scan.findings), "greatest": float(np.nanmax(below["max"]))}


def _stays(scan: ScanResult, judge: Judge) -> list[dict[str, Any]]:
    """The clusters that pass; what is of an outlier feature is called so on the first token of a text too."""
    having = passing(scan.clusters)
    kept = judge.massive(having.rename(columns={"max": "magnitude"})).index
    labels = having["label"].where(having.index.isin(kept) | (having["dim"] < 0), OUTLIER)
    columns = (keys_of(having), labels, having["max"], having["tokens"])
    return [{"cluster": key, "label": str(label), "max": float(size), "tokens": str(tokens)}
            for key, label, size, tokens in zip(*columns, strict=True)]  # fmt: skip


def _massive(stays: list[dict[str, Any]]) -> bool:
    return any(one["label"] == MASSIVE for one in stays)
