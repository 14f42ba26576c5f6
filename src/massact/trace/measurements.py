"""`measure`: the loop over a corpus under `observing`, with back-off, resume and the checks of every pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from massact.corpora import Batch, Corpus
from massact.records.anatomy import Place
from massact.records.errors import UserError, WorkError
from massact.trace.conformance import Checker
from massact.trace.edits import AnyEdit, Fired, check_fired
from massact.trace.hooks import AllSeen
from massact.trace.integrity import unchanged
from massact.trace.observation import Measurements, Observable, Plan, Probe, Seen, observing, plan

TOKENS_PER_BATCH = {"cuda": 16384}
# Of a CPU: more at once is no faster, and takes more memory; of a narrow model calls cost more than what they compute.
TOKENS_PER_THREAD, MOST_PER_THREAD, VALUES_PER_THREAD = 256, 2048, 1 << 18


class Traceable(Observable, Protocol):
    """What `measure` needs of a model; `massact.models.Model` is one."""

    @property
    def device(self) -> torch.device: ...

    def run(self, inputs: dict[str, Any], *, places: Iterable[Place]) -> Any: ...


def measure(
    model: Traceable,
    batches: Corpus | Iterable[Batch],
    probes: Sequence[Probe],
    edits: Sequence[AnyEdit] = (),
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
    planned = plan(model, probes)
    done = resume or Measurements(planned.fresh())
    if not done.edits:
        done.edits = [Fired(e.name) for e in edits]
    queue = _Queue(model, batches, batch_size, done)
    with torch.inference_mode(), unchanged(model.module, values=True):
        while (batch := queue.take()) is not None:
            began = time.perf_counter()
            try:
                seen = _pass(model, planned, batch.to(model.device), edits, checker)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                queue.split(batch, error)
                continue
            done.whole = False
            for key, statistic in seen.statistics.items():
                done.statistics[key].merge(statistic)
            for total, now in zip(done.edits, seen.edits, strict=True):
                total.add(now)
            done.n_sequences += len(batch.sequences)
            done.batch_size = queue.size
            done.whole = True
            done.forward_s += time.perf_counter() - began
            if on_batch is not None:
                on_batch(done)
    check_fired(done.edits)
    return done


def _pass(model: Traceable, planned: Plan, batch: Batch, edits: Sequence[AnyEdit], checker: Checker | None) -> Seen:
    """One forward pass into fresh statistics, so that a pass that fails half-way leaves no trace."""
    with observing(model, planned, edits, batch=batch, lenient=("edits",), checker=checker) as seen, suppress(AllSeen):
        seen.taps.stop = not seen.watched
        model.run(batch.inputs, places=seen.places)
    return seen


class _Queue:
    """Batches still to do; a batch that did not fit comes back as two halves."""

    def __init__(
        self, model: Traceable, batches: Corpus | Iterable[Batch], size: int | str, done: Measurements
    ) -> None:
        self.retry: list[Batch] = []
        self.corpus = batches if isinstance(batches, Corpus) else None
        self.size = self._first_size(model, size) if self.corpus else 0
        self.next = done.n_sequences
        self.given: Iterator[Batch] = iter(() if isinstance(batches, Corpus) else batches)

    def _first_size(self, model: Traceable, size: int | str) -> int:
        assert self.corpus is not None
        if size != "auto":
            if not isinstance(size, int) or size < 1:
                raise UserError(f"Batch size {size!r} is not 'auto' or a number from 1 on.")
            return size
        budget = TOKENS_PER_BATCH.get(model.device.type, 4096)
        if model.device.type == "cpu":
            width = max((s.d_model for s in model.anatomy.stacks), default=1)
            each = min(MOST_PER_THREAD, max(TOKENS_PER_THREAD, VALUES_PER_THREAD // max(1, width)))
            budget = each * min(8, max(2, torch.get_num_threads()))
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


def out_of_memory(error: Exception) -> bool:
    """Whether a pass failed for lack of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
