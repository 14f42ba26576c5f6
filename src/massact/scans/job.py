"""`scan`: default probes and a criterion give findings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch

from massact.corpora import AnySource, Corpus, ImageSource, Source, check_preprocess
from massact.corpora import corpus as make_corpus
from massact.corpora.chat_templates import CHAT
from massact.corpora.first_token import both_ways
from massact.corpora.packing import Request
from massact.models import Model, load, random_twin
from massact.models.gguf_header import gguf_notes
from massact.positions import notes_on_positions, ready_corpus, tokens_of
from massact.positions.continuation import kept
from massact.records.answer import Answer
from massact.records.errors import MassactError, UserError, WorkError
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.runinfo import ModelInfo, RunInfo, git_state, jsonable
from massact.records.sites import Site
from massact.records.weight_types import packing_in_words
from massact.scans.criteria import Criterion, Evidence, criterion, sink_dims
from massact.scans.criteria_table import criteria_table, every_token, spike_probes
from massact.scans.evidence import evidence
from massact.scans.findings import (
    coordinates_table,
    findings_table,
    scanned_clusters,
    short_answer,
    stack_answer,
    with_modalities,
)
from massact.scans.image_maps import columns_probe, dim_maps, neighbours_probe, scanned_layout, scanned_maps
from massact.scans.input_values import by_input_table, values_by
from massact.scans.layer_columns import LayerColumns, layer_columns
from massact.scans.length_proof import AtLength, cut_at, prove_at_length, skipped_at
from massact.scans.origins import medians_so_far, origins_table, with_medians
from massact.scans.padding import jump_notes, padding_notes
from massact.scans.prompt import portrait, prompt_corpus, ranks_table
from massact.scans.resumption import Saved
from massact.scans.rises import rises_table, with_mixers
from massact.scans.strip import strip
from massact.scans.thumbnails import KEPT, add_pictures
from massact.stats import HiddenResult, HiddenStats, TokenMax, TokenMaxResult
from massact.trace import Measurements, Probe, measure, plan
from massact.verbs.scan import MOST_KEPT, PROMPT, ScanConfig

Progress = Callable[[str, int, int], None]  # stage, sequences done, sequences in all

TWIN_PARAMETERS = 500_000_000  # above this a random-init twin is built only when asked for
CONTRAST_SEQUENCES = 4
CONTRAST_SHARE = 0.125  # of what the scan reads, which the twin and both ways of BOS read together
LEAST_CUT = 16  # tokens of a sequence


def scan(
    model: Any = None,
    corpus: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    probes: Sequence[Probe] = (),
    spend: bool = False,
    **options: Any,
) -> ScanResult:
    """Find massive activations: run a model over a corpus once and apply a criterion.

    Args:
        model: a loaded `Model`, or anything that `load` takes; None for the embedded model.
        corpus: a `Corpus`, a `Source`, or anything that `corpora.corpus` takes; None for the embedded text.
        out: run directory to write; an interrupted scan leaves its finished work there.
        resume: go on with the interrupted scan in `out`; a finished one with the same inputs is read.
        progress: called with (stage, sequences done, sequences in all).
        probes: also look with these; their statistics add columns to the table `layers` (`massact.stats.Columned`).
        spend: the model is not needed any more: its random twin may take the place of its weights, which are lost.
        **options: see `ScanConfig`.

    Returns:
        The result; saved in `out` if that was given.

    Raises:
        UserError: bad options, unreadable input, or a directory that holds another run.
        WorkError: the model could not be run on the corpus.
    """
    config = ScanConfig.of(options)
    criterion(config.criterion).resolved(config.thresholds)  # refused now, not after the model is loaded
    source = source_of(corpus, config)
    loaded = model if isinstance(model, Model) else load(model)
    text = Text(source, ready_corpus(loaded, source, config), named(corpus))
    return scan_text(loaded, text, config, out=out, resume=resume, progress=progress, probes=probes, spend=spend)


def source_of(corpus: Any, config: ScanConfig) -> Corpus | AnySource:
    """What a corpus means, read and checked without a model: what is wrong with it is told before one is loaded.

    Raises:
        UserError: it cannot be read, or the preprocessing does not fit it.
    """
    source = corpus if isinstance(corpus, Corpus | AnySource) else make_corpus(corpus, text_column=config.text_column)
    check_preprocess(source, config.preprocess)
    return source


@dataclass(frozen=True)
class Text:
    """What a scan reads: the source, the corpus made of it for the model, and how the user named it, if so."""

    source: Corpus | AnySource
    ready: Corpus
    named: str | None


def named(corpus: Any) -> str | None:
    """What a run records of a corpus in order to find it again."""
    return str(corpus) if isinstance(corpus, str | os.PathLike) else None


def scan_text(
    loaded: Model,
    text: Text,
    config: ScanConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    probes: Sequence[Probe] = (),
    spend: bool = False,
    told: ModelInfo | None = None,
) -> ScanResult:
    """A scan whose corpus, and maybe the record of its model (`told`), was made before; see `scan`."""
    rule = criterion(config.criterion)
    thresholds = rule.resolved(config.thresholds)
    source, ready = text.source, text.ready
    if isinstance(source, ImageSource):  # what corpus() was given is an option too, for the verbs that come later
        config = config.changed(preprocess=ready.origin.source["asked"])
    config = config.changed(**_of_the_text(source, ready, config))
    if config.prompt != PROMPT:
        prompt_corpus(loaded, ready, config.prompt, config.bos or "auto")  # refused now, not after the work
    stacks = reached_stacks(loaded, ready)
    extra = layer_columns(loaded, probes, stacks[0])
    statistics = {"statistics": extra.meanings} if extra.meanings else {}
    info = RunInfo(
        "scan",
        config.record() | {"corpus": text.named} | statistics,
        jsonable(asdict(told or loaded.info())),
        jsonable(ready.info()),
        rule.as_dict(thresholds),
        device=str(loaded.device),
        seed=config.seed or 0,
        git=git_state(),
    )
    saved = Saved(out, info, resume)
    if saved.path is not None and saved.is_done:
        return open_run(saved.path)
    began = time.perf_counter()
    try:
        job = _Job(extra, ready, source, config, rule, thresholds, progress or (lambda *_: None))
        result = job.run(info, saved, *stacks, spend=spend)
        info.status, info.wall_s = "ok", saved.earlier_s + time.perf_counter() - began
        if saved.path is not None:
            result.save(saved.path)
            saved.forget()
        return result
    except KeyboardInterrupt:
        saved.stop("interrupted", None, time.perf_counter() - began)
        raise
    except Exception as error:
        saved.stop("failed", str(error) or type(error).__name__, time.perf_counter() - began)
        raise
    finally:
        saved.release()


def _of_the_text(source: Corpus | AnySource, ready: Corpus, config: ScanConfig) -> dict[str, Any]:
    """What `corpus()` was given of a text and the scan was not: options too, for the verbs that come later."""
    found: dict[str, Any] = {"chat_template": True} if ready.origin.bos == CHAT else {}
    if isinstance(source, Source):
        asked = {name: getattr(source.request, name) for name in ("seq_len", "n_sequences", "bos", "seed")}
        asked |= {"n_sequences": ready.n_sequences} if asked["n_sequences"] == "all" else {}
        usual = Request()
        found |= {n: v for n, v in asked.items() if getattr(config, n) is None and v != getattr(usual, n)}
    return found


def reached_stacks(model: Model, corpus: Corpus) -> tuple[list[str], list[str]]:
    """Names of the stacks that the inputs of a corpus reach, and of those that they do not.

    Raises:
        UserError: they reach none.
    """
    reached = {s.name: model.reaches(s, corpus.inputs) for s in model.anatomy.stacks}
    if not any(reached.values()):
        raise UserError(
            "The corpus reaches no stack of the model.",
            do="Give the inputs that the model takes: " + ", ".join(sorted(model.inputs_accepted())) + ".",
        )
    return [n for n, ok in reached.items() if ok], [n for n, ok in reached.items() if not ok]


# ---------------------------------------------------------------------------- the work
@dataclass(frozen=True)
class Complete:
    """A pass that kept enough values for the rule.

    Args:
        evidence: what the rule looks at; rows: what of it passes.
        measured: the statistics; hidden, spikes: their results by site, read off once.
    """

    evidence: Evidence
    rows: pd.DataFrame
    measured: Measurements
    hidden: dict[Site, HiddenResult]
    spikes: dict[Site, TokenMaxResult]


@dataclass
class _Job:
    """One scan: the measurements, and the tables made of them."""

    extra: LayerColumns
    corpus: Corpus
    source: Corpus | AnySource
    config: ScanConfig
    rule: Criterion
    thresholds: dict[str, float]
    progress: Progress

    @property
    def model(self) -> Model:
        return self.extra.model

    def run(
        self, info: RunInfo, saved: Saved, stacks: list[str], unreached: list[str], spend: bool = False
    ) -> ScanResult:
        info.notes += self.extra.notes
        info.notes += [f"Stack {name!r} was not scanned: this corpus does not reach it." for name in unreached]
        self.layout = scanned_layout(self.model, self.corpus, stacks)
        self.by = None if self.config.by is None else values_by(self.config.by, self.corpus)
        checker = AtLength(self.model, stacks)
        done = self.complete(self.model, self.corpus, stacks, saved, checker)
        seen, rows, measured = done.evidence, done.rows, done.measured
        # A resumed run may have had nothing left to measure.
        at_length = checker.record or prove_at_length(self.model, self.corpus, stacks)
        info.model["proof"]["at_length"] = jsonable(at_length)
        info.notes += [*skipped_at(at_length), *cut_at(self.model.anatomy, done.hidden)]
        texts = self.texts(self.corpus, seen)
        found = findings_table(rows, self.rule, texts)
        coordinates = coordinates_table(found, self.corpus.n_sequences)
        layers = self.extra.added(with_mixers(_count(seen.layers, found), self.model.anatomy), measured)
        near_rows = self.rule.near_misses(seen, self.thresholds)
        near = findings_table(near_rows, self.rule, texts)
        clusters = scanned_clusters(found, near, seen, self.corpus.n_sequences)
        tables = (found, coordinates, clusters)
        answers = [stack_answer(stack, site, seen, tables, texts[stack]) for stack, site in _pairs(seen)]
        answer = Answer(len(found) > 0, answers, {}, self.bos(stacks))
        info.notes += [*self.notes(seen, rows, near_rows), *padding_notes(self.model, self.corpus, stacks)]
        info.notes += jump_notes(self.corpus)
        info.notes += notes_on_positions(self.model, self.corpus, seen.norms.groupby("stack").pos.max())
        result = ScanResult(info, layers, found, near, coordinates, clusters, seen.dims)
        result.criteria = criteria_table(*every_token(seen, done.hidden, done.spikes), self.rule, self.thresholds)
        result.rises = rises_table(layers, seen.dims, clusters)
        if self.corpus.prompts:
            self.tell_apart(result, done.hidden)
        if self.by is not None:
            result.by_input = by_input_table(done.hidden, found, *self.by)
        if self.layout is not None:
            try:
                of_dim = dim_maps(measured, found, self.layout)
                add_pictures(result, scanned_maps(measured, self.layout), self.corpus, self.config.pictures, of_dim)
            except MassactError as error:
                result.info.notes.append(f"No figures of patches: {error.what}")
        self.show_prompt(result, answer, seen)
        answer = replace(answer, null=self.null(stacks, info, spend))  # last: the model's weights may be lost by it
        info.answer = jsonable(answer.as_dict())
        return result

    def probes(self, stacks: list[str], top_k: int) -> list[Probe]:
        mad = "mad" in self.rule.needs
        probes = []
        for name in stacks:
            head = f"{name}/" if name else ""
            points = ["resid_post"] + ["resid_post_prenorm"] * self.model.anatomy.stack(name).post_norm
            probes += [Probe("hidden", f"{head}*.{p}", lambda: HiddenStats(top_k=top_k, mad=mad)) for p in points]
            if "mlp_act" in self.rule.needs:
                probes.append(Probe("spikes", f"{head}*.mlp_act", TokenMax))
        return probes

    def texts(self, corpus: Corpus, seen: Evidence) -> dict[str, Corpus]:
        """Of each stack, the corpus as it reads it."""
        last = seen.norms.groupby("stack").pos.max()
        return {str(stack): tokens_of(self.model, corpus, str(stack), int(pos)) for stack, pos in last.items()}

    def complete(
        self, model: Model, corpus: Corpus, stacks: list[str], saved: Saved | None, checker: AtLength | None = None
    ) -> Complete:
        """Measure, with more entries kept wherever all that were kept pass, so that no finding is lost.

        Args:
            saved: of the scan itself; None for a control, of which no figures are made.
            checker: of the scan itself, whether the equations hold at this length.
        """
        top_k, stage = self.config.top_k, "scan" if model is self.model else "null twin"
        while True:
            probes = self.probes(stacks, top_k)
            if saved is not None and "mlp_act" not in self.rule.needs:
                probes += spike_probes(self.model, stacks)
            if saved is not None and self.layout is not None:
                probes += [neighbours_probe(self.layout), columns_probe(self.layout, KEPT)]
            probes += self.extra.probes if saved is not None else []
            start = None
            if saved is not None and top_k == self.config.top_k:
                start = saved.restore(_fresh(model, probes))

            def on_batch(done: Measurements, keep: bool = start is not None, stage: str = stage) -> None:
                if keep and saved is not None:
                    saved.keep(done)
                self.progress(stage, done.n_sequences, corpus.n_sequences)

            measured = measure(
                model, corpus, probes, batch_size=self.config.batch_size, resume=start, on_batch=on_batch,
                checker=checker,
            )  # fmt: skip
            hidden, spikes = ({s: measured.result(n, s) for s in measured.sites(n)} for n in ("hidden", "spikes"))
            looked = spikes if "mlp_act" in self.rule.needs else {}
            seen = evidence(hidden, {s: module_of(model, s) for s in hidden}, looked, "tokens" in self.rule.needs)
            if "modality" in self.rule.needs:
                seen = with_modalities(seen, self.texts(corpus, seen))
            rows = self.rule.passing(seen, self.thresholds)
            if top_k >= MOST_KEPT or not self.rule.lacks(seen, self.thresholds, rows, top_k):
                return Complete(seen, rows, measured, hidden, spikes)
            top_k, stage = min(top_k * 16, MOST_KEPT), f"{stage}, keeping more than {top_k} values"

    def tell_apart(self, result: ScanResult, hidden: dict[Site, HiddenResult]) -> None:
        """Of a text that the model went on with: its tokens beside those of the prompts, and their medians so far."""
        listed = pd.concat([result.findings, result.near_misses])
        medians = medians_so_far(self.model, self.corpus, hidden, listed, self.config.batch_size)
        result.findings, result.near_misses = (with_medians(t, medians) for t in (result.findings, result.near_misses))
        result.origins = origins_table(self.corpus, hidden, result.findings, medians)
        result.generated = kept(self.corpus)

    # ---- controls
    def null(self, stacks: list[str], info: RunInfo, spend: bool) -> dict[str, Any]:
        """The same scan of a random-init twin: what the criterion finds where there can be nothing to find."""
        if self.config.null is False:
            return {"unavailable": "not asked for"}
        size = info.model["n_parameters"]
        if self.config.null == "auto" and size > TWIN_PARAMETERS:
            return {"unavailable": f"the model has {size:,} parameters; ask for it with --null"}
        try:
            twin = random_twin(self.model, self.config.seed or 0, spend)
            return {"unavailable": twin} if isinstance(twin, str) else self.short(twin, self.few(), stacks)
        except (WorkError, MemoryError, torch.OutOfMemoryError) as error:  # a control must not cost the answer
            return {"unavailable": f"the random-init twin does not fit: {str(error).splitlines()[0]}"}

    def few(self) -> Corpus:
        """What each of the three controls reads: the beginnings of the first sequences, in proportion to the scan."""
        each = self.corpus.n_sequences * CONTRAST_SHARE / 3  # sequences' worth
        n = min(CONTRAST_SEQUENCES, self.corpus.n_sequences)
        width = self.corpus.inputs["input_ids"].shape[1] if self.corpus.kind == "tokens" else 0
        room = max(LEAST_CUT, int(width * each / n))
        cut = self.corpus.head(n).cut(room) if room < width else None
        return cut or self.corpus.head(n if room >= width > 0 else max(1, min(n, int(each))))

    def short(self, model: Model, few: Corpus, stacks: list[str]) -> dict[str, Any]:
        done = self.complete(model, few, stacks, None)
        seen, rows = done.evidence, done.rows
        texts, near = self.texts(few, seen), self.rule.near_misses(seen, self.thresholds)
        found = findings_table(rows, self.rule, texts)
        short = short_answer(found, findings_table(near, self.rule, texts), seen, few.n_sequences)
        whole = few.kind != "tokens" or few.inputs["input_ids"].shape[1] >= self.corpus.inputs["input_ids"].shape[1]
        return short | {"n_sequences": few.n_sequences, "n_tokens": None if whole else few.inputs["input_ids"].shape[1]}

    def bos(self, stacks: list[str]) -> dict[str, Any]:
        """The first sequences with and without BOS in front of the same text (Sun 2024, App. A.3)."""
        if not self.config.bos_contrast:
            return {"unavailable": "not asked for"}
        if not isinstance(self.source, Source):
            known = {"images": self.corpus.pictures, "recordings": self.corpus.recordings}
            kind = next((k for k, read in known.items() if read is not None), None)
            return {"unavailable": f"{kind} have none" if kind else "the corpus came as ids or tensors"}
        ids = (getattr(self.model.tokenizer, f"{kind}_token_id", None) for kind in ("bos", "cls"))
        first = next((int(i) for i in ids if i is not None), None)
        if first is None:
            return {"unavailable": "the tokenizer has no BOS token"}
        try:
            both = both_ways(self.few(), first, self.model.context)
        except UserError as error:
            return {"unavailable": error.what}
        return {name: self.short(self.model, text.with_types(self.model), stacks) for name, text in both.items()}

    def notes(self, seen: Evidence, rows: Any, near_rows: Any) -> list[str]:
        """What the tables cannot say of themselves: what could not be seen, and where a list was cut."""
        packed = [*gguf_notes(self.model.gguf), *packing_in_words(self.model.quantised)]
        notes = [*self.model.around, *packed, *self.model.anatomy.notes, *self.corpus.origin.source.get("notes", ())]
        for site, reason in self.model.anatomy.unavailable():
            if "mlp_act" in self.rule.needs and site.point == "mlp_act":
                notes.append(f"{site} is unavailable: {reason}.")
        if "modality" in self.rule.needs and not sink_dims(seen, self.thresholds):
            notes.append("The first token of the text exceeds tau at no dim: there are no sink dims to look at.")
        if self.rule.kind != "element" or not len(seen.candidates):
            return notes
        kept = int(seen.candidates["rank"].max())
        if self.rule.lacks(seen, self.thresholds, rows, MOST_KEPT):
            notes.append(f"Only the greatest {kept:,} values of a hidden state are listed; more may pass.")
        if len(near_rows) and bool((near_rows["rank"] == kept).any()):
            notes.append(f"Near misses are among the greatest {kept:,} values of a hidden state; there may be more.")
        return notes

    def show_prompt(self, result: ScanResult, answer: Answer, seen: Evidence) -> None:
        """Tables 1 and 2 and the 3-D figure, at the layer that shows most; a failure here loses no findings."""
        self.progress("portrait", 0, 1)
        try:
            text = prompt_corpus(self.model, self.corpus, self.config.prompt, self.config.bos or "auto")
            result.ranks = ranks_table(self.model, self.corpus, text, seen, answer, self.config.rank_sequences)
            result.portrait = portrait(self.model, text, answer)
        except MassactError as error:
            result.info.notes.append(f"No portrait: {error.what} {error.why}".strip())
        else:
            try:
                result.strip = strip(self.model, [text, self.corpus], str(result.portrait["stack"]))
            except MassactError as error:
                result.info.notes.append(f"No strip of the text: {error.what} {error.why}".strip())
        self.progress("portrait", 1, 1)


def module_of(model: Model, site: Site) -> str:
    """Dotted path of the block whose output a site is."""
    blocks = model.anatomy.stack(site.stack).blocks
    return f"input of {blocks[0].module}" if site.layer == 0 else blocks[site.layer - 1].module


def _fresh(model: Model, probes: list[Probe]) -> Measurements:
    return Measurements(plan(model, probes).fresh())


def _pairs(seen: Evidence) -> list[tuple[str, str]]:
    """The (stack, site) that the answer is about: hidden states, and inputs of down_proj where the rule looks there."""
    tables = [table[["stack", "site"]].drop_duplicates() for table in (seen.layers, seen.spikes) if len(table)]
    return [(str(stack), str(site)) for table in tables for stack, site in table.itertuples(index=False)]


def _count(layers: Any, found: Any) -> Any:
    """The table `layers` with the number of findings of each."""
    keys = ["stack", "site", "layer"]
    counts = found.groupby(keys).size()
    index = layers.set_index(keys).index
    return layers.assign(n_findings=[int(counts.get(key, 0)) for key in index])
