"""`quantise`: every scheme against full precision, what each remedy saves, and which sites are guilty."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from massact.corpora import Corpus
from massact.interventions.effects import Paired, effect_rows, evaluate
from massact.interventions.job import LEAST_HELD_OUT
from massact.interventions.tasks import check_tasks, evaluate_tasks
from massact.models import Model, with_attention
from massact.models.wrappers import no_plain_weights
from massact.prefixes import folded_of, super_weights_of
from massact.quantisation.advice import NO_FILES, recommended, remedies
from massact.quantisation.deviations import Local, Propagated, local_deviations
from massact.quantisation.guilt import guilty_rows
from massact.quantisation.linears import linears_of, own_inputs, point_of
from massact.quantisation.massive_tokens import MassiveTokens, massive_tokens
from massact.quantisation.number_formats import quant_module, scale_of
from massact.quantisation.roundings import Prepared, calibrate, check_scheme, edit_of, predicted_zeros
from massact.quantisation.schemes import DEFAULT, SITES, Scheme, scheme
from massact.records.clusters import passing
from massact.records.errors import UserError, WorkError, near
from massact.records.kinds.quantisation import Quantisation, QuantiseInfo
from massact.records.kinds.scan import ScanResult
from massact.records.sites import Site
from massact.records.tables import columns_of, frame
from massact.records.weight_types import PLAIN
from massact.scans import scanned_inputs
from massact.verbs.fold import AUTO
from massact.verbs.quantise import QuantiseConfig

NO_CURVE = "none"


def check(options: QuantiseConfig) -> None:
    """Refuse a scheme or a site that there is not, before minutes are spent on loading.

    Raises:
        UserError: says what it could be; or the extra is not installed.
    """
    check_tasks(options.tasks)
    for site in options.sites:
        if site not in SITES:
            raise UserError(f"{site!r} is no site of activations.", do=near(site, SITES))
    for i, name in enumerate(options.schemes):
        if name in options.schemes[:i]:
            raise UserError(f"The scheme {name!r} is given twice.", do="Give it once.")
    guilty = _guilty(options)
    if guilty is not None and not guilty.sites and not guilty.cached:
        raise UserError(f"The scheme {guilty.name!r} quantises no site that could be left out.",
                        do="Name one that quantises activations: --guilty int8-tensor")  # fmt: skip
    if guilty is not None and guilty.slots:
        raise UserError("Guilty sites are looked for in the model as it is, not in one with slots.",
                        do="Leave out +slots in --guilty.")  # fmt: skip
    asked = [*_schemes(options), *([guilty] if guilty else [])]
    if options.export not in (None, NO_FILES):
        scheme(str(options.export))
    for package in sorted({package for one in asked for package in one.packages}):
        quant_module(package)


@dataclass
class Work:
    """What all parts of a quantisation need.

    Args:
        ready: on the calibration sequences; held: the same on those that losses are of.
        calibration, text: these sequences.
        schemes: what runs. guilty: the scheme that was named for the curve.
        notes: what a reader must know.
        say: called with (stage, done, in all).
    """

    config: QuantiseConfig
    ready: Prepared
    held: Prepared
    calibration: Corpus
    text: Corpus
    say: Callable[..., None]
    schemes: list[Scheme]
    guilty: Scheme | None = None
    notes: list[str] = field(default_factory=list)

    def evaluated(self, schemes: Sequence[Scheme], **more: Any) -> Paired:
        """Losses of schemes, each beside full precision."""
        edits = [edit_of(self.held, s) for s in schemes]
        n = self.text.n_sequences
        return evaluate(
            self.held.model, self.text, edits, batch_size=self.config.batch_size,
            progress=lambda done, _: self.say("quantise", done, n), **more,
        )  # fmt: skip


def quantise(
    model: Any, corpus: Any, scan: ScanResult, *, progress: Callable[..., None] | None = None, **options: Any
) -> Quantisation:
    """What a model loses in low precision, scheme by scheme, and what massive activations have to do with it.

    Args:
        model: the scanned model, with its language-model head; loaded, or anything that `load` takes.
        corpus: what was scanned, see `explain`.
        scan: its result: which tokens are massive.
        progress: called with (stage, done, in all).
        **options: see `QuantiseConfig`.

    Raises:
        UserError: a bad option, a model that is quantised already, or without logits; groups that do not divide.
    Source: LLM.int8 (Dettmers 2022), SmoothQuant (Xiao 2022), QuaRot (Ashkboos 2024), IntactKV (Liu 2024), PrefixQuant
        (Chen 2024), KIVI (Liu 2024), super weights (Yu 2024).
    """
    config, began = QuantiseConfig.of(options), time.perf_counter()
    check(config)
    loaded, ready = scanned_inputs(model, corpus, scan)
    rounded = _rounded_before(loaded)
    ready = ready if config.n_sequences is None else ready.head(config.n_sequences)
    work = _work(config, loaded, ready, scan, progress or (lambda *_: None))
    work.notes += rounded if any(s.weights is not None for s in work.schemes) else []
    plain, slotted = [s for s in work.schemes if not s.slots], [s for s in work.schemes if s.slots]
    beside = Propagated(work.ready.stack, work.held.massive)
    paired = work.evaluated(plain, watcher=beside)
    local = _local(work, plain)
    rows = _rows(paired, plain, config.margin)
    rows += _task_rows(work, plain)
    curve = guilty_rows(work, plain, paired, local)
    known = {s: paired for s in plain}
    prefix: tuple[int, ...] = ()
    if slotted and (folded := _folded(work, (loaded, ready, scan), slotted)) is not None:
        prefix, other = folded
        rows += _rows(other, slotted, config.margin)
        known |= dict.fromkeys(slotted, other)
    found = frame("quantised", rows)
    info = _info(work, scan, list(known), (ready, began))
    info.exported, info.exports, told = recommended(work, list(known), found, prefix)
    info.notes += told
    return Quantisation(
        info, found, frame("remedies", remedies(known)),
        frame("quantised_sites", _site_rows(work, plain, beside, local)), frame("guilty_sites", curve),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- before anything runs
def _schemes(config: QuantiseConfig) -> list[Scheme]:
    """Those that were asked for, at the sites that were asked for.

    Raises:
        UserError: one that was asked for quantises nothing there.
    """
    if config.schemes:
        return [_at_sites(name, config) for name in config.schemes]
    made = []
    for name in DEFAULT:
        with suppress(UserError):  # of the table, what means something at these sites
            made.append(_at_sites(name, config))
    return [s for s in made if not s.slots or config.prefix is not None]


def _at_sites(name: str, config: QuantiseConfig) -> Scheme:
    one = scheme(name)
    if not config.sites:
        return one
    cut = one.at(config.sites)
    if not cut.parts:
        raise UserError(f"The scheme {name!r} quantises nothing at {', '.join(config.sites)}.",
                        do="Leave it out, or name its sites as well.")  # fmt: skip
    cut.check()
    return cut


def _guilty(config: QuantiseConfig) -> Scheme | None:
    """The scheme whose guilty sites were asked for by name."""
    return None if config.guilty in (None, NO_CURVE) else _at_sites(str(config.guilty), config)


def _rounded_before(model: Model) -> list[str]:
    """What a reader must know of a model from a GGUF file; other quantised checkpoints are refused.

    Raises:
        UserError: it is one, or its weights have adapters beside them, or are offloaded.
    """
    if (around := no_plain_weights(model.module)) is not None:
        raise UserError("The weights of this model cannot be rounded.", *around)
    packed = model.quantised
    if packed is None:
        return []
    if packed["method"] != "gguf":  # weights of others are unpacked as well, but inputs may be rounded as it runs
        raise UserError(
            f"This model is quantised already, by {packed['method']}.",
            "A second rounding on top of the first says nothing about either.",
            "Give the model in full precision; massact compare tells what a quantised one did to massive activations.",
        )
    types = ", ".join(str(t) for t in packed["types"] if t not in PLAIN)
    told = f"{packed['method']}, {types}" if types else packed["method"]
    return [f"The weights had been rounded before ({told}): losses of schemes with weights are of a second rounding."]


def _work(
    config: QuantiseConfig,
    model: Model,
    corpus: Corpus,
    scan: ScanResult,
    say: Callable[..., None],
) -> Work:
    """Everything that is measured before a scheme runs."""
    n = corpus.n_sequences
    half = n // 2 if config.hold_out and n >= LEAST_HELD_OUT else 0
    stack = config.stack if config.stack is not None else _main_stack(model, scan)
    massive = massive_tokens(scan, stack).before(n)
    schemes, guilty = _schemes(config), _guilty(config)
    named = [guilty] if guilty is not None else []
    loaded = own_inputs(with_attention(model) if any(s.cached for s in [*schemes, *named]) else model, stack)
    ready = Prepared(loaded, stack, linears_of(loaded, stack), massive, seed=config.seed)
    schemes, told = _fitting(ready, schemes, bool(config.schemes))
    schemes, idle = _without_idle(massive, schemes, named)
    for one in named:
        check_scheme(ready, one)
    head = corpus.head(half) if half else corpus
    ready = calibrate(ready, head, [*schemes, *named], config.local_sequences, say)
    if any(s.super_weights for s in [*schemes, *named]):
        ready = replace(ready, spared=_spared(model, head, scan))
    text = corpus.part(half, trim=False) if half else corpus
    held = replace(ready, massive=massive.behind(half))
    unseen = held.massive.named() - massive.before(half or n).named() if any(s.insert for s in schemes) else set()
    if unseen:
        told.append(f"Massive tokens of {', '.join(sorted(unseen))} were in no calibration sequence: +insert has no "
                    "vector for them, and leaves them as they are.")  # fmt: skip
    return Work(config, ready, held, head, text, say, schemes, guilty, [*ready.linears.notes(), *told, *idle])


def _spared(model: Model, corpus: Corpus, scan: ScanResult) -> dict[str, list[tuple[int, int]]]:
    """Super weights: module -> (output, input); found by what they carry of a step up, not by size.

    Raises:
        UserError: there is none.
    """
    weights, notes = super_weights_of(model, corpus, scan)
    if not weights:
        raise UserError("No super weights were found.", " ".join(notes), "Leave out +super.")
    found: dict[str, list[tuple[int, int]]] = {}
    for one in weights:
        found.setdefault(one.parameter.removesuffix(".weight"), []).append((one.dim, one.neuron))
    return found


def _fitting(ready: Prepared, schemes: Sequence[Scheme], asked: bool) -> tuple[list[Scheme], list[str]]:
    """Schemes that the model can be run in, and which of the table it cannot.

    Raises:
        UserError: it cannot be run in one that was asked for by name; or in none.
    """
    kept, left, why = [], [], ""
    for one in schemes:
        try:
            check_scheme(ready, one)
            kept.append(one)
        except UserError as error:
            if asked:
                raise
            left.append(one.name)
            why = why or f"{error.what} {error.why}".strip()
    if not kept:
        raise UserError("None of the schemes fits this model.", why, "Name schemes that do: --schemes int8-tensor")
    return kept, [f"Left out of the table: {', '.join(left)}. {why}"] if left else []


def _main_stack(model: Model, scan: ScanResult) -> str:
    having = passing(scan.clusters)
    having = having[having["site"] == "resid_post"]
    return model.anatomy.together(str(having["stack"].iloc[0]))[0] if len(having) else model.anatomy.stacks[-1].name


def _without_idle(
    massive: MassiveTokens, schemes: list[Scheme], named: Sequence[Scheme]
) -> tuple[list[Scheme], list[str]]:
    """Without those that spare massive tokens, where there are none; and what is to be said.

    Args:
        named: schemes that have to run.
    """
    told = []
    if massive.left:
        names = ", ".join(massive.left[:6])
        told.append(f"{names}: on too many tokens to spare any for them; they count in every scale.")
    if massive.count:
        return schemes, told
    told.append("The scan has no massive activations on single tokens: there is nothing to exempt, and schemes that "
                "would were left out.")  # fmt: skip
    kept = [s for s in schemes if not s.spares]
    if not kept or any(s.spares for s in named):
        raise UserError("The scan has no massive activations on single tokens, and every scheme spares them.",
                        do="Leave out +exempt and +insert.")  # fmt: skip
    return kept, told


def _folded(
    work: Work, given: tuple[Model, Corpus, ScanResult], schemes: Sequence[Scheme]
) -> tuple[tuple[int, ...], Paired] | None:
    """Ids of the prefix, and losses on the folded model beside its own in full precision; None where there is none."""
    model, corpus, scan = given
    try:
        folded, text = folded_of(model, corpus, scan, work.say, prefix=work.config.prefix or AUTO)
    except (UserError, WorkError) as error:
        if work.config.schemes:  # asked for by name
            raise
        work.notes.append(f"Schemes with slots were left out: {error.what} {error.why}".strip())
        return None
    stack = work.ready.stack
    loaded = own_inputs(with_attention(folded.model) if any(s.cached for s in schemes) else folded.model, stack)
    ready = Prepared(loaded, stack, linears_of(loaded, stack), MassiveTokens(), seed=work.config.seed)
    n, half = text.n_sequences, corpus.n_sequences - work.text.n_sequences
    ready = calibrate(ready, text.head(half) if half else text, list(schemes), work.config.local_sequences, work.say)
    held = text.part(half, trim=False) if half else text
    edits = [edit_of(ready, one) for one in schemes]
    return folded.ids, evaluate(
        loaded, held, edits, batch_size=work.config.batch_size,
        progress=lambda done, _: work.say("slots", done, n - half),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- what is measured
def _local(work: Work, schemes: Sequence[Scheme]) -> dict[tuple[str, Site], Local]:
    head = work.calibration.head(min(work.config.local_sequences, work.calibration.n_sequences))
    done, n = 0, head.n_sequences * sum(len({p.target for p in s.parts} - {"weights"}) for s in schemes)

    def step() -> None:
        nonlocal done
        done += 1
        work.say("sites", done, n)

    return local_deviations(work.ready, head, schemes, step)


def _rows(paired: Paired, schemes: Sequence[Scheme], margin: float, **more: Any) -> list[dict[str, object]]:
    """Rows of the table `quantised`."""
    by_name = {s.name: s for s in schemes}
    rows = effect_rows(paired, margin=margin, **more)
    return [_told(by_name[str(row["edit"])]) | row | {"quantised": row["edited"]} for row in rows]


def _told(one: Scheme) -> dict[str, object]:
    """A scheme in columns."""
    shared = {p.form.sharing for p in one.parts}
    return {
        "scheme": one.name, "formats": one.told(), "rounded": one.told(scales=False),
        "sharing": shared.pop() if len(shared) == 1 else "mixed", "exempt": one.exempt, "rotated": one.rotated,
        "smoothed": float("nan") if one.smooth is None else one.smooth, "inserted": one.insert, "slots": one.slots,
        "effort": one.effort,
    }  # fmt: skip


def _task_rows(work: Work, schemes: Sequence[Scheme]) -> list[dict[str, object]]:
    """Rows of lm-eval tasks."""
    config = work.config
    if not config.tasks:
        return []
    first = work.ready.massive.first_of_each()
    able = [s for s in schemes if first is not None or not s.spares]
    if len(able) < len(schemes):
        work.notes.append("Massive tokens of this model are not only first ones, so which they are in a task is not "
                          "known: "
                          "tasks are not given for schemes that spare them.")  # fmt: skip
    if any(s.slots for s in work.schemes):
        work.notes.append("Tasks are of the model as it is: schemes with slots have none.")
    ready = replace(work.ready, massive=first or MassiveTokens())
    edits = [edit_of(ready, s) for s in able]
    folder = None if config.task_folder is None else Path(config.task_folder)
    done = evaluate_tasks(ready.model, config.tasks, edits, folder=folder, limit=config.limit, progress=None)
    return [row for task, paired in done.items() for row in _rows(paired, able, config.margin, task=task)]


def _site_rows(
    work: Work, schemes: Sequence[Scheme], beside: Propagated, local: dict[tuple[str, Site], Local]
) -> list[dict[str, object]]:
    """Rows of the table `quantised_sites`."""
    rows: list[dict[str, object]] = []
    by_name = {s.name: s for s in schemes}
    for (name, site), mine in sorted(local.items(), key=lambda x: (list(by_name).index(x[0][0]), x[0][1].layer)):
        one, ranges = by_name[name], work.ready.ranges.get(site)
        form = one.form(point_of(site))
        whole = beside.layers.get(name, {}).get(site.layer)
        unknown = float("nan")
        amax = unknown if ranges is None else float(ranges.amax.get((False, False), unknown))
        rest = unknown if ranges is None else float(ranges.amax.get((False, True), unknown))
        scale = unknown
        if form is not None and form.sharing == "tensor" and ranges is not None and one.smooth is None:
            amax_of = ranges.amax.get((one.rotated, one.spares))  # None: every token of the calibration is spared
            scale = unknown if amax_of is None else float(scale_of(form, amax_of))
        rows.append({
            "scheme": name, "stack": site.stack, "layer": site.layer, "site": site.point,
            "modules": ", ".join(work.ready.linears.readers.get(site, ())),
            "local_massive": mine.deviation.massive.error, "local_rest": mine.deviation.rest.error,
            "error_massive": unknown if whole is None else whole.massive.error,
            "error_rest": unknown if whole is None else whole.rest.error,
            "zeroed_rate": unknown if form is None or site.point in ("k", "v") else predicted_zeros(
                work.ready, one, site, form),
            "zeroed_measured": mine.zeroed_rate, "scale": scale, "amax": amax, "amax_rest": rest,
        })  # fmt: skip
    alone = [s.name for s in schemes if not any(name == s.name for name, _ in local)]
    nothing = dict.fromkeys(columns_of("quantised_sites"), float("nan"))
    return rows + [
        nothing | {"scheme": name, "stack": work.ready.stack, "layer": layer, "site": "weights",
                   "error_massive": whole.massive.error, "error_rest": whole.rest.error}
        for name in alone for layer, whole in sorted(beside.layers.get(name, {}).items())
    ]  # fmt: skip


def _info(work: Work, scan: ScanResult, schemes: Sequence[Scheme], rest: tuple[Corpus, float]) -> QuantiseInfo:
    corpus, began = rest
    massive, n, half = work.ready.massive, corpus.n_sequences, work.text.n_sequences < corpus.n_sequences
    first = work.calibration.n_sequences if half else n
    info = QuantiseInfo.of(
        scan.info, work.config.record(), corpus, n,
        massive={"clusters": list(massive.clusters), "tokens": massive.count, "left": list(massive.left)},
        calibrated_on=f"sequences 0 to {first - 1}",
        evaluated_on=f"sequences {first if half else 0} to {n - 1}",
        schemes={s.name: _told(s) for s in schemes}, goal=work.config.goal,
    )  # fmt: skip
    if not work.config.schemes and work.config.prefix is None:
        info.notes.append("Schemes on the folded model were left out: --prefix with the ids that massact fold found "
                          "adds them, --prefix auto searches first.")  # fmt: skip
    named = [work.guilty] if work.guilty is not None else []
    if not half and any(s.static or s.insert or s.smooth is not None for s in [*schemes, *named]):
        info.notes.append("Static scales, constant vectors and smoothing are of the sequences that losses are of.")
    turned = work.ready.turned_in_blocks()
    info.notes += [f"{width} entries have no Hadamard matrix: they are rotated in blocks of {block}."
                   for width, block in turned.items()]  # fmt: skip
    info.notes += work.notes
    info.wall_s = time.perf_counter() - began
    return info
