"""The equations of a proof once more, on a sequence of the length that is measured: a long input may take another path.

They are looked at inside a pass that is run anyway, of one sequence of its batch, one block at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from massact.anatomy import Off, equations_of
from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.records.anatomy import Anatomy, Place
from massact.records.errors import WorkError
from massact.records.kinds.scan import ScanResult
from massact.records.sites import Site, ranges
from massact.stats import HiddenResult
from massact.trace import BATCH_FIRST, measure


class AtLength:
    """A checker for `measure`: all equations of some stacks, on the first sequence of the first batch.

    A later batch of longer sequences is looked at too, so that the numbers are of the longest.

    Args:
        model: a proved model.
        stacks: names of those that the inputs reach.
    """

    def __init__(self, model: Model, stacks: Iterable[str]) -> None:
        self.tolerance = model.proof.tolerance
        chosen = set(stacks)
        self.equations = [e for s in model.anatomy.stacks if s.name in chosen for e in equations_of(s)]
        sites = model.anatomy.sites()
        self.places: Mapping[Site, Place] = {site: sites[site] for e in self.equations for site in e.sites}
        self._of: dict[Site, list[int]] = defaultdict(list)
        for i, equation in enumerate(self.equations):
            for site in set(equation.sites):
                self._of[site].append(i)
        self._longest, self._size = 0, 0
        self.record: dict[str, Any] = {}

    def begin(self, batch: Batch) -> bool:
        """Whether the sequences of a batch are longer than those looked at; forgets what a failed pass has left."""
        self._rows = len(batch.sequences)
        self._size = sum(x[0].numel() for x in batch.inputs.values() if x.ndim)
        self._inputs = _shapes(batch.inputs)
        self._seen: dict[Site, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._offs: dict[int, Off] = {}
        self._left = Counter({site: len(mine) for site, mine in self._of.items()})
        return self._size > self._longest

    def see(self, site: Site, h: Tensor) -> None:
        """Keep the first sequence of a tensor until all equations that it is in have been looked at."""
        if h.numel() % (self._rows * h.shape[-1]):
            raise WorkError(
                f"Site {site} has {tuple(h.shape)} for {self._rows} sequences: its rows are not those of the batch.",
                "The model puts another axis first, or cuts its input into pieces.",
                BATCH_FIRST,
            )
        first = h.reshape(self._rows, -1, h.shape[-1])[0].clone()  # later blocks may write into it in place
        self._seen[site] = first
        if site.point == "resid_post":
            self._tokens.setdefault(site.stack, first.shape[0])
        for i in self._of[site]:
            equation = self.equations[i]
            if i in self._offs or not all(s in self._seen for s in equation.sites):
                continue
            self._offs[i] = equation.off(self._seen)
            for s in set(equation.sites):
                self._left[s] -= 1
                if not self._left[s]:
                    del self._seen[s]

    def end(self) -> None:
        """Compare what was found with what rounding allows.

        Raises:
            ProofError: an equation does not hold; names the block and the size.
        """
        worst, where, skipped = 0.0, "", 0
        for i, off in sorted(self._offs.items()):
            equation, relative = self.equations[i], float(off.relative)
            if not relative <= equation.allowed(self.tolerance):
                raise equation.refusal(off, self.tolerance, self._tokens.get(equation.end.stack, 0))
            skipped += int(off.n_skipped)
            if relative >= worst:
                worst, where = relative, str(equation)
        self._longest = self._size
        if worst < self.record.get("closure", 0.0):
            worst, where = self.record["closure"], self.record["worst"]
        self.record = {
            "inputs": self._inputs,
            "n_tokens": self._tokens,
            "closure": worst,
            "tolerance": self.tolerance,
            "worst": where,
            "n_sums": len(self._offs),
            "n_skipped": skipped + self.record.get("n_skipped", 0),
        }


def skipped_at(record: Mapping[str, Any]) -> list[str]:
    """What could not be looked at, in words."""
    n = record.get("n_skipped", 0)
    return [f"Sums of {n:,} entries were not checked at length: their terms are NaN or Inf."] if n else []


def cut_at(anatomy: Anatomy, hidden: Mapping[Site, HiddenResult]) -> list[str]:
    """Where hidden states stand at the bound of a clamp, a sentence for each stack and bound: the equations of all
    sequences but the one that was looked at hold only where it cuts nothing."""
    reached: dict[tuple[str, float], dict[int, int]] = defaultdict(dict)
    for stack in anatomy.stacks:
        for block in stack.blocks:
            site = Site(stack.name, block.layer, "resid_post")
            bound = max(map(abs, block.cuts.get(site.point, (np.inf, np.inf))))
            n = int((hidden[site].max >= bound).sum()) if site in hidden else 0
            if n and np.isfinite(bound):
                reached[stack.name, bound][block.layer] = n
    told = []
    for (name, bound), at in reached.items():
        head, most = f"Stack {name!r}, layers" if name else "Layers", max(at.values())
        told.append(
            f"{head} {ranges(at)}: |h| reaches {bound:,.6g}, where the model cuts it, in up to {most:,} "
            f"sequence{'s' * (most > 1)}. There less is added than what is written, and the account of who writes it "
            "may not close."
        )
    return told


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of every input, what one sequence of it looks like."""
    return {name: list(x.shape[1:]) for name, x in inputs.items()}


def prove_at_length(model: Model, corpus: Corpus, stacks: Iterable[str]) -> dict[str, Any]:
    """Look at the equations in a pass of their own, over the sequence of a corpus with most tokens that count.

    Returns:
        The record, as in `proof.at_length` of a run.

    Raises:
        ProofError: an equation does not hold; names the block and the size.
        WorkError: the model does not run as it did when it was proved.
    """
    checker = AtLength(model, stacks)
    measure(model, _longest(corpus), [], checker=checker)
    return checker.record


def _longest(corpus: Corpus) -> Corpus:
    """The sequence with most tokens that count."""
    at = 0 if corpus.mask is None else int(torch.argmax(corpus.mask.sum(1)))
    return corpus.part(at, at + 1)


def proved_at(scan: ScanResult, corpus: Corpus) -> dict[str, Any] | None:
    """What the record of a scan says of the proof at the length of a corpus; None where it says nothing of it."""
    proof = scan.info.model.get("proof")
    record = proof.get("at_length") if isinstance(proof, Mapping) else None
    if not isinstance(record, Mapping):
        return None
    same = corpus.sha256 == scan.info.corpus.get("sha256")
    if same or record.get("inputs") == _shapes(next(iter(_longest(corpus).batches(1))).inputs):
        return dict(record)
    return None
