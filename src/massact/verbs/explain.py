"""`massact explain`: its options."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from massact.records.errors import UserError
from massact.records.rules import SINK
from massact.verbs.inputs import OfScan
from massact.verbs.options import BatchSize, Options, option
from massact.verbs.verb import Verb

SPECTRUM = "Also the singular values of every sequence's hidden states: three times min(T, D)^3 for each layer."
AS_ONE = "Also the spectrum of all sequences as one matrix: a D x D matrix for every layer."
ALL_KEYS = "Also the mass on every key and the entropy: one more call of the attention kernel."


class ExplainConfig(Options):
    """The options of an explanation.

    Without `columns` (the mass on every key, alpha_k for all k) positions, sinks and entropy are unavailable. A key is
    a sink of a head if alpha_k > eps (Gu 2025).
    """

    VERB: ClassVar[str] = "explain"

    n_sequences: int | None = option(None, "Sequences, from the start; nothing: all.", least=1)
    columns: bool = option(True, ALL_KEYS, "--all-keys/--no-all-keys")
    spectrum: bool = option(True, SPECTRUM, "--spectrum/--no-spectrum")
    corpus_spectrum: bool = option(False, AS_ONE, "--corpus-spectrum/--no-corpus-spectrum")
    eps: float = option(SINK, "A key is a sink of a head if its mean mass exceeds this.")
    seed: int = option(0, "Seed of the random tokens that results are compared with.")
    batch_size: BatchSize = option("auto", "Sequences per forward pass, or auto.")

    @field_validator("eps")
    @classmethod
    def _share(cls, eps: float) -> float:
        if not 0 < eps < 1:
            raise UserError(f"eps is {eps}.", do="Give a share of the attention between 0 and 1.")
        return eps


VERB = Verb(
    "explain",
    "Why are they there: attention on them, the bias they add, who writes them?",
    OfScan,
    ExplainConfig,
    job="massact.explanations:explain",
    place=2,
)
