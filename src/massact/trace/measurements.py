"""`measure`: the one primitive. Run a model over batches and let statistics see the sites they ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from massact.corpora import Batch, Corpus
from massact.records.anatomy import Anatomy, AttentionPlace, Place
from massact.records.errors import UserError, WorkError
from massact.records.sites import Site
from massact.stats import Statistic, Where
from massact.stats.attended import Attended
from massact.trace.as_found import unchanged
from massact.trace.as_proved import Checker, Shapes, check_calls
from massact.trace.attention import AttentionCall, attending
from massact.trace.edits import Edit, Fired, change_of, check_fired
from massact.trace.hooks import AllSeen, tapped

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class Traceable(Protocol):
    """What `measure` needs of a model; `massact.models.Model` is one."""

    module: nn.Module
    anatomy: Anatomy
    proof: Any  # its `calls`: how often each border of a module is passed in one pass, and how often it attends

    @property
    def device(self) -> torch.device: ...

    def run(self, inputs: dict[str, Any], *, places: Iterable[Place]) -> Any: ...


@dataclass(frozen=True)
class Probe:
    """Where to look and what to keep.

    Args:
        name: the key under which the results are found.
        site: a glob over printed site names, such as `*.resid_post`.
        statistic: makes a fresh, empty statistic.
    """

    name: str
    site: str
    statistic: Callable[[], Statistic]


@dataclass
class Measurements:
    """What `measure` found: one statistic for each probe and site.

    Args:
        statistics: (probe name, site) -> statistic; call `result` for its numbers.
        edits: what each edit did.
        n_sequences: sequences finished; a resumed run goes on from here.
        batch_size: sequences per forward pass, after any back-off.
        forward_s: seconds spent in forward passes with the taps installed.
        whole: False while a batch is being added, which an interrupt may leave half-done.
    """

    statistics: dict[tuple[str, Site], Statistic]
    edits: list[Fired] = field(default_factory=list)
    n_sequences: int = 0
    batch_size: int = 0
    forward_s: float = 0.0
    whole: bool = True

    def sites(self, probe: str) -> list[Site]:
        return [site for name, site in self.statistics if name == probe]

    def result(self, probe: str, site: Site) -> Any:
        return self.statistics[probe, site].result()


@dataclass
class _Plan:
    """Which statistics and edits sit at which places; made once, before anything runs."""

    probes: list[tuple[str, Site, Place, Callable[[], Statistic]]]
    attention: list[tuple[str, Site, AttentionPlace, Callable[[], Statistic]]]
    edits: list[tuple[int, Edit, Site, Place]]

    @property
    def all_probes(self) -> list[tuple[str, Site, Any, Callable[[], Statistic]]]:
        return [*self.probes, *self.attention]

    @property
    def places(self) -> list[Place]:
        """What the forward pass must reach."""
        calls = [Place(p[2].module, "out") for p in self.attention]
        return [p[2] for p in self.probes] + [e[3] for e in self.edits] + calls


def plan(model: Traceable, probes: Sequence[Probe], edits: Sequence[Edit] = ()) -> _Plan:
    """Resolve every selector.

    Raises:
        UserError: a selector matches nothing, or two probes have one name at one site.
    """
    chosen: dict[tuple[str, Site], tuple[Any, Callable[[], Statistic]]] = {}
    for probe in probes:
        attention = model.anatomy.select_attention(probe.site)
        for site, place in (attention or model.anatomy.select(probe.site)).items():
            if (probe.name, site) in chosen:
                raise UserError(f"Two probes are called {probe.name!r} at site {site}.", do="Name them apart.")
            chosen[probe.name, site] = (place, probe.statistic)
    resolved = [(i, e, s, p) for i, e in enumerate(edits) for s, p in model.anatomy.select(e.site).items()]
    planned = [(name, site, place, make) for (name, site), (place, make) in chosen.items()]
    calls = [p for p in planned if isinstance(p[2], AttentionPlace)]
    return _Plan([p for p in planned if not isinstance(p[2], AttentionPlace)], calls, resolved)


def measure(
    model: Traceable,
    batches: Corpus | Iterable[Batch],
    probes: Sequence[Probe],
    edits: Sequence[Edit] = (),
    *,
    batch_size: int | str = "auto",
    resume: Measurements | None = None,
    on_batch: Callable[[Measurements], None] | None = None,
    checker: Checker | None = None,
) -> Measurements:
    """Run a model over batches, under edits, and feed what the probes ask for into their statistics.

    Args:
        model: a loaded model.
        batches: a corpus, or batches of one's own.
        probes: what to look at; every site must fire in every forward pass.
        edits: what to change; applied before any probe at the same place sees the tensor.
        batch_size: sequences per forward pass of a corpus; "auto" starts from the device and halves
            when memory runs out.
        resume: measurements of an interrupted run over the same corpus; goes on where it stopped.
        on_batch: called after each finished batch, to show progress or to save; its time is not counted.
        checker: looks at more sites, in the passes that it asks for.

    Raises:
        UserError: a selector matches nothing or names an unavailable site.
        WorkError: a site did not fire, an edit changed nothing, one sequence does not fit into memory, or the model
            takes another path than when it was proved.
    """
    planned = plan(model, probes, edits)
    done = resume or Measurements({(n, s): make() for n, s, _, make in planned.all_probes})
    if not done.edits:
        done.edits = [Fired(e.name) for e in edits]
    queue = _Queue(model, batches, batch_size, done)
    with torch.inference_mode(), unchanged(model.module, values=True):
        while (batch := queue.take()) is not None:
            began = time.perf_counter()
            try:
                fresh, fired = _forward(model, planned, batch.to(model.device), edits, checker)
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                queue.split(batch, error)
                continue
            done.whole = False
            for key, statistic in fresh.items():
                done.statistics[key].merge(statistic)
            for total, now in zip(done.edits, fired, strict=True):
                total.n_calls += now.n_calls
                total.n_elements += int(now.n_elements)
            done.n_sequences += len(batch.sequences)
            done.batch_size = queue.size
            done.whole = True
            done.forward_s += time.perf_counter() - began
            if on_batch is not None:
                on_batch(done)
    check_fired(done.edits)
    return done


def _forward(
    model: Traceable, planned: _Plan, batch: Batch, edits: Sequence[Edit], checker: Checker | None
) -> tuple[dict, list[Fired]]:
    """One forward pass into fresh statistics, so that a pass that fails half-way leaves no trace."""
    fresh = {(name, site): make() for name, site, _, make in planned.all_probes}
    fired = [Fired(edit.name) for edit in edits]

    # Attention is seen by a function mode, which need not look at what the statistics do.
    unseen = torch._C.DisableTorchFunction if planned.attention else nullcontext

    shapes = Shapes(batch, {stack.name: stack.d_model for stack in model.anatomy.stacks})

    def seer(statistic: Statistic, site: Site, place: Place) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            with unseen():
                shapes.check(h, site, place)
                feed(statistic, h, batch)

        return see

    taps = [(place, change_of(edit, fired[i], lambda: batch)) for i, edit, _, place in planned.edits]
    taps += [(place, seer(fresh[name, site], site, place)) for name, site, place, _ in planned.probes]  # type: ignore[misc]
    watched = checker.places if checker is not None and checker.begin(batch) else {}

    def look(site: Site, place: Place, h: Tensor) -> None:
        with unseen():
            if site.point.startswith("resid"):
                shapes.check(h, site, place)
            checker.see(site, h)  # type: ignore[union-attr]

    taps += [(place, partial(look, site, place)) for site, place in watched.items()]
    calls: dict[AttentionPlace, list[Statistic]] = {}
    for name, site, place, _ in planned.attention:
        calls.setdefault(place, []).append(fresh[name, site])
    with (
        attending(model.module, {p: partial(_feed_call, s, p, batch) for p, s in calls.items()}) as heads,
        tapped(model.module, taps, stop=not watched, until=lambda: heads.complete) as state,
        suppress(AllSeen),
    ):
        state.begin()
        heads.begin()
        model.run(batch.inputs, places=[*planned.places, *watched.values()])
    # From here on the device may still be at work; nothing above waited for it.
    sites = [s for _, _, s, _ in planned.edits] + [s for _, s, _, _ in planned.probes] + [*watched]
    sites += [next(s for _, s, p, _ in planned.attention if p is place) for place in calls]
    silent = [str(s) for s, n in zip(sites, [*state.fired, *heads.fired], strict=True) if n == 0]
    if silent:
        raise WorkError(
            f"Site {silent[0]} did not fire ({len(silent)} of {len(sites)} sites did not).",
            "The model took another path than when it was proved.",
            "Choose sites of the part of the model that these inputs run through.",
        )
    check_calls(state.calls | heads.calls, model.proof.calls, whole=bool(watched))
    if checker is not None and watched:
        checker.end()
    return fresh, fired


def feed(statistic: Statistic, h_BTD: Tensor, batch: Batch) -> None:
    """Give each sequence's valid rows to a statistic."""
    if h_BTD.ndim == 2:  # some modules see tokens of all sequences in one row
        h_BTD = h_BTD.reshape(len(batch.sequences), -1, h_BTD.shape[-1])
    counted = batch.rows_of(h_BTD.shape[1])  # a mask is about the text, say, not about patches
    for b, (sequence, rows) in enumerate(zip(batch.sequences, counted, strict=True)):
        if rows is None:
            statistic.update(h_BTD[b], Where(sequence))
        elif isinstance(rows, slice):
            statistic.update(h_BTD[b, rows], Where(sequence, start=rows.start or 0))
        else:
            statistic.update(h_BTD[b].index_select(0, rows), Where(sequence, positions=rows))


def _feed_call(statistics: list[Statistic], place: AttentionPlace, batch: Batch, call: AttentionCall) -> None:
    """Give each sequence's attention to statistics."""
    for attended, where in attended_sequences(call, place, batch):
        for statistic in statistics:
            statistic.update(attended, where)


def attended_sequences(call: AttentionCall, place: AttentionPlace, batch: Batch) -> Iterator[tuple[Attended, Where]]:
    """The attention call of each sequence of a batch, without the positions that do not count, and where these are.

    Raises:
        WorkError: the call has another number of rows than the batch has sequences.
    """
    n = len(batch.sequences)
    call = call.split(n)
    if call.shape[0] != n:
        raise WorkError(
            f"Attention in {place.module!r} saw {call.shape[0]} rows for {n} sequences.",
            "The model split its input into windows, which it did not do when it was proved.",
        )
    counted = batch.rows_of(call.shape[2])
    for b, (sequence, rows) in enumerate(zip(batch.sequences, counted, strict=True)):
        attended = call.of(b, place)
        where = Where(sequence)
        if rows is not None:
            attended = attended.trimmed(rows)
            where = Where(sequence, rows.start or 0) if isinstance(rows, slice) else Where(sequence, positions=rows)
        yield attended, where


class _Queue:
    """Batches still to do; a batch that did not fit comes back as two halves."""

    def __init__(
        self, model: Traceable, batches: Corpus | Iterable[Batch], size: int | str, done: Measurements
    ) -> None:
        self.retry: list[Batch] = []
        self.corpus = batches if isinstance(batches, Corpus) else None
        self.size = self._first_size(model, size) if self.corpus else 0
        self.next = done.n_sequences
        self.given: Iterator[Batch] = iter(()) if self.corpus else iter(batches)

    def _first_size(self, model: Traceable, size: int | str) -> int:
        assert self.corpus is not None
        if size != "auto":
            if not isinstance(size, int) or size < 1:
                raise UserError(f"Batch size {size!r} is not 'auto' or a number from 1 on.")
            return size
        budget = TOKENS_PER_BATCH.get(model.device.type, 4096)
        longest = self.corpus.inputs["input_ids"].shape[1] if self.corpus.kind == "tokens" else 256
        return max(1, min(budget // longest, 64))

    def take(self) -> Batch | None:
        if self.retry:
            return self.retry.pop()
        if self.corpus is None:
            return next(self.given, None)
        if self.next >= self.corpus.n_sequences:
            return None
        batch = next(iter(self.corpus.batches(self.size, start=self.next)))
        self.next += len(batch.sequences)
        return batch

    def split(self, batch: Batch, error: Exception) -> None:
        n = len(batch.sequences)
        if n == 1:
            raise WorkError(
                "One sequence does not fit into memory.",
                str(error).splitlines()[0],
                "Use a shorter --seq-len, a smaller dtype (--dtype bfloat16) or another device.",
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = max(1, n // 2)
        self.retry += [batch.part(n // 2, n), batch.part(0, n // 2)]


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
