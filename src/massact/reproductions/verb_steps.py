"""The steps that experiments share: the other verbs' own functions, each of which leaves its files in the directory.

A step whose files are there is kept if they are of the same model and have what is needed; so an interrupted
reproduction goes on where it was, and a second one runs nothing. The model is loaded when the first step needs it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from massact.classics import classics
from massact.corpora import AnySource, Corpus, Source, corpus_again
from massact.corpora import corpus as make_corpus
from massact.explanations import explain
from massact.interventions import CONTROLS, Registers, collect_registers, evaluate, fix_registers, intervene
from massact.interventions.class_heads import head_of
from massact.interventions.effects import effect_rows
from massact.interventions.labels import labelled, labels_of
from massact.interventions.predictions import NoHead
from massact.models import EMBEDDED, Model, load
from massact.positions import read_layout
from massact.records.errors import MassactError, UserError
from massact.records.kinds.classics import Classics
from massact.records.kinds.comparison import Comparison
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.intervention import InterveneInfo, Intervention
from massact.records.kinds.reproduction import FAILED, NOT_APPLICABLE, NOT_RUN
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.run import read_info
from massact.records.runinfo import git_state
from massact.records.tables import frame, load_arrays, save_arrays
from massact.reproductions.entries import (
    ASK,
    MEANS,
    PROMPTS,
    PROMPTS_IN,
    REGISTERS_IN,
    TEXTS_IN,
    TRAINED_IN,
    TUNED_IN,
    Entry,
    Nothing,
    massive,
)
from massact.scans import Reopened, check_text, check_weights, scan, scanned_corpus

Progress = Callable[[str, int, int], None]

RANKED = 16  # sequences that are sorted for the lower ranks, of which E8 needs 12
LEAST_HELD_OUT = 8  # images from which on half of them are kept apart for the means
SETS = ("zero", "mean", "random")  # set to zero, set to mean, and the control

# What an entry may need that a step gives only where it is asked to.
GIVEN_BY = {"tasks": "intervene", "labels": "intervene"}


@dataclass
class Work:
    """One reproduction at work.

    Args:
        out: the run directory.
        target: a scanned run, or None; model, corpus: what was given; corpus None: as the run has it, or embedded text.
        scan_options: of a scan that is made here; loading: of `load`.
        options: see `massact.reproductions.job.ReproduceConfig`.
        trained: comparison of trainings.
        progress, keep: called with (stage, done, in all), and with each finished result and its folder.
    """

    out: Path
    options: Any
    target: ScanResult | None = None
    model: Any = None
    corpus: Any = None
    scan_options: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)
    trained: Comparison | None = None
    progress: Progress = lambda *_: None
    keep: Callable[[Any, Path], object] = lambda *_: None
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, Nothing] = field(default_factory=dict)
    _loaded: Model | None = None
    _text: Corpus | None = None
    _scan: ScanResult | None = None

    # ---- inputs, made when they are needed
    def loaded(self) -> Model:
        """The model; refused if it is not the scanned one."""
        if self._loaded is None:
            if self.target is not None:
                told = self.target.info.model
                name = told["id"] if self.model is None else self.model
                again = {"dtype": told["dtype"], "revision": told.get("revision") if self.model is None else None}
            else:
                name, again = self.model, {}
            self.progress("load", 0, 1)
            given = None if name == EMBEDDED else name
            self._loaded = given if isinstance(given, Model) else load(given, **(self.loading | again))
            self.progress("load", 1, 1)
            if self.target is not None:
                check_weights(self._loaded, self.target)
        return self._loaded

    def source(self) -> Corpus | AnySource:
        """The scanned text or images, not read yet."""
        if isinstance(self.corpus, Corpus | AnySource):
            return self.corpus
        if self.corpus is None and self.target is not None:
            info = self.target.info
            return corpus_again(info.corpus, info.config.get("corpus"))
        return make_corpus(self.corpus, text_column=self.scan_options.get("text_column"))

    def text(self) -> Corpus:
        """What was scanned, ready for the model."""
        if self._text is None:
            self._text = scanned_corpus(self.loaded(), self.source(), self.scan())
            check_text(self._text, self.scan())
        return self._text

    def scan(self) -> ScanResult:
        """The scan, which is there once the step of it is done."""
        assert self._scan is not None
        return self._scan

    def opened(self) -> Reopened:
        """All three, for a verb on a scan: neither weights nor text are checked again."""
        return Reopened(self.loaded(), self.text(), self.scan())

    # ---- the steps
    def run(self, entries: Iterable[Entry]) -> None:
        """Do the steps that these entries need, or keep what is there; what fails is noted and costs no other step."""
        self._do("scan", self._scanned)
        needs = {n for e in entries if e.domain in ("any", domain(self.scan())) for n in e.needs}
        for step, do in (("explain", self._explained), ("intervene", self._intervened), ("texts", self._texts),
                         ("classics", self._classics), ("prompts", self._prompts), ("registers", self._registers),
                         ("fixed", self._fixed), ("tuned", self._tuned), ("trained", self._trained)):  # fmt: skip
            if step in needs or (step == "texts" and "intervene" in needs and self.options.evaluate_on):
                self._do(step, do)
        self.missing |= {need: self.missing[step] for need, step in GIVEN_BY.items() if step in self.missing}

    def _do(self, step: str, do: Callable[[], str]) -> None:
        began = time.perf_counter()
        try:
            self.states[step] = {"state": do()}
        except Nothing as nothing:
            self.missing[step] = nothing
            self.states[step] = {"state": nothing.verdict, "why": nothing.reason}
        except NoHead as error:
            self.missing[step] = Nothing(f"{error.what} {error.do}", NOT_RUN)
            self.states[step] = {"state": NOT_RUN, "why": str(error)}
        except MassactError as error:
            if step == "scan":
                raise
            self.missing[step] = Nothing(f"The step {step} failed: {' '.join(str(error).split())}", FAILED)
            self.states[step] = {"state": FAILED, "why": str(error)}
        self.states[step]["wall_s"] = round(time.perf_counter() - began, 2)

    def _scanned(self) -> str:
        if self.target is not None:
            self._scan = self.target
            return "kept"
        there = (self.out / "run.json").is_file()
        before = (self.out / "run.json").read_bytes() if there else b""
        source, asked = self.source(), dict(self.scan_options)
        earlier = read_info(self.out).config if there else {}
        asked.setdefault("rank_sequences", earlier.get("rank_sequences", RANKED))
        if isinstance(source, Source) and not (asked.get("chat_template") or source.request.chat_template):
            asked.setdefault("bos", "never")  # as the paper
        self._scan = scan(self.loaded(), source, out=self.out, resume=there, progress=self.progress, **asked)
        kept = (self.out / "run.json").read_bytes() == before
        if not kept or not (self.out / "reproduce.json").is_file():
            self.keep(self._scan, self.out)
        return "kept" if kept else "done"

    def _same(self, info: Any) -> bool:
        """Whether a record is of the scanned model."""
        return bool(info.model.get("weights_sha256") == self.scan().info.model.get("weights_sha256"))

    def _saved(self, done: Any, folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        self.keep(done, folder)  # first: the record that is saved last speaks for the figures, too
        done.save(folder)
        return "done"

    def _explained(self) -> str:
        there = Explanation.open(self.out)
        if there is not None and self._same(there.info):
            return "kept"
        o = self.options
        return self._saved(self.opened().run(explain, self.progress, batch_size=o.batch_size, seed=o.seed), self.out)

    def _edits(self) -> dict[str, Any]:
        o = self.options
        return {"sets": SETS, "sinks": False, "repetition": False, "seed": o.seed,
                "batch_size": 1 if o.batch_size == "auto" else o.batch_size}  # fmt: skip

    def _has(self, there: Intervention | None) -> bool:
        return there is not None and self._same(there.info) and set(SETS) <= set(there.effects["edit"])

    def _intervened(self) -> str:
        massive(self.scan())
        o, there = self.options, Intervention.open(self.out)
        if self._has(there):
            config = there.info.config  # type: ignore[union-attr]
            labels = o.labels is None or config.get("labels") == o.labels
            head = o.head is None or config.get("head") is not None
            if labels and head and set(o.tasks) <= set(config.get("tasks") or ()):
                return "kept"
        done = self.opened().run(
            intervene, partial(self.progress, "intervene"), labels=o.labels, head=o.head, tasks=tuple(o.tasks),
            task_folder=o.task_folder, limit=o.limit, **self._edits(),
        )  # fmt: skip
        return self._saved(done, self.out)

    def _texts(self) -> str:
        massive(self.scan())
        states = set()
        for spec in self.options.evaluate_on:
            folder = self.out / TEXTS_IN / folder_of(spec)
            if self._has(Intervention.open(folder)):
                states.add("kept")
                continue
            telling = partial(self.progress, f"intervene on {spec}")
            done = self.opened().run(intervene, telling, evaluate_on=spec, **self._edits())
            states.add(self._saved(done, folder))
        return "done" if "done" in states else "kept"

    def _classics(self) -> str:
        there, name = Classics.open(self.out), "outlier-features"
        if there is not None and self._same(there.info) and name in there.info.outcomes:
            return "kept"
        also = tuple(there.info.outcomes) if there is not None else ()  # their tables are written anew with this one
        done = self.opened().run(classics, which=(*also, name), seed=self.options.seed)
        return self._saved(done, self.out)

    def _prompts(self) -> str:
        corpus = self.scan().info.corpus
        if corpus.get("kind") != "tokens" or not corpus.get("tokenizer"):
            raise Nothing("The model reads no text, or its tokenizer is not known.", NOT_APPLICABLE)
        states = set()
        for i, (name, prompt) in enumerate(PROMPTS.items()):
            folder = self.out / PROMPTS_IN / name
            try:
                states.add(self._prompt(folder, prompt))
            except MassactError as error:
                raise UserError(f"The prompt {name}: {error.what}", error.why, error.do) from None
            self.progress("prompts", i + 1, len(PROMPTS))
        return "done" if "done" in states else "kept"

    def _prompt(self, folder: Path, prompt: str) -> str:
        there = Explanation.open(folder)
        if there is not None and self._same(there.info):
            return "kept"
        config = self.scan().info.config
        asked = {k: config[k] for k in ("criterion", "thresholds", "bos") if k in config}
        resume = (folder / "run.json").is_file()
        result = scan(self.loaded(), [prompt], out=folder, resume=resume, null=False, bos_contrast=False, prompt=prompt,
                      **asked)  # fmt: skip
        self.keep(result, folder)
        return self._saved(explain(self.loaded(), [prompt], result), folder)

    def _with_head(self, text: Corpus) -> Model:
        """The model, with the head that was asked for."""
        model, o = self.loaded(), self.options
        if o.head is None:
            return model
        pictures = text.pictures if o.labels is None else labelled(text, o.labels)
        return replace(model, head=head_of(model, text, o.head, getattr(pictures, "classes", None)))

    def _registers(self) -> str:
        file, weights = self.out / REGISTERS_IN / MEANS, str(self.scan().info.model.get("weights_sha256"))
        if file.is_file() and str(load_arrays(file)["weights_sha256"]) == weights:
            return "kept"
        found, n_images = self._collected()
        file.parent.mkdir(exist_ok=True)
        save_arrays(file, {"mean": found.mean, "std": found.std, "positions": np.array(found.positions),
                           "n_images": np.array(n_images), "weights_sha256": np.array(weights)})  # fmt: skip
        return "done"

    def _collected(self) -> tuple[Registers, int]:
        """What stands at the registers, over the first half of the images where there are eight, and of how many."""
        model, text = self.loaded(), self.text()
        try:
            layout = read_layout(model, text)
        except UserError as error:
            why = f"Its tokens are no class token, registers and patches: {error.what}"
            raise Nothing(why, NOT_APPLICABLE) from None
        if not layout.registers:
            raise Nothing("The model has no registers.", NOT_APPLICABLE)
        n = text.n_sequences // 2 if text.n_sequences >= LEAST_HELD_OUT else text.n_sequences
        return collect_registers(model, text.head(n)), n

    def _fixed(self) -> str:
        if "registers" in self.missing:
            raise self.missing["registers"]
        folder, o = self.out / REGISTERS_IN, self.options
        there = Intervention.open(folder)
        if there is not None and self._same(there.info) and o.labels in (None, there.info.config.get("labels")):
            return "kept"
        text, (found, n) = self.text(), self._collected()
        rest, model = text.part(n % text.n_sequences, text.n_sequences), self._with_head(text)
        hows = [how for how in CONTROLS if how != "shuffle" or len(found.kept) > 1]
        edits = [fix_registers(found, how, seed=o.seed) for how in hows]
        labels = None
        if o.labels is not None:
            labels = torch.tensor(labels_of(model, text, o.labels)[n % text.n_sequences :])
        paired = evaluate(model, rest, edits, batch_size=self._edits()["batch_size"], labels=labels)
        info = InterveneInfo(
            config={"edits": [e.name for e in edits], "labels": o.labels, "seed": o.seed},
            model={k: self.scan().info.model.get(k) for k in ("id", "name", "weights_sha256")},
            corpus={"name": text.name, "sha256": text.sha256, "n_sequences": text.n_sequences},
            target={"site": "the input of every block", "positions": list(found.positions)},
            estimated_on=f"images 0 to {n - 1}",
            evaluated_on=f"images {n % text.n_sequences} to {text.n_sequences - 1}", git=git_state(),
        )  # fmt: skip
        if n == text.n_sequences:
            info.notes.append("Means are of the images that the effects are of.")
        return self._saved(Intervention(info, frame("effects", effect_rows(paired, stack=found.stack))), folder)

    def _tuned(self) -> str:
        if self.options.tuned is None:
            raise Nothing(f"It needs {ASK['tuned']}.", NOT_RUN)
        folder, source = self.out / TUNED_IN, self.source()
        if (folder / "run.json").is_file():
            there = open_run(folder)
            if there.info.model.get("id") == str(self.options.tuned):
                return "kept"
        self._loaded, self._text = None, None  # room for the other one
        config = {
            k: v
            for k, v in self.scan().info.config.items()
            if k not in ("null", "bos_contrast", "corpus", "preprocess")
        }
        other = load(self.options.tuned, **self.loading)
        resume = (folder / "run.json").is_file()
        result = scan(other, source, out=folder, resume=resume, null=False, bos_contrast=False, progress=self.progress,
                      **config)  # fmt: skip
        self.keep(result, folder)
        return "done"

    def _trained(self) -> str:
        folder = self.out / TRAINED_IN
        if self.trained is None:
            if (folder / "compare.parquet").is_file():
                return "kept"
            raise Nothing(f"It needs {ASK['trained']}.", NOT_RUN)
        return self._saved(self.trained, folder)


def domain(result: ScanResult) -> str:
    """'language', 'image', or 'other' (tensors that are neither)."""
    corpus = result.info.corpus
    if corpus.get("kind") == "tokens":
        return "language"
    names = [str(t) for t in result.portrait.get("tokens", ())]
    pictured = (corpus.get("source") or {}).get("kind") == "images" or any(t.startswith("patch (") for t in names)
    return "image" if pictured else "other"


def folder_of(spec: str) -> str:
    """A folder name for a text: that of a named one, or of its file with the beginning of a hash of the path."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(spec).stem if Path(spec).exists() else spec).strip("-.")
    return (
        f"{last}-{hashlib.sha256(str(Path(spec).resolve()).encode()).hexdigest()[:6]}" if Path(spec).exists() else last
    )
