"""Layer 0, the embedding output of a stack: what experiments on positions compare, since no block has mixed them yet.

Shapes: T positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from massact.corpora import Corpus
from massact.models import Model
from massact.records.sites import Site
from massact.stats import Keep
from massact.trace import Edit, Probe, measure


def embedding_outputs(model: Model, corpus: Corpus, stack: str, edits: Sequence[Edit] = ()) -> list[np.ndarray]:
    """The input of the first block of a stack, (T, D), for each sequence of a corpus.

    Args:
        corpus: few and short sequences, of which all values are kept; positions that its mask leaves out are missing.
        stack: name of the stack.
        edits: in force meanwhile.
    """
    site = Site(stack, 0, "resid_post")
    measured = measure(model, corpus, [Probe("embedded", str(site), Keep)], edits)
    return list(measured.result("embedded", site).values)
